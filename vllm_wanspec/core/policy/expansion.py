"""Where the drafter drafts next, and what a distribution tells about it.

The main line, the most probable continuation, is always extended. Where the draft model is unsure (entropy at or above
a threshold) the next most probable tokens become candidates for branches, which are started in order of calibrated path
probability while there is room.
"""

import heapq
from collections.abc import Generator, Iterable
from itertools import islice
from math import ceil, exp, inf, log

from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.messages import Limits
from vllm_wanspec.core.tree import DraftTree, Node

LOOKAHEAD_SLACK = 4
"""Tokens of lookahead kept for renewing an engine request off the critical path."""


def entropy_nats(logprobs: Iterable[float]) -> float:
    """Entropy of a distribution known by its k most probable tokens.

    Args:
        logprobs: Natural log-probabilities of the k most probable tokens.

    Returns:
        ``-sum p ln p`` over them plus a lower bound for the tail: no tail token is more probable than the last known
        one, so the tail's mass m contributes at least ``-m ln p_k``. Never above the true entropy. (Own derivation.)
    """
    total = 0.0
    mass = 0.0
    least = 0.0
    for logprob in logprobs:
        p = exp(logprob)
        total -= p * logprob
        mass += p
        if logprob < least:
            least = logprob
    return max(0.0, total - max(0.0, 1.0 - mass) * least)


def lookahead_tokens(rtt_s: float, step_s: float, speculation_length: int) -> int:
    """Tokens to draft beyond the last commit so that a lucky run never starves: the design's ``auto``.

    While one round trip passes the target takes ``ceil(R / t_v)`` steps of up to ``speculation_length + 1`` tokens,
    and the step after them wants a full draft.

    Args:
        rtt_s: Measured round trip R in seconds.
        step_s: Measured time of one target step t_v in seconds, > 0.
        speculation_length: Most tokens verified per step.
    """
    steps = max(1, ceil(rtt_s / step_s))
    return steps * (speculation_length + 1) + speculation_length + LOOKAHEAD_SLACK


def branching_tokens(
    alternatives: Iterable[tuple[int, float]], entropy: float, limits: Limits, calibration: Calibration
) -> tuple[list[tuple[int, float]], int]:
    """Which alternatives of one position are sent, and how many of them become candidates for branches.

    Args:
        alternatives: Token ids with their log-probabilities, most probable first, without the most probable token.
        entropy: Of their distribution, in nats.
        limits: The session's.
        calibration: Gives the threshold where it is adaptive.

    Returns:
        ``leaves - 1`` of them at least, where there are so many; and of the first of those at most ``max_branches - 1``
        that are probable enough, none below the threshold.
    """
    threshold = limits.entropy_threshold_nats
    if threshold is None:
        threshold = calibration.entropy_threshold_nats()
    branching = 0 if entropy < threshold else limits.max_branches - 1
    wanted = max(branching, limits.leaves - 1)
    if not wanted:
        return [], 0
    least = log(limits.min_probability) if limits.min_probability > 0.0 else -inf
    ranked = list(islice(alternatives, wanted))
    probable = sum(logprob >= least for _, logprob in ranked[:branching])
    return ranked[: max(probable, limits.leaves - 1)], probable


class Candidates:
    """Leaves that may be extended, in order of path probability."""

    def __init__(self, min_probability: float) -> None:
        """Start without any; those less probable than ``min_probability`` wait until commits make them more so."""
        self._least = log(min_probability) if min_probability > 0.0 else -inf
        self._heap: list[tuple[float, int, Node]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, node: Node) -> None:
        """Take one more leaf."""
        heapq.heappush(self._heap, (-node.reach, node.id, node))

    def take(self, tree: DraftTree, farthest: int) -> Generator[Node, None, None]:
        """Give the live leaves one after the other, most probable first; what is not taken stays.

        Args:
            tree: Where they are, or were: what has been dropped or extended meanwhile is forgotten.
            farthest: Leaves at or beyond this position are kept for later.
        """
        least = tree.cursor.reach + self._least
        later: list[tuple[float, int, Node]] = []
        try:
            while self._heap and -self._heap[0][0] >= least:
                item = heapq.heappop(self._heap)
                node = item[2]
                if node not in tree or node.children or node is tree.cursor:
                    continue
                if node.position >= farthest:
                    later.append(item)
                    continue
                yield node
        finally:
            for item in later:
                heapq.heappush(self._heap, item)

    def forget(self, tree: DraftTree) -> None:
        """Free what has been dropped from the tree."""
        self._heap = [item for item in self._heap if item[2] in tree]
        heapq.heapify(self._heap)
