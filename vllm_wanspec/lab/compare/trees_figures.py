"""The tree bench's figures: increases of counters, times per token, paired ratios with intervals.

Plain values and sums: no servers, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vllm_wanspec.core.learned.calibration import OUTCOMES
from vllm_wanspec.lab.compare.trees_setup import Arm
from vllm_wanspec.lab.harness.scrape import Sample

__all__ = [
    "CONTROLLER_COUNTERS",
    "DRAFTER_COUNTERS",
    "ROW_COLUMNS",
    "ArmFigures",
    "Counters",
    "Interval",
    "Row",
    "Timed",
    "arm_figures",
    "paired_ratio",
    "range_start",
    "rounded",
]

#: Scraped as ``wanspec_<name>_total`` from the target's metrics port …
CONTROLLER_COUNTERS = (
    "steps",
    "committed_tokens",
    "offered_tokens",
    "hits",
    "misses",
    "branch_hits",
    "blind_steps",
    "added_nodes",
    "late_drafts",
    "late_hits",
    "stale_nodes",
    "received_nodes",
    "received_bytes",
    "sent_bytes",
    "unpaid_steps",
    "waits",
    "wait_seconds",
    "opened_sessions",
    "rejected_sessions",
)
#: … and from the drafter's vLLM server.
DRAFTER_COUNTERS = ("drafted_tokens", "branches_started", "branch_seconds")
COUNTERS = (*CONTROLLER_COUNTERS, *DRAFTER_COUNTERS)
ROW_COLUMNS = ("prompt", "repeat", "arm", "time_ms", "timed_tokens", "elapsed_s", *COUNTERS)
POSITIONS = "wanspec_positions_total"
RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Counters:
    """Counters by name, and committed positions by (entropy range, outcome); what nobody serves is absent."""

    values: Mapping[str, float] = field(default_factory=dict)
    positions: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Iterable[Sample], names: Iterable[str]) -> Counters:
        """Gather some counters (summed over their labels), and the positions."""
        wanted = {f"wanspec_{name}_total": name for name in names}
        values: dict[str, float] = {}
        positions: dict[tuple[str, str], float] = {}
        for sample, labels, value in samples:
            if sample in wanted:
                values[wanted[sample]] = values.get(wanted[sample], 0.0) + value
            elif sample == POSITIONS and {"entropy", "outcome"} <= labels.keys():
                key = labels["entropy"], labels["outcome"]
                positions[key] = positions.get(key, 0.0) + value
        return cls(values, positions)

    @classmethod
    def total(cls, parts: Iterable[Counters]) -> Counters:
        """Add up; what only some parts have counts from those."""
        values: dict[str, float] = {}
        positions: dict[tuple[str, str], float] = {}
        for part in parts:
            for name, value in part.values.items():
                values[name] = values.get(name, 0.0) + value
            for key, value in part.positions.items():
                positions[key] = positions.get(key, 0.0) + value
        return cls(values, positions)

    def since(self, earlier: Counters) -> Counters:
        """Return the increase.

        A counter without an earlier value began at 0, as those with labels do; one that fell, because its server was
        started again, is absent.
        """
        values = {name: value - earlier.values.get(name, 0.0) for name, value in self.values.items()}
        positions = {key: value - earlier.positions.get(key, 0.0) for key, value in self.positions.items()}
        return Counters(
            {name: value for name, value in values.items() if value >= 0.0},
            {key: value for key, value in positions.items() if value >= 0.0},
        )

    def get(self, name: str) -> float | None:
        """Return a counter, or None if nobody serves it."""
        return self.values.get(name)

    def ranges(self) -> list[str]:
        """Return the entropy ranges with any position, rising."""
        return sorted({entropy for (entropy, _), count in self.positions.items() if count}, key=range_start)

    def outcomes(self, entropy: str) -> dict[str, float]:
        """Return the positions of one entropy range by outcome."""
        return {outcome: self.positions.get((entropy, outcome), 0.0) for outcome in OUTCOMES}

    def as_json(self) -> dict[str, Any]:
        """Return names to numbers, and under ``positions`` entropy ranges to outcomes to numbers."""
        positions = {entropy: self.outcomes(entropy) for entropy in self.ranges()}
        return {name: rounded(value) for name, value in self.values.items()} | {"positions": positions}


def range_start(entropy: str) -> float:
    """Return the lower end of an entropy range such as ``0.5-1``, nats; infinity if that is not what it is."""
    try:
        return float(entropy.partition("-")[0])
    except ValueError:
        return float("inf")


class Timed(NamedTuple):
    """Milliseconds from the first token to the last, and the tokens after the first."""

    time_ms: float
    tokens: int

    @property
    def per_token_ms(self) -> float | None:
        """Milliseconds per token; None without tokens."""
        return self.time_ms / self.tokens if self.tokens else None


@dataclass(frozen=True, slots=True)
class Row:
    """One request of one arm.

    Args:
        prompt: Index of the prompt.
        repeat: Which time round.
        arm: The arm's name.
        timed: Its time and tokens.
        elapsed_s: Seconds from sending the request to its last token.
        counters: What it added to the counters.
    """

    prompt: int
    repeat: int
    arm: str
    timed: Timed
    elapsed_s: float
    counters: Counters

    def as_json(self) -> list[Any]:
        """Return the row of the result file; ROW_COLUMNS says what is what."""
        figures = (self.timed.time_ms, self.timed.tokens, self.elapsed_s, *map(self.counters.get, COUNTERS))
        return [self.prompt, self.repeat, self.arm, *map(rounded, figures)]


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> list[float | None]:
        """Return value, low and high."""
        return [rounded(part) for part in self]


def paired_ratio(pairs: Sequence[tuple[Timed, Timed]], seed: int = 0) -> Interval | None:
    """Return the ratio of two arms' times per token, summed over prompts, with a bootstrap interval.

    Prompts are drawn with replacement, both arms' times of a prompt together (percentile interval).

    Args:
        pairs: Per prompt the arm and what it is divided by.
        seed: Seed of the draws.

    Returns:
        The ratio; None where there is nothing to divide.
    """
    sums = np.array([[*above, *below] for above, below in pairs], dtype=float).reshape(-1, 4)
    value = float(_ratio(sums.sum(axis=0)))
    if not np.isfinite(value):
        return None
    draws = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    ratios = _ratio(sums[draws].sum(axis=1))
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(ratios[np.isfinite(ratios)], (tail, 1.0 - tail))
    return Interval(value, float(low), float(high))


def _ratio(sums: Any) -> Any:
    """Divide times per token; the last axis is (time, tokens, time below, tokens below)."""
    time, tokens, time_below, tokens_below = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (time / tokens) / (time_below / tokens_below)


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """What one arm did with all prompts.

    Args:
        arm: The arm.
        timed: Time and tokens, summed.
        median_ms: Median over prompts of the time per token, milliseconds.
        ratio: Time per token divided by the baseline's.
        plain_ratio: Time per token divided by plain decoding's on the same target.
        elapsed_s: Duration of its requests, summed.
        counters: What they added to the counters.
    """

    arm: Arm
    timed: Timed
    median_ms: float | None
    ratio: Interval | None
    plain_ratio: Interval | None
    elapsed_s: float
    counters: Counters

    @property
    def tokens_per_step(self) -> float | None:
        """Committed tokens per verification step."""
        return _divided(self.counters.get("committed_tokens"), self.counters.get("steps"))

    @property
    def running_branches(self) -> float | None:
        """Branches that ran on the drafter at a time, on average over the requests' duration.

        What still runs when the last token is out counts in the numerator, until word of the end has crossed the WAN.
        """
        return _divided(self.counters.get("branch_seconds"), self.elapsed_s)

    @property
    def bytes_per_accepted_token(self) -> float | None:
        """Bytes on the link, both ways, per accepted draft token."""
        received, sent = self.counters.get("received_bytes"), self.counters.get("sent_bytes")
        committed, steps = self.counters.get("committed_tokens"), self.counters.get("steps")
        if received is None or sent is None or committed is None or steps is None:
            return None
        return _divided(received + sent, committed - steps)

    def share(self, entropy: str, outcome: str) -> float | None:
        """Return the share of an outcome among the positions of one entropy range."""
        counts = self.counters.outcomes(entropy)
        return _divided(counts[outcome], sum(counts.values()))

    def share_of_misses(self, entropy: str | None, outcome: str) -> float | None:
        """Return the share of an outcome among the positions where the draft model's best token was wrong.

        Args:
            entropy: One entropy range; None takes all.
            outcome: One of the outcomes except ``agreed``.
        """
        ranges = self.counters.ranges() if entropy is None else [entropy]
        counts = [self.counters.outcomes(one) for one in ranges]
        misses = sum(sum(one.values()) - one["agreed"] for one in counts)
        return _divided(sum(one[outcome] for one in counts), misses)

    def as_json(self) -> dict[str, Any]:
        """Return the arm's entry in the result file."""
        return {
            "name": self.arm.name,
            "override": self.arm.override,
            "timed_tokens": self.timed.tokens,
            "time_per_token_ms": rounded(self.timed.per_token_ms),
            "median_time_per_token_ms": rounded(self.median_ms),
            "ratio_to_baseline": self.ratio and self.ratio.as_json(),
            "ratio_to_off": self.plain_ratio and self.plain_ratio.as_json(),
            "tokens_per_step": rounded(self.tokens_per_step),
            "mean_running_branches": rounded(self.running_branches),
            "bytes_per_accepted_token": rounded(self.bytes_per_accepted_token),
            "branch_share_of_misses": rounded(self.share_of_misses(None, "branch")),
            "elapsed_s": rounded(self.elapsed_s),
            "counters": self.counters.as_json(),
        }


