"""What trees buy: tree arms against their baseline and against the target alone, and what became of misses.

Plain values and sums: no servers, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_wanspec.lab.compare.arms import Arm
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.rows import Row, make_row, paired, times
from vllm_wanspec.lab.harness.counters import COUNTERS, Counters
from vllm_wanspec.lab.records import Batch
from vllm_wanspec.lab.stats import Interval, Timed, rounded

MAIN_LINE = "main-line"
DEFAULT_ARM = "default"
#: What redundancy has to buy: time per token of the default arm divided by the main line's alone …
MAX_RATIO = 0.93
#: … with this many prompts at least.
MIN_PROMPTS = 32
NEAR_FASTEST = 1.01
#: What serves all arms, in logs and result files.
TARGET = "wanspec"


class ArmFigures(NamedTuple):
    """What one arm did with all prompts; its time per token ÷ the baseline's, and ÷ that of the target alone."""

    arm: Arm
    row: Row
    ratio: Interval | None
    plain_ratio: Interval | None

    def as_json(self) -> dict[str, Any]:
        """Return the arm's entry in the result file."""
        row, counters = self.row, self.row.counters
        known = {name: counters.values[name] for name in COUNTERS if name in counters.values}
        return {
            "name": self.arm.name,
            "override": self.arm.override,
            "timed_tokens": row.tokens,
            "time_per_token_ms": rounded(row.tpot_ms),
            "median_time_per_token_ms": rounded(row.median_tpot_ms),
            "ratio_to_baseline": self.ratio and self.ratio.as_json(),
            "ratio_to_off": self.plain_ratio and self.plain_ratio.as_json(),
            "tokens_per_step": rounded(row.committed_per_step),
            "mean_running_branches": rounded(row.running_branches),
            "bytes_per_accepted_token": rounded(row.bytes_per_accepted_token),
            "branch_share_of_misses": rounded(counters.share_of_misses(None, "branch")),
            "elapsed_s": rounded(row.busy_s),
            "counters": Counters(known, counters.positions).as_json(),
        }


@dataclass(frozen=True, slots=True)
class TreesFigures:
    """All arms' figures, judged.

    Attributes:
        result: What the run found.
        baseline: Name of the arm that the others are divided by.
        batches: The requests of complete rounds: of a prompt that has been through all arms.
        arms: In the order in which they were given; empty before the first complete round.
    """

    result: Result
    baseline: str
    batches: Sequence[Batch]
    arms: Sequence[ArmFigures]

    @property
    def measured_prompts(self) -> int:
        """Prompts with at least one complete round."""
        return len({batch.requests[0].prompt for batch in self.batches})

    @property
    def short_prompts(self) -> int:
        """Prompts that were dropped because their plain text ends or repeats itself too early."""
        return len(self.result.taken) - len(self.result.references)

    @property
    def is_valid(self) -> bool:
        """Whether the figures say anything; of the servers' paces the target's counts."""
        return not self.faults

    @property
    def faults(self) -> list[str]:
        """Why they do not."""
        return self.result.faults([TARGET])

    @property
    def shown(self) -> ArmFigures:
        """The arm that a table of its own is about."""
        return next((one for one in self.arms if one.arm.name == DEFAULT_ARM), self.arms[-1])

    @property
    def held(self) -> bool | None:
        """Whether trees buy what they have to; None where this run cannot tell."""
        default = next((one for one in self.arms if one.arm.name == DEFAULT_ARM), None)
        if default is None or default.ratio is None or self.baseline != MAIN_LINE:
            return None
        sound = self.result.ended_by is None and self.is_valid and not self.result.wrong
        return default.ratio.value <= MAX_RATIO if sound and self.measured_prompts >= MIN_PROMPTS else None

    @property
    def frugal(self) -> ArmFigures | None:
        """Of the arms within 1 % of the fastest one, that which has the draft model compute the fewest tokens."""
        known = [
            (pace, cost, place)
            for place, one in enumerate(self.arms)
            if one.arm.drafts
            and (pace := one.row.tpot_ms) is not None
            and (cost := one.row.counters.get("drafted_tokens")) is not None
        ]
        if not known:
            return None
        fastest = min(known)[0]
        return self.arms[min((cost, place) for pace, cost, place in known if pace <= fastest * NEAR_FASTEST)[1]]

    @property
    def entropy_ranges(self) -> list[str]:
        """Entropy ranges that any arm has positions in, rising."""
        return Counters.total(one.row.counters for one in self.arms).ranges()


def trees_figures(result: Result, baseline: str) -> TreesFigures:
    """Gather the figures of a run whose arms are tree arms.

    Args:
        result: What the run found.
        baseline: Name of the arm to divide by.
    """
    complete = _complete(result)
    own = {arm.name: [batch for batch in complete if batch.cell.arm == arm.name] for arm in result.options.arms}
    alone = {one.index: Timed(one.time_ms, len(one.expected) - 1) for one in result.references}
    seed, below = result.options.seed, times(own[baseline])
    found = []
    for arm in result.options.arms if complete else ():
        batches, timed = own[arm.name], times(own[arm.name])
        row = make_row(result, batches[0].cell, {batches[0].cell: batches})
        plain_ratio = paired(timed, {key: alone[key[0]] for key in timed if key[0] in alone}, seed)
        found.append(ArmFigures(arm, row, paired(timed, below, seed), plain_ratio))
    return TreesFigures(result, baseline, complete, found)


def _complete(result: Result) -> list[Batch]:
    """The batches of complete rounds, by repeat, prompt and arm."""
    names = [arm.name for arm in result.options.arms]
    rounds: dict[tuple[int, int], dict[str, Batch]] = {}
    for batch in result.batches:
        rounds.setdefault((batch.repeat, batch.requests[0].prompt), {})[batch.cell.arm] = batch
    whole = [made for _, made in sorted(rounds.items()) if len(made) == len(names)]
    return [made[name] for made in whole for name in names]
