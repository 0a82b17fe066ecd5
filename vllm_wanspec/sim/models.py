"""The invented pair of models: a target and a draft model over one language, which nobody had to train.

Everything follows from a hash of the last three tokens, so that two processes agree on it without a word. How sure
the draft model is, and how often the target agrees, are drawn as from real pairs, and the draft model is calibrated:
a token that it gives probability p is the target's in a share p of such positions.

A language never changes once it is made: sessions, engines, threads and processes may share one or make their own.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from random import Random
from typing import NamedTuple

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.messages import vocabulary_fingerprint
from vllm_wanspec.core.policy.expansion import entropy_nats

__all__ = ["STANDARD", "TAIL", "TOP_K", "Language", "Profile", "RandomTokens", "tail"]

TOP_K = 8
TAIL = 3
"""Tokens at the end of a context on which everything depends; a shorter context has zeros before it."""
LEAST_AGREEMENT = 0.3
"""Below it the draft model's best token would not be its most probable one."""

_SHAPES = 1024
_LUCK = 1 << 20
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Profile:
    """How sure the draft model is, over all positions; the standard one is that of real pairs.

    Attributes:
        sure_share: Positions whose entropy is below 1 nat in the standard profile.
        sure: From and to: the probability of the draft model's best token at those positions...
        unsure: ...and at the others.
        misses: Where the target's token is when it is not the best one: shares of the next seven ranks; the rest is
            beyond them.
    """

    sure_share: float = 0.6
    sure: tuple[float, float] = (0.82, 0.999)
    unsure: tuple[float, float] = (0.30, 0.74)
    misses: tuple[float, ...] = (0.36, 0.18, 0.11, 0.05, 0.03, 0.02, 0.01)

    @classmethod
    def agreeing(cls, agreement: float) -> Profile:
        """The profile of a pair whose models agree at this share of all positions.

        Sure and unsure positions are mixed for it; beyond what a mixture gives, the draft model's probabilities are
        shifted as well.

        Raises:
            ValueError: No pair agrees like that.
        """
        if not LEAST_AGREEMENT <= agreement < 1.0:
            raise ValueError(f"agreement must be from {LEAST_AGREEMENT} to below 1, not {agreement}")
        standard = STANDARD
        least, most = sum(standard.unsure) / 2, sum(standard.sure) / 2
        if agreement < least:
            low, high = standard.unsure
            return cls(sure_share=0.0, unsure=(low * agreement / least, high * agreement / least))
        if agreement > most:
            low, high = standard.sure
            left = (1.0 - agreement) / (1.0 - most)
            return cls(sure_share=1.0, sure=(1.0 - left * (1.0 - low), 1.0 - left * (1.0 - high)))
        return cls(sure_share=(agreement - least) / (most - least))

    def logprobs(self, share: float) -> tuple[float, ...]:
        """Of the eight best tokens, for a position at this share of all positions by certainty."""
        if share < self.sure_share:
            (low, high), place = self.sure, share / self.sure_share
        else:
            (low, high), place = self.unsure, (share - self.sure_share) / (1.0 - self.sure_share)
        best = low + place * (high - low)
        # The next one may not be more probable than the best, however unsure the draft model is.
        first = min(self.misses[0] * (1.0 - best), 0.9 * best)
        return tuple(math.log(p) for p in (best, first, *((1.0 - best) * part for part in self.misses[1:])))


STANDARD = Profile()


