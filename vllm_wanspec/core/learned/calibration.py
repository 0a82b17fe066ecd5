"""What the draft model's figures are worth: measured against what the target committed.

A small draft model is underconfident, and how much so depends on the pair. `Calibration` counts, per range of draft
probability, how often the target took such a token, and, per range of entropy, how often it took the most probable one.
"""

from bisect import bisect_right
from collections.abc import Iterator
from math import inf, log, sqrt

PROBABILITY_EDGES = (0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
ENTROPY_EDGES_NATS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
OUTCOMES = ("agreed", "branch", "leaf", "outside")
"""What the target committed where a draft distribution was known: the most probable token, one whose branch was already
extended, one that was in the tree as a leaf only, or one that was not in the tree."""
PRIOR_WEIGHT = 16.0
MEMORY = 4096.0
"""Observations per range after which all older ones count half."""
MISS_WORTH_A_BRANCH = 0.1
ADAPTIVE_DEFAULT_NATS = 1.0
MIN_OBSERVATIONS = 50
ASSUMED_AGREEMENT = 0.7

LOG_EDGES = tuple(log(edge) for edge in PROBABILITY_EDGES)
RANGES = len(PROBABILITY_EDGES) + 1


class Calibration:
    """Counts of what was drafted and taken; one object serves all sessions of one draft model at one target.

    Attributes:
        probability: Per bucket the chance in (0, 1) that the target takes a token of that bucket.
        log_probability: Their natural logarithms.
        outcomes: Per entropy range (see `entropy_ranges`) the counts of `OUTCOMES`.
    """

    def __init__(self) -> None:
        """Start by believing the draft model."""
        prior = [_middle(index) for index in range(RANGES)] * 2
        self._seen = [PRIOR_WEIGHT] * len(prior)
        self._taken = [PRIOR_WEIGHT * p for p in prior]
        self.probability = prior
        self.log_probability = [log(p) for p in prior]
        self.outcomes = [[0] * len(OUTCOMES) for _ in range(len(ENTROPY_EDGES_NATS) + 1)]

    def bucket(self, logprob: float, *, best: bool) -> int:
        """The range that a token's log-probability falls into; the most probable token has ranges of its own."""
        return bisect_right(LOG_EDGES, logprob) + (0 if best else RANGES)

    def saw(self, bucket: int, taken: bool) -> None:
        """Count one token of which it is now known whether the target took it."""
        if self._seen[bucket] >= MEMORY:
            self._seen[bucket] *= 0.5
            self._taken[bucket] *= 0.5
        self._seen[bucket] += 1.0
        self._taken[bucket] += taken
        # Never 0 or 1: what comes below must keep a finite, non-zero path probability.
        probability = min(0.999, max(1e-4, self._taken[bucket] / self._seen[bucket]))
        self.probability[bucket] = probability
        self.log_probability[bucket] = log(probability)

    def saw_outcome(self, entropy_nats: float, outcome: int) -> None:
        """Count what became of one drafted distribution; ``outcome`` is an index into `OUTCOMES`."""
        self.outcomes[bisect_right(ENTROPY_EDGES_NATS, entropy_nats)][outcome] += 1

    def agreement(self) -> float:
        """How often the target took the most probable token, over everything seen; 0.7 before that."""
        total = sum(map(sum, self.outcomes))
        return sum(counts[0] for counts in self.outcomes) / total if total else ASSUMED_AGREEMENT

    def entropy_threshold_nats(self) -> float:
        """The adaptive threshold: the lowest entropy from which on the target often takes another token.

        That is the lower edge of the lowest range in which at least `MISS_WORTH_A_BRANCH` of the drafts missed; ranges
        with fewer than `MIN_OBSERVATIONS` do not count, and without any the threshold is `ADAPTIVE_DEFAULT_NATS`.
        (Own derivation: below it a branch would be wasted nine times out of ten.)
        """
        known = False
        for index, counts in enumerate(self.outcomes):
            total = sum(counts)
            if total < MIN_OBSERVATIONS:
                continue
            known = True
            if total - counts[0] >= MISS_WORTH_A_BRANCH * total:
                return entropy_range(index)[0]
        return inf if known else ADAPTIVE_DEFAULT_NATS


def entropy_range(index: int) -> tuple[float, float]:
    """Lower and upper edge in nats of one entropy range."""
    edges = (0.0, *ENTROPY_EDGES_NATS, inf)
    return edges[index], edges[index + 1]


def entropy_ranges() -> Iterator[str]:
    """Names of the entropy ranges, such as ``0.5-1``, rising."""
    for index in range(len(ENTROPY_EDGES_NATS) + 1):
        low, high = entropy_range(index)
        yield f"{low:g}-{high:g}"


def _middle(index: int) -> float:
    """A probability inside a range, to begin with: its geometric middle."""
    low = PROBABILITY_EDGES[index - 1] if index else 0.0005
    high = PROBABILITY_EDGES[index] if index < len(PROBABILITY_EDGES) else 0.999
    return sqrt(low * high)
