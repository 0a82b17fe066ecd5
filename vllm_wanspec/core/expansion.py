"""Where the drafter drafts next, and what a distribution tells about it.

The rule of this version: extend the most probable continuation, up to the session's lookahead beyond the last commit.
"""

from collections.abc import Iterable
from math import ceil, exp

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
        least = min(least, logprob)
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


def main_line_tip(tree: DraftTree) -> Node:
    """The end of the most probable continuation: the node to extend."""
    node = tree.cursor
    while node.best is not None:
        node = node.best
    return node
