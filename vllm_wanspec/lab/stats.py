"""Statistics of measured times: sums, ratios paired by prompt, medians, and bootstrap intervals.

Plain values alone: no servers, no files, no clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, comb
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 4000
CONFIDENCE = 0.95


class Timed(NamedTuple):
    """Milliseconds from the first token to the last, and the tokens after the first."""

    time_ms: float
    tokens: int

    @property
    def per_token_ms(self) -> float | None:
        """Milliseconds per token; None without tokens."""
        return self.time_ms / self.tokens if self.tokens else None


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> list[float | None]:
        """Return value, low and high."""
        return [rounded(part) for part in self]


def total(parts: Iterable[Timed]) -> Timed:
    """Add up times and tokens."""
    both = list(parts)
    return Timed(sum(part.time_ms for part in both), sum(part.tokens for part in both))


def sum_by_prompt(times: Mapping[tuple[int, int], Timed]) -> dict[int, Timed]:
    """Add up what is keyed by (prompt, repeat) over the repeats."""
    sums: dict[int, Timed] = {}
    for (prompt, _), timed in times.items():
        sums[prompt] = total([sums.get(prompt, Timed(0.0, 0)), timed])
    return sums


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
    return Interval(value, *_ends(ratios[np.isfinite(ratios)]))


def _ratio(sums: Any) -> Any:
    """Divide times per token; the last axis is (time, tokens, time below, tokens below)."""
    time, tokens, time_below, tokens_below = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (time / tokens) / (time_below / tokens_below)


def median_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the median of at least one value, with a bootstrap interval over the values."""
    found = np.array(values)
    draws = np.random.default_rng(seed).integers(len(found), size=(RESAMPLES, len(found)))
    return Interval(float(np.median(found)), *_ends(np.median(found[draws], axis=1)))


def _ends(resampled: Any) -> tuple[float, float]:
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(resampled, (tail, 1.0 - tail))
    return float(low), float(high)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of the values do not exceed."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the known values; None without any."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def divided(above: float | None, below: float | None) -> float | None:
    """Return a quotient; None where one side is unknown or there is nothing to divide by."""
    return above / below if above is not None and below else None


def rounded(value: float | None) -> float | None:
    """Return a figure as result files have it: four decimals at most."""
    if value is None:
        return None
    short = round(float(value), 4)
    return int(short) if short.is_integer() else short


def wilson(count: int, of: int) -> Interval | None:
    """Return the share ``count / of`` with its 95 % interval after Wilson (1927); None of nothing.

    Unlike the normal approximation it says something where nothing, or everything, was counted.
    """
    if not of:
        return None
    share, square = count / of, statistics.NormalDist().inv_cdf((1.0 + CONFIDENCE) / 2.0) ** 2 / of
    middle = (share + square / 2.0) / (1.0 + square)
    half = (square * (share * (1.0 - share) + square / 4.0)) ** 0.5 / (1.0 + square)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def is_more_often(more: int, less: int) -> bool:
    """Whether something happens more often in one arm than in another, by McNemar's exact test (1947), one-sided.

    Args:
        more: Pairs in which it happened in the first arm alone.
        less: In the second alone.
    """
    discordant = more + less
    cases = sum(comb(discordant, count) for count in range(more, discordant + 1))
    return cases < (1.0 - CONFIDENCE) * 2.0**discordant