def arm_figures(arm: Arm, rows: Sequence[Row], baseline: str, plain: Mapping[int, Timed], seed: int = 0) -> ArmFigures:
    """Gather an arm's figures.

    Args:
        arm: The arm.
        rows: Those of all arms.
        baseline: Name of the arm to divide by.
        plain: Plain decoding's time of each prompt.
        seed: Seed of the bootstrap.
    """
    own = [row for row in rows if row.arm == arm.name]
    times = _by_prompt(own)
    below = _by_prompt([row for row in rows if row.arm == baseline])
    paces = [pace for timed in times.values() if (pace := timed.per_token_ms) is not None]
    return ArmFigures(
        arm=arm,
        timed=_sum(times.values()),
        median_ms=float(np.median(paces)) if paces else None,
        ratio=_against(times, below.get, seed),
        plain_ratio=_against(times, plain.get, seed),
        elapsed_s=sum(row.elapsed_s for row in own),
        counters=Counters.total(row.counters for row in own),
    )


def _against(times: Mapping[int, Timed], below: Callable[[int], Timed | None], seed: int) -> Interval | None:
    pairs = [(timed, other) for prompt, timed in times.items() if (other := below(prompt)) is not None]
    return paired_ratio(pairs, seed)


def _by_prompt(rows: Iterable[Row]) -> dict[int, Timed]:
    sums: dict[int, Timed] = {}
    for row in rows:
        sums[row.prompt] = _sum((sums.get(row.prompt, Timed(0.0, 0)), row.timed))
    return sums


def _sum(parts: Iterable[Timed]) -> Timed:
    both = list(parts)
    return Timed(sum(part.time_ms for part in both), sum(part.tokens for part in both))


def _divided(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def rounded(value: float | None) -> float | None:
    """Return a figure as result files have it: four decimals at most."""
    if value is None:
        return None
    short = round(float(value), 4)
    return int(short) if short.is_integer() else short
