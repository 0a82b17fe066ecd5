"""Counters of controllers and drafters: what is read of them, and by how much they have risen.

Plain values and sums: no servers, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm_wanspec.core.learned.calibration import OUTCOMES
from vllm_wanspec.lab.harness.scrape import PREFIX, Sample
from vllm_wanspec.lab.stats import divided, rounded

#: Scraped as ``wanspec_<name>_total`` from the target's metrics port …
CONTROLLER_COUNTERS = (
    "steps",
    "committed_tokens",
    "offered_tokens",
    "accepted_main_line",
    "accepted_branch",
    "accepted_lookup",
    "fallback_tokens",
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
POSITIONS = "wanspec_positions_total"
LABELS = {"entropy", "outcome"}

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Counters:
    """Counters by name, and committed positions by (entropy range, outcome); what nobody serves is absent."""

    values: Mapping[str, float] = field(default_factory=dict)
    positions: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Sequence[Sample], names: Iterable[str], prefix: str = PREFIX) -> Counters:
        """Gather some counters (summed over their labels), and the positions."""
        wanted = {f"{prefix}{name}_total": name for name in names}
        placed = [(labels, value) for name, labels, value in samples if name == POSITIONS and labels.keys() >= LABELS]
        return cls(
            _summed((wanted[name], value) for name, _, value in samples if name in wanted),
            _summed(((labels["entropy"], labels["outcome"]), value) for labels, value in placed),
        )

    @classmethod
    def total(cls, parts: Iterable[Counters]) -> Counters:
        """Add up; what only some parts have counts from those."""
        known = list(parts)
        values = _summed(pair for part in known for pair in part.values.items())
        return cls(values, _summed(pair for part in known for pair in part.positions.items()))

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

    def share(self, entropy: str, outcome: str) -> float | None:
        """Return the share of an outcome among the positions of one entropy range."""
        counts = self.outcomes(entropy)
        return divided(counts[outcome], sum(counts.values()))

    def share_of_misses(self, entropy: str | None, outcome: str) -> float | None:
        """Return the share of an outcome among the positions where the draft model's best token was wrong.

        Args:
            entropy: One entropy range; None takes all.
            outcome: One of the outcomes except ``agreed``.
        """
        counts = [self.outcomes(one) for one in (self.ranges() if entropy is None else [entropy])]
        misses = sum(sum(one.values()) - one["agreed"] for one in counts)
        return divided(sum(one[outcome] for one in counts), misses)

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


def _summed(pairs: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    sums: dict[Key, float] = {}
    for key, value in pairs:
        sums[key] = sums.get(key, 0.0) + value
    return sums
