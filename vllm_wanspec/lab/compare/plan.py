"""A run's settings: what it compares, which arms meet which round trip, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Self

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.arms import ARMS, Arm, arms_of, named_arms
from vllm_wanspec.lab.harness.launch import DRAFT_PACE, TARGET_PACE
from vllm_wanspec.lab.harness.models import REPEAT_SPAN, find_models
from vllm_wanspec.lab.records import Cell, Load, Setting

DEFAULT_ARMS = (
    "none",
    "ngram",
    "lookup",
    "draft_model",
    "draft_model_lookup",
    "wanspec",
    "wanspec_no_lookup",
    "oracle",
)
DEFAULT_RTT_MS = (0.0, 10.0, 20.0, 30.0, 50.0, 70.0, 100.0)
DEFAULT_GAMMAS = (1, 2, 3, 4, 5, 6)
DEFAULT_NGRAMS = (Setting(8, 2, 4), Setting(4, 2, 4), Setting(8, 1, 3), Setting(8, 3, 5))
DEFAULT_COUNT = 72
MAX_SPECULATIVE_TOKENS = 64
#: How vLLM's co-located draft model may sample its tokens where the target samples; else it takes the most probable.
PROBABILISTIC = "probabilistic"
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
        far_rtt_ms: Further ones, for remote drafts without lookup alone: what a drafter too far away costs.
        concurrency: Requests at a time.
        concurrent_arms: What is compared above concurrency 1, and at rates.
        concurrent_rtt_ms: Round trips there.
        rates: Requests per second, at random times (Poisson); settings of the pre-pass are tuned under each.
        jitter_ms: Of the emulated WAN, at time scale 1.
        loss: Share of the segments that the emulated WAN loses.
        temperature: Of sampling; 0 is greedy. Above 0 outputs cannot be compared, and all have the length of the
            greedy text.
        slo_ms: What a request must keep to count as good under a rate: time to the first token, and between 95 of 100
            tokens and the next, at time scale 1.
        count: How many usable prompts; None takes all that are usable.
        repeats: How often each prompt goes through each cell.
        max_tokens: Tokens per prompt at most.
        whole_texts: Use texts to their end. Else they are cut where they begin to repeat, and those that are then too
            short are not usable.
        ranked: Ask the draft model how well it foresees the texts.
        repeat_span: A text begins to repeat where so many tokens have come before in this order.
        speculative_tokens: Draft tokens verified per step at most, except by what the pre-pass tunes.
        gammas: Draft tokens per step that the pre-pass tries for the co-located draft model.
        ngrams: What it tries for vLLM's prompt lookup.
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
    far_rtt_ms: tuple[float, ...] = ()
    concurrency: tuple[int, ...] = (1,)
    concurrent_arms: tuple[Arm, ...] = ()
    concurrent_rtt_ms: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    jitter_ms: float = 0.0
    loss: float = 0.0
    temperature: float = 0.0
    slo_ms: tuple[float, float] = (1000.0, 200.0)
    count: int | None = DEFAULT_COUNT
    repeats: int = 1
    max_tokens: int = 128
    whole_texts: bool = False
    ranked: bool = True
    repeat_span: int = REPEAT_SPAN
    speculative_tokens: int = 8
    gammas: tuple[int, ...] = DEFAULT_GAMMAS
    ngrams: tuple[Setting, ...] = DEFAULT_NGRAMS
    trial_prompts: int = 8
    seed: int = 0
    target_pace: Pacing | None = TARGET_PACE
    draft_pace: Pacing | None = DRAFT_PACE
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        for option, numbers, low, high in (
            ("--rtt-ms", self.rtt_ms, 0, 10_000),
            ("--far-rtt-ms", self.far_rtt_ms, 0, 10_000),
            ("--concurrent-rtt-ms", self.concurrent_rtt_ms, 0, 10_000),
            ("--concurrency", self.concurrency, 1, 256),
            ("--rates", self.rates, 0.01, 1000),
            ("--gammas", self.gammas, 1, MAX_SPECULATIVE_TOKENS),
            ("--ngrams", [setting.draft_tokens for setting in self.ngrams], 1, MAX_SPECULATIVE_TOKENS),
            ("--jitter-ms", [self.jitter_ms], 0, 1000),
            ("--loss", [self.loss], 0, 0.5),
            ("--temperature", [self.temperature], 0, 2),
            ("--repeat-span", [self.repeat_span], 2, 128),
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
        for arm in self.started:
            if arm.is_tuned and not self.candidates(arm):
                option = "--ngrams" if arm.target.method == "ngram" else "--gammas"
                raise ConfigError(f"{option}: the arm {arm.name} needs at least one")
            if arm.target.method == "draft_model_lookup" and max(self.gammas) > self.speculative_tokens:
                raise ConfigError(f"--gammas: the arm {arm.name} drafts at most --speculative-tokens per step")
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

    def candidates(self, arm: Arm) -> tuple[Setting, ...]:
        """What the pre-pass tries for an arm; nothing where there is nothing to tune."""
        if not arm.is_tuned:
            return ()
        if arm.target.method == "ngram":
            return self.ngrams
        settings = tuple(map(Setting, self.gammas))
        if arm.target.method == "draft_model" and self.temperature > 0.0:
            settings += tuple(setting._replace(sampling=PROBABILISTIC) for setting in settings)
        return settings

    def loads(self, arm: Arm) -> tuple[Load, ...]:
        """The loads under which an arm is measured."""
        return tuple(dict.fromkeys(cell.load for cell in cells(self) if cell.arm == arm.name))

    @property
    def texts_from(self) -> Arm:
        """The arm whose target gives the texts that all must repeat: a plain one if there is any.

        One that is tuned comes last: it cannot be asked as it will run before the pre-pass, which needs the texts.
        """
        places = {"constrained": 0, "plain": 1}
        return min(self.started, key=lambda arm: 3 if arm.is_tuned else places.get(arm.target.method, 2))

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
        return {one.name: _json_value(getattr(self, one.name)) for one in fields(self)}

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the settings that `as_json` gave.

        Raises:
            ConfigError: These are none.
        """
        try:
            made: dict[str, Any]
            made = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
            made |= {name: arms_of(data[name]) for name in ("arms", "concurrent_arms")}
            made |= {name: Pacing.parse(data[name]) for name in ("target_pace", "draft_pace") if data[name]}
            return cls(
                **made | {"prompts": Path(data["prompts"]), "ngrams": tuple(Setting(*one) for one in data["ngrams"])}
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"these are not the options of a run: {error}") from error