class Language:
    """Target and draft model over ``vocab_size`` tokens; a context is any sequence of them that is not empty."""

    def __init__(self, seed: int = 0, vocab_size: int = 1 << 17, profile: Profile = STANDARD) -> None:
        """Choose the language by its ``seed``, and what the models know of it by their ``profile``.

        Raises:
            ValueError: The vocabulary's size is not a power of two, or too small for the draft model's ranks.
        """
        if vocab_size & (vocab_size - 1) or vocab_size < 4 * TOP_K:
            raise ValueError(f"vocab_size must be a power of two of at least {4 * TOP_K}, not {vocab_size}")
        self.vocab_size = vocab_size
        self._last = vocab_size - 1
        self._seed = seed * 0x9E3779B97F4A7C15 + 0x1234567
        self._logprobs, self._entropies, self._limits = _tables(profile)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token texts and ids, as a tokenizer has them."""
        return {f"t{index}": index for index in range(self.vocab_size)}

    @cached_property
    def fingerprint(self) -> str:
        """The vocabulary's; languages of the same size share it."""
        return vocabulary_fingerprint(self.vocabulary)

    def target(self, context: Sequence[int]) -> int:
        """The target's greedy token after ``context``."""
        value = self._hash(context)
        return self._ranked(value, bisect_right(self._limits[value % _SHAPES], value >> 44))

    def draft(self, context: Sequence[int]) -> int:
        """The draft model's greedy token after ``context``."""
        return self._ranked(self._hash(context), 0)

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
        known = tail(context)
        for guess in draft:
            known.append(self.target(known))
            if guess != known[-1]:
                return known[TAIL:]
        return [*known[TAIL:], self.target(known)]

    def continuation(self, context: Sequence[int], count: int) -> list[int]:
        """The target's own greedy tokens after ``context``."""
        return _extended(self.target, context, count)

    def drafted(self, context: Sequence[int], count: int) -> list[int]:
        """The draft model's own greedy tokens after ``context``."""
        return _extended(self.draft, context, count)

    def prompt(self, number: int, length: int) -> list[int]:
        """The prompt of a request: ``length`` tokens that no other number's prompt shares."""
        last = self._last
        return [(number * 7919 + index * 104729 + (number ^ index) * 31) & last for index in range(length)]

    def _ranked(self, value: int, rank: int) -> int:
        """The token of a rank: an odd stride never meets the same token twice below the vocabulary's size."""
        return ((value >> 10) + rank * ((value >> 27) | 1)) & self._last

    def _hash(self, context: Sequence[int]) -> int:
        """64 bits: 10 choose the shape, 17 the best token, 17 the stride (with the rest), the last 20 are luck."""
        try:
            value = self._seed ^ (context[-1] * 0xBF58476D1CE4E5B9 + context[-2] * 0x94D049BB133111EB)
            value = ((value ^ (value >> 29)) + context[-3] * 0xD6E8FEB86659FD93) & _MASK
        except IndexError:
            return self._hash(tail(context))
        value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
        value = ((value ^ (value >> 29)) * 0xBF58476D1CE4E5B9) & _MASK
        return value ^ (value >> 32)


class RandomTokens:
    """A draft model that knows nothing and is sure of it: each guess is drawn from the whole vocabulary.

    Whoever has it drafts with it alone: its answers follow from its seed and from how often it was asked.
    """

    ALTERNATIVES = 3
    SURE, UNSURE = math.log(0.7), math.log(0.1)
    ENTROPY_NATS = 0.94

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        """Draw ids below ``vocab_size``, at least four of them."""
        self._ids = range(vocab_size)
        self._rng = Random(seed)

    def step(self, context: Sequence[int]) -> DraftStep:
        """One token and three alternatives, whatever the context."""
        token, *others = self._rng.sample(self._ids, 1 + self.ALTERNATIVES)
        return DraftStep(token, self.SURE, self.ENTROPY_NATS, tuple((other, self.UNSURE) for other in others))


def tail(context: Sequence[int]) -> list[int]:
    """As much of a context as counts for what follows."""
    known = list(context[-TAIL:])
    return [0] * (TAIL - len(known)) + known


def _extended(model: Callable[[Sequence[int]], int], context: Sequence[int], count: int) -> list[int]:
    known = tail(context)
    for _ in range(count):
        known.append(model(known))
    return known[TAIL:]


class _Tables(NamedTuple):
    """By shape of position. Luck below the first limit means the best token, below the second the next one..."""

    logprobs: list[tuple[float, ...]]
    entropies: list[float]
    limits: list[list[int]]


@lru_cache(maxsize=64)
def _tables(profile: Profile) -> _Tables:
    logprobs = [profile.logprobs(index / _SHAPES) for index in range(_SHAPES)]
    limits = [list(accumulate(round(_LUCK * math.exp(logprob)) for logprob in position)) for position in logprobs]
    return _Tables(logprobs, [entropy_nats(position) for position in logprobs], limits)
