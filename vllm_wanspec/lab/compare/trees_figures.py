"""The tree bench's figures: increases of counters, times per token, paired ratios with intervals.

Plain values and sums: no servers, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_wanspec.lab.compare.trees_setup import Arm
from vllm_wanspec.lab.harness.counters import COUNTERS, Counters
from vllm_wanspec.lab.stats import Interval, Timed, divided, paired_ratio, rounded, total

__all__ = ["ArmFigures", "Row", "arm_figures"]


ROW_COLUMNS = ("prompt", "repeat", "arm", "time_ms", "timed_tokens", "elapsed_s", *COUNTERS)


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
        return divided(self.counters.get("committed_tokens"), self.counters.get("steps"))

    @property
    def running_branches(self) -> float | None:
        """Branches that ran on the drafter at a time, on average over the requests' duration.

        What still runs when the last token is out counts in the numerator, until word of the end has crossed the WAN.
        """
        return divided(self.counters.get("branch_seconds"), self.elapsed_s)

    @property
    def bytes_per_accepted_token(self) -> float | None:
        """Bytes on the link, both ways, per accepted draft token."""
        received, sent = self.counters.get("received_bytes"), self.counters.get("sent_bytes")
        committed, steps = self.counters.get("committed_tokens"), self.counters.get("steps")
        if received is None or sent is None or committed is None or steps is None:
            return None
        return divided(received + sent, committed - steps)

    def share(self, entropy: str, outcome: str) -> float | None:
        """Return the share of an outcome among the positions of one entropy range."""
        counts = self.counters.outcomes(entropy)
        return divided(counts[outcome], sum(counts.values()))

    def share_of_misses(self, entropy: str | None, outcome: str) -> float | None:
        """Return the share of an outcome among the positions where the draft model's best token was wrong.

        Args:
            entropy: One entropy range; None takes all.
            outcome: One of the outcomes except ``agreed``.
        """
        ranges = self.counters.ranges() if entropy is None else [entropy]
        counts = [self.counters.outcomes(one) for one in ranges]
        misses = sum(sum(one.values()) - one["agreed"] for one in counts)
        return divided(sum(one[outcome] for one in counts), misses)

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
        timed=total(times.values()),
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
        sums[row.prompt] = total((sums.get(row.prompt, Timed(0.0, 0)), row.timed))
    return sums
