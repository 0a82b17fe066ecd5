"""A run's settings: what it compares, which arms meet which round trip, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.arms import ARMS, Arm, named_arms
from vllm_wanspec.lab.harness.launch import DRAFT_PACE, TARGET_PACE
from vllm_wanspec.lab.harness.models import find_models
from vllm_wanspec.lab.records import Cell

DEFAULT_ARMS = ("none", "none_constrained", "ngram", "draft_model", "wanspec", "oracle")
DEFAULT_RTT_MS = (0.0, 10.0, 20.0, 30.0, 50.0, 70.0, 100.0)
DEFAULT_GAMMAS = (2, 3, 4, 5, 6, 7, 8)
DEFAULT_COUNT = 24
MAX_SPECULATIVE_TOKENS = 64
MAX_TIME_SCALE = 20.0


@dataclass(frozen=True, slots=True)
class Options:
    """A run's settings.

    Attributes:
        target: Target model: a folder, or a name that vLLM knows.
        draft: Draft model, likewise.
        prompts: JSON-lines file of ``{"prompt": …}``, with a ``"module"`` or without.
        arms: What is compared at concurrency 1.
        rtt_ms: Round trips at which arms that use the WAN are measured.
        concurrency: Requests at a time.
        concurrent_arms: What is compared above concurrency 1.
        concurrent_rtt_ms: Round trips there.
        count: How many usable prompts; None takes all that are usable.
        repeats: How often each prompt goes through each cell.
        max_tokens: Tokens per prompt at most.
        whole_texts: Use texts to their end. Else they are cut where they begin to repeat, and those that are then too
            short are not usable.
        ranked: Ask the draft model how well it foresees the texts.
        speculative_tokens: Draft tokens verified per step at most, except by the co-located draft model.
        gammas: Draft tokens per step that the pre-pass tries for the co-located draft model.
        trial_prompts: Prompts of the pre-pass.
        seed: Of the order of blocks and arms, and of the bootstrap.
        target_pace: Duration of a target forward at time scale 1; None does not pace.
        draft_pace: Duration of a draft forward at time scale 1; None does not pace.
        time_scale: Both paces and every round trip last this many times as long, for machines that cannot keep the
            pace: ratios stay comparable. Times are reported as they are measured.
    """

    target: str
    draft: str
    prompts: Path
    arms: tuple[Arm, ...] = named_arms("", DEFAULT_ARMS)
    rtt_ms: tuple[float, ...] = DEFAULT_RTT_MS
    concurrency: tuple[int, ...] = (1,)
    concurrent_arms: tuple[Arm, ...] = ()
    concurrent_rtt_ms: tuple[float, ...] = ()
    count: int | None = DEFAULT_COUNT
    repeats: int = 3
    max_tokens: int = 128
    whole_texts: bool = False
    ranked: bool = True
    speculative_tokens: int = 8
    gammas: tuple[int, ...] = DEFAULT_GAMMAS
    trial_prompts: int = 8
    seed: int = 0
    target_pace: Pacing | None = TARGET_PACE
    draft_pace: Pacing | None = DRAFT_PACE
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        for option, numbers, low, high in (
            ("--rtt-ms", self.rtt_ms, 0, 10_000),
            ("--concurrent-rtt-ms", self.concurrent_rtt_ms, 0, 10_000),
            ("--concurrency", self.concurrency, 1, 256),
            ("--gammas", self.gammas, 1, MAX_SPECULATIVE_TOKENS),
        ):
            for number in numbers:
                if not low <= number <= high:
                    raise ConfigError(f"{option}: {number:g} is not from {low} to {high}")
        if not cells(self):
            raise ConfigError("--arms: nothing to measure: name at least one arm, round trip and concurrency")
        names = [arm.name for arm in dict.fromkeys((*self.arms, *self.concurrent_arms))]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"--trees: the name {twice!r} is that of an arm of --arms; names must differ")
        if self.colocated is not None and not self.gammas:
            raise ConfigError("--gammas: the arm draft_model needs at least one")
        if not 0.1 <= self.time_scale <= MAX_TIME_SCALE:  # also refuses nan
            raise ConfigError(f"--time-scale: {self.time_scale:g} is not from 0.1 to {MAX_TIME_SCALE:g}")
        if self.time_scale != 1.0 and (self.target_pace is None or self.draft_pace is None):
            raise ConfigError("--time-scale: forwards that are not paced cannot be scaled; leave out --no-pace")

    @property
    def started(self) -> tuple[Arm, ...]:
        """Arms that have any cell, in the order of `ARMS`, then as they were given."""
        used = {cell.arm for cell in cells(self)}
        given = [arm for arm in dict.fromkeys((*self.arms, *self.concurrent_arms)) if arm.name in used]
        order = list(ARMS)
        return tuple(sorted(given, key=lambda arm: order.index(arm.name) if arm.name in order else len(order)))

    def arm(self, name: str) -> Arm:
        """Return the arm of a cell."""
        return next(arm for arm in (*self.arms, *self.concurrent_arms) if arm.name == name)

    @property
    def colocated(self) -> Arm | None:
        """The arm with the draft model beside the target, if there is one."""
        return next((arm for arm in self.started if arm.target.method == "draft_model"), None)

    @property
    def texts_from(self) -> Arm:
        """The arm whose target gives the texts that all must repeat: a plain one if there is any.

        The co-located draft model's cannot be asked before the pre-pass, which needs the texts: it comes last.
        """
        places = {"constrained": 0, "plain": 1, "draft_model": 3}
        return min(self.started, key=lambda arm: places.get(arm.target.method, 2))

    @property
    def target_forward(self) -> Pacing | None:
        """How long a target forward lasts here, by the time scale; None is not paced."""
        return self.target_pace and self.target_pace.scaled(self.time_scale)

    @property
    def draft_forward(self) -> Pacing | None:
        """How long a draft forward lasts here, by the time scale; None is not paced."""
        return self.draft_pace and self.draft_pace.scaled(self.time_scale)

    def emulated_ms(self, rtt_ms: float) -> float:
        """Return how long the round trip ``rtt_ms`` of a cell lasts here, by the time scale."""
        return rtt_ms * self.time_scale

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        names = [one.name for one in fields(self) if one.name not in ("whole_texts", "ranked")]
        return {name: _json_value(getattr(self, name)) for name in names}


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(map(_json_value, value))
    if isinstance(value, Pacing):
        return value.setting
    return str(value) if isinstance(value, Arm | Path) else value


def cells(options: Options) -> list[Cell]:
    """Return everything that is compared, in the order of concurrency, arms and round trips."""
    found = []
    for concurrency in dict.fromkeys(options.concurrency):
        single = concurrency == 1
        arms = options.arms if single else options.concurrent_arms
        rtts_ms = options.rtt_ms if single else options.concurrent_rtt_ms
        for arm in dict.fromkeys(arms):
            trips: Sequence[float | None] = tuple(dict.fromkeys(rtts_ms)) if arm.uses_wan else (None,)
            found += [Cell(arm.name, rtt_ms, concurrency) for rtt_ms in trips]
    return found


class Block(NamedTuple):
    """What is measured under one setting of the WAN: cells whose requests alternate.

    Cells without a WAN take their turns in the blocks of a repeat, one after another.
    """

    concurrency: int
    repeat: int
    rtt_ms: float | None
    cells: tuple[Cell, ...]


def blocks(options: Options) -> list[Block]:
    """Return the blocks in the order in which they are measured: every cell once per repeat."""
    found = []
    for concurrency in dict.fromkeys(options.concurrency):
        wanted = [cell for cell in cells(options) if cell.concurrency == concurrency]
        local = [cell for cell in wanted if cell.rtt_ms is None]
        rtts_ms = list(dict.fromkeys(cell.rtt_ms for cell in wanted if cell.rtt_ms is not None))
        for repeat in range(options.repeats):
            rng = Random(f"{options.seed} {concurrency} {repeat}")
            trips: list[float | None] = [*rng.sample(rtts_ms, len(rtts_ms))] or [None]
            for turn, rtt_ms in enumerate(trips):
                mine = [cell for cell in wanted if cell.rtt_ms == rtt_ms and rtt_ms is not None]
                mine += [cell for place, cell in enumerate(local) if (place + repeat) % len(trips) == turn]
                if mine:
                    rng.shuffle(mine)
                    found.append(Block(concurrency, repeat, rtt_ms, tuple(mine)))
    return found


def orders(block: Block, count: int) -> list[tuple[Cell, ...]]:
    """Return the order of a block's cells for each of ``count`` prompts, such that each has each place in turn."""
    size = len(block.cells)
    return [block.cells[turn % size :] + block.cells[: turn % size] for turn in range(count)]


def of_demo_models(models: Path | None, arms: Sequence[Arm], rtt_ms: float, **changes: Any) -> Options:
    """Return settings of a run over the demo's models at one round trip.

    Args:
        models: Folder with ``target/``, ``draft/`` and ``prompts.jsonl``; None takes the checkout's.
        arms: What is compared.
        rtt_ms: Emulated round trip.
        changes: Further settings.

    Raises:
        ConfigError: Models are missing.
    """
    found = find_models(models)
    settings: dict[str, Any] = {"target": str(found.target), "draft": str(found.draft), "prompts": found.prompts}
    settings |= {"arms": tuple(arms), "rtt_ms": (rtt_ms,), "ranked": False}
    return Options(**(settings | changes))