def setting_text(setting: Setting) -> str:
    """Return a setting of vLLM's prompt lookup as options have it, as in ``8:2-4``."""
    return f"{setting.draft_tokens}:{setting.ngram_min}-{setting.ngram_max}"


def read_setting(text: str) -> Setting:
    """Read what `setting_text` gives.

    Raises:
        ValueError: The text is not of this form, or says of n-grams what makes no sense.
    """
    tokens, _, ngrams = text.partition(":")
    shortest, _, longest = ngrams.partition("-")
    made = Setting(int(tokens), int(shortest), int(longest))
    if not 1 <= made.ngram_min <= made.ngram_max:
        raise ValueError(text)
    return made


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(map(_json_value, value))
    if isinstance(value, Pacing):
        return value.setting
    return str(value) if isinstance(value, Arm | Path) else value


def cells(options: Options) -> list[Cell]:
    """Return everything that is compared, in the order of load, arms and round trips."""
    found = []
    loads = [*map(Load, dict.fromkeys(options.concurrency)), *(Load(0, rate) for rate in dict.fromkeys(options.rates))]
    for load in loads:
        single = load == Load()
        arms = options.arms if single else options.concurrent_arms
        rtts_ms = options.rtt_ms if single else options.concurrent_rtt_ms
        for arm in dict.fromkeys(arms):
            far_ms = options.far_rtt_ms if single and arm.lookup == "none" and not arm.is_tree else ()
            trips: Sequence[float | None] = tuple(dict.fromkeys((*rtts_ms, *far_ms))) if arm.uses_wan else (None,)
            found += [Cell(arm.name, rtt_ms, *load) for rtt_ms in trips]
    return found


class Block(NamedTuple):
    """What is measured under one setting of the WAN: cells whose requests alternate.

    A prompt goes through all cells without a WAN in one block, and through each of these one after the other; the
    prompts take turns in the blocks of a repeat. So an arm without a WAN is measured in all of them, as its peers are.
    Where requests run together a cell is in one block alone.
    """

    load: Load
    repeat: int
    rtt_ms: float | None
    cells: tuple[Cell, ...]
    turn: int = 0
    turns: int = 1

    def takes(self, cell: Cell, number: int) -> bool:
        """Whether the prompt of this number goes through a cell here."""
        # Each round of turns begins one later: prompts come in turns themselves, of their kinds.
        turn = (number + number // self.turns + self.repeat) % self.turns
        return cell.rtt_ms is not None or turn == self.turn


def blocks(options: Options) -> list[Block]:
    """Return the blocks in the order in which they are measured: every prompt through every cell once per repeat."""
    found = []
    for load in dict.fromkeys(cell.load for cell in cells(options)):
        wanted = [cell for cell in cells(options) if cell.load == load]
        local = [cell for cell in wanted if cell.rtt_ms is None]
        rtts_ms = list(dict.fromkeys(cell.rtt_ms for cell in wanted if cell.rtt_ms is not None))
        for repeat in range(options.repeats):
            rng = Random(f"{options.seed} {load.concurrency} {load.rate} {repeat}")
            trips: list[float | None] = [*rng.sample(rtts_ms, len(rtts_ms))] or [None]
            for turn, rtt_ms in enumerate(trips):
                mine = [cell for cell in wanted if cell.rtt_ms == rtt_ms and rtt_ms is not None]
                if load == Load():
                    turns = (turn, len(trips)) if local else (0, 1)
                    mine += local
                else:
                    turns = (0, 1)
                    mine += [cell for place, cell in enumerate(local) if (place + repeat) % len(trips) == turn]
                if mine:
                    rng.shuffle(mine)
                    found.append(Block(load, repeat, rtt_ms, tuple(mine), *turns))
    return found


def orders(block: Block, count: int) -> list[tuple[Cell, ...]]:
    """Return the order of a block's cells for each of ``count`` prompts, such that each has each place in turn."""
    found = []
    for number in range(count):
        mine = tuple(cell for cell in block.cells if block.takes(cell, number))
        turn = number // block.turns if len(mine) == len(block.cells) else number
        first = turn % len(mine) if mine else 0
        found.append(mine[first:] + mine[:first])
    return found


def of_demo_models(models: Path | None, arms: Sequence[Arm], rtt_ms: float, **changes: Any) -> Options:
    """Return settings of a run over the demo's models at one round trip.

    Args:
        models: Folder with ``target/``, ``draft/``, ``prompts.jsonl`` and ``bench_prompts.jsonl``; None takes the
            checkout's.
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
