"""A made-up language with a target and a draft model: what benches decode that measure our own code alone.

Everything follows from a hash of the last three tokens, so that two processes agree on it without a word. How sure
the draft model is, and how often the target agrees, are drawn as from real pairs, and the draft model is calibrated:
a token that it gives probability p is the target's in a share p of such positions.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.policy.expansion import entropy_nats

__all__ = ["TAIL", "TOP_K", "Language"]

TOP_K = 8
TAIL = 3
"""Tokens at the end of a context on which everything depends."""
SURE_SHARE = 0.6
SURE_RANGE = (0.82, 0.999)
UNSURE_RANGE = (0.30, 0.74)
"""Probability of the draft model's best token where its entropy is below 1 nat, and where it is not."""
MISS_SHARES = (0.36, 0.18, 0.11, 0.05, 0.03, 0.02, 0.01)
"""Where the target's token is when it is not the best one: the next seven ranks; beyond them for the rest."""

_SHAPES = 1024
_LUCK = 1 << 20
_MASK = (1 << 64) - 1


class Language:
    """Target and draft model over ``vocab_size`` tokens (a power of two); contexts have three tokens or more."""

    def __init__(self, seed: int = 0, vocab_size: int = 1 << 17) -> None:
        """Choose the language by its ``seed``."""
        if vocab_size & (vocab_size - 1) or vocab_size < 4 * TOP_K:
            raise ValueError(f"vocab_size must be a power of two of at least {4 * TOP_K}, not {vocab_size}")
        self.vocab_size = vocab_size
        self._last = vocab_size - 1
        self._seed = seed * 0x9E3779B97F4A7C15 + 0x1234567
        self._logprobs = [_shape(index / _SHAPES) for index in range(_SHAPES)]
        self._entropies = [entropy_nats(logprobs) for logprobs in self._logprobs]
        # Luck below the first limit means the best token, below the second the next one, and so on.
        self._limits = [
            list(accumulate(round(_LUCK * math.exp(logprob)) for logprob in logprobs)) for logprobs in self._logprobs
        ]

    def target(self, context: Sequence[int]) -> int:
        """The target's greedy token after ``context``."""
        value = self._hash(context)
        return self._ranked(value, bisect_right(self._limits[value % _SHAPES], value >> 44))

    def step(self, context: Sequence[int]) -> DraftStep:
        """The draft model's greedy token after ``context``, with the eight most probable ones."""
        value = self._hash(context)
        shape = value % _SHAPES
        logprobs = self._logprobs[shape]
        token, stride, last = (value >> 10) & self._last, (value >> 27) | 1, self._last
        others = [((token + rank * stride) & last, logprobs[rank]) for rank in range(1, TOP_K)]
        return DraftStep(token, logprobs[0], self._entropies[shape], tuple(others))

    def verify(self, context: Sequence[int], draft: Sequence[int]) -> list[int]:
        """What one greedy verification step yields: the accepted part of the draft and the target's next token."""
        tail = list(context[-TAIL:])
        for guess in draft:
            tail.append(self.target(tail))
            if guess != tail[-1]:
                return tail[TAIL:]
        return [*tail[TAIL:], self.target(tail)]

    def prompt(self, number: int, length: int) -> list[int]:
        """The prompt of a request: ``length`` tokens that no other number's prompt shares."""
        last = self._last
        return [(number * 7919 + index * 104729 + (number ^ index) * 31) & last for index in range(length)]

    def _ranked(self, value: int, rank: int) -> int:
        """The token of a rank: an odd stride never meets the same token twice below the vocabulary's size."""
        return ((value >> 10) + rank * ((value >> 27) | 1)) & self._last

    def _hash(self, context: Sequence[int]) -> int:
        """64 bits: 10 choose the shape, 17 the best token, 17 the stride (with the rest), the last 20 are luck."""
        value = self._seed ^ (context[-1] * 0xBF58476D1CE4E5B9 + context[-2] * 0x94D049BB133111EB)
        value = ((value ^ (value >> 29)) + context[-3] * 0xD6E8FEB86659FD93) & _MASK
        value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
        value = ((value ^ (value >> 29)) * 0xBF58476D1CE4E5B9) & _MASK
        return value ^ (value >> 32)


def _shape(share: float) -> tuple[float, ...]:
    """Log-probabilities of the eight best tokens, for a position at this share of all positions by certainty."""
    if share < SURE_SHARE:
        (low, high), place = SURE_RANGE, share / SURE_SHARE
    else:
        (low, high), place = UNSURE_RANGE, (share - SURE_SHARE) / (1.0 - SURE_SHARE)
    best = low + place * (high - low)
    # The next one may not be more probable than the best, however unsure the draft model is.
    first = min(MISS_SHARES[0] * (1.0 - best), 0.9 * best)
    return tuple(math.log(p) for p in (best, first, *((1.0 - best) * part for part in MISS_SHARES[1:])))
