"""What the side-by-side bench compares: its settings, the arms, and which of them meets which round trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.launch import DRAFT_PACE, TARGET_PACE
from vllm_wanspec.lab.records import Cell

__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "DEFAULT_RTT_MS",
    "BenchOptions",
    "Block",
    "blocks",
    "cells",
    "is_remote",
    "orders",
    "parse_list",
    "speculates",
    "uses_wan",
]

ARMS: dict[str, str] = {
    "none": "plain vLLM as shipped",
    "none_constrained": "plain vLLM without async scheduling, as remote drafts need it",
    "ngram": "vLLM's prompt lookup",
    "draft_model": "vLLM's co-located draft model at its best γ",
    "oracle": "the target's own greedy text as drafts: the ceiling",
    "wanspec": "remote drafts across the emulated WAN",
    "wanspec_no_wait": "the same without waiting for late drafts",
    "wanspec_dead": "remote drafts where nobody answers",
    "wanspec_random": "remote drafts of random tokens",
}
DEFAULT_ARMS = ("none", "none_constrained", "ngram", "draft_model", "wanspec", "oracle")
DEFAULT_RTT_MS = (0.0, 10.0, 20.0, 30.0, 50.0, 70.0, 100.0)
DEFAULT_GAMMAS = (2, 3, 4, 5, 6, 7, 8)
DEFAULT_COUNT = 24
MAX_SPECULATIVE_TOKENS = 64
MAX_TIME_SCALE = 20.0


def is_remote(arm: str) -> bool:
    """Whether an arm's target has our controller."""
    return arm.startswith("wanspec")


def uses_wan(arm: str) -> bool:
    """Whether an arm's drafts cross the emulated WAN, so that it is measured at every round trip."""
    return arm in ("wanspec", "wanspec_no_wait")


def speculates(arm: str) -> bool:
    """Whether an arm verifies drafts at all."""
    return arm not in ("none", "none_constrained")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The bench's settings.

    Args:
        target: Target model: a folder, or a name that vLLM knows.
        draft: Draft model, likewise.
        prompts: JSON-lines file of ``{"prompt": …}``, with a ``"module"`` or without.
        arms: What is compared at concurrency 1.
        rtt_ms: Round trips at which arms that use the WAN are measured.
        concurrency: Requests at a time.
        concurrent_arms: What is compared above concurrency 1.
        concurrent_rtt_ms: Round trips there.
        count: How many usable prompts; None takes `DEFAULT_COUNT`.
        repeats: How often each prompt goes through each cell.
        max_tokens: Tokens per prompt at most; fewer where the text begins to repeat.
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
    arms: tuple[str, ...] = DEFAULT_ARMS
    rtt_ms: tuple[float, ...] = DEFAULT_RTT_MS
    concurrency: tuple[int, ...] = (1,)
    concurrent_arms: tuple[str, ...] = DEFAULT_ARMS
    concurrent_rtt_ms: tuple[float, ...] = DEFAULT_RTT_MS
    count: int | None = None
    repeats: int = 3
    max_tokens: int = 128
    speculative_tokens: int = 8
    gammas: tuple[int, ...] = DEFAULT_GAMMAS
    trial_prompts: int = 8
    seed: int = 0
    target_pace: Pacing | None = TARGET_PACE
    draft_pace: Pacing | None = DRAFT_PACE
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        for option, arms in (("--arms", self.arms), ("--concurrent-arms", self.concurrent_arms)):
            for arm in arms:
                if arm not in ARMS:
                    raise ConfigError(f"{option}: {arm!r} is not an arm; there are {', '.join(ARMS)}")
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
        if "draft_model" in self.started and not self.gammas:
            raise ConfigError("--gammas: the arm draft_model needs at least one")
        if not 0.1 <= self.time_scale <= MAX_TIME_SCALE:  # also refuses nan
            raise ConfigError(f"--time-scale: {self.time_scale:g} is not from 0.1 to {MAX_TIME_SCALE:g}")
        if self.time_scale != 1.0 and (self.target_pace is None or self.draft_pace is None):
            raise ConfigError("--time-scale: forwards that are not paced cannot be scaled; leave out --no-pace")

    @property
    def prompt_count(self) -> int:
        """How many usable prompts are measured."""
        return DEFAULT_COUNT if self.count is None else self.count

    @property
    def started(self) -> tuple[str, ...]:
        """Arms that have any cell, in the order of `ARMS`."""
        used = {cell.arm for cell in cells(self)}
        return tuple(arm for arm in ARMS if arm in used)

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
        """Return all settings as JSON values."""
        paces = {"target_pace": self.target_pace, "draft_pace": self.draft_pace}
        return {
            "target": self.target,
            "draft": self.draft,
            "prompts": str(self.prompts),
            "arms": list(self.arms),
            "rtt_ms": list(self.rtt_ms),
            "concurrency": list(self.concurrency),
            "concurrent_arms": list(self.concurrent_arms),
            "concurrent_rtt_ms": list(self.concurrent_rtt_ms),
            "count": self.prompt_count,
            "repeats": self.repeats,
            "max_tokens": self.max_tokens,
            "speculative_tokens": self.speculative_tokens,
            "gammas": list(self.gammas),
            "trial_prompts": self.trial_prompts,
            "seed": self.seed,
            "time_scale": self.time_scale,
            **{name: pace and pace.setting for name, pace in paces.items()},
        }


def cells(options: BenchOptions) -> list[Cell]:
    """Return everything that is compared, in the order of concurrency, arms and round trips."""
    found = []
    for concurrency in dict.fromkeys(options.concurrency):
        single = concurrency == 1
        arms = options.arms if single else options.concurrent_arms
        rtts_ms = options.rtt_ms if single else options.concurrent_rtt_ms
        for arm in dict.fromkeys(arms):
            trips: Sequence[float | None] = tuple(dict.fromkeys(rtts_ms)) if uses_wan(arm) else (None,)
            found += [Cell(arm, rtt_ms, concurrency) for rtt_ms in trips]
    return found


class Block(NamedTuple):
    """What is measured under one setting of the WAN: cells whose requests alternate.

    Cells without a WAN take their turns in the blocks of a repeat, one after another.
    """

    concurrency: int
    repeat: int
    rtt_ms: float | None
    cells: tuple[Cell, ...]


def blocks(options: BenchOptions) -> list[Block]:
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


Item = TypeVar("Item")


def parse_list(option: str, text: str, read: Callable[[str], Item]) -> tuple[Item, ...]:
    """Read the values of a comma-separated list, each once.

    Raises:
        ConfigError: The list is empty, or ``read`` raises ValueError for a part of it.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        values = [read(part) for part in parts]
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a list of numbers, as in 0,10,20") from None
    if not values:
        raise ConfigError(f"{option}: the list is empty")
    return tuple(dict.fromkeys(values))
