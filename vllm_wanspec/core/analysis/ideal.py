"""The best that each kind of decoding could do on a text: what a measured time per token is held against.

Computed from recorded input alone: the prompt, the target's own tokens, and at each of these its place among the draft
model's eight most probable ones. Forwards take their time and messages half a round trip; nothing else costs any time.
All figures are milliseconds from a text's first token to its last. (Own derivation.)

All kinds share these rules:

- A step begins when the one before ends; it is never held back for drafts that are about to arrive.
- It verifies every draft that it is offered, right or wrong, and all that have arrived are offered, up to the limit;
  only where they reach the text's end are they cut there.
- With prompt lookup an oracle knows how many drafts are right. It takes what the draft model gave and what lookup goes
  on with, or lookup alone if that has more right tokens; of equal ones what costs less. Lookup after a wrong draft is
  in vain, and, since the wrong token is not on record, counts nothing.

These are the live system's length policy `fixed` and late policy `none`. Where drafts cost the target nothing and
without lookup, no drafter of the same paces is faster under them, a longer round trip takes at least as long, and so
does a narrower tree; where drafts cost something, wrong ones that come too late are cheaper. A run that holds a step
back for drafts that prove right, or leaves out one that proves wrong, is outside the rules and can be faster by some
per cent. With lookup the oracle looks one step ahead: rarely a step with fewer right tokens ends where lookup then
finds more. Lookup makes no text slower but by what its wrong tokens cost the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple, Protocol

from vllm_wanspec.core.policy.lookup import Text

StepTime = Callable[[int], float]
"""Milliseconds that a forward over so many tokens takes."""


class Offer(NamedTuple):
    """What a step may verify: so many ``tokens``, of which the first ``right`` ones are the target's own."""

    tokens: int
    right: int


class TextLookup:
    """What prompt lookup gives at each place of a text, sought once, by the code that runs live."""

    def __init__(self, prompt_ids: Sequence[int], expected: Sequence[int]) -> None:
        """Seek everywhere.

        Args:
            prompt_ids: Token ids of the prompt.
            expected: The target's own, after it.
        """
        text = Text()
        text.append(prompt_ids)
        self._found: list[Offer] = []
        for index, token in enumerate(expected):
            _, guess = text.continuation(text.length)
            self._found.append(_judged(guess, expected[index:]))
            text.append((token,))

    def __len__(self) -> int:
        return len(self._found)

    def at(self, index: int, limit: int) -> Offer:
        """At most ``limit`` tokens for the text from token ``index`` on, when those before are known."""
        found = self._found[index]
        return Offer(min(found.tokens, limit), min(found.right, limit))


@dataclass(frozen=True, slots=True)
class Width:
    """How much of a tree a drafter extends; None: no bound.

    Attributes:
        alternatives: Most probable tokens followed at a position, the most probable one included.
        running: Branches in one forward, which takes as long as that many tokens; None: as one. A drafter with fewer
            to extend is faster at that moment, so that no run can beat None.
        depth: Tokens that a side branch is extended by, the one that leaves the main line not counted.
    """

    alternatives: int | None = None
    running: int | None = None
    depth: int | None = None


UNLIMITED = Width()


def ideal_decode_ms(
    ranks: Sequence[int | None],
    prompt_tokens: int,
    *,
    rtt_ms: float,
    target_ms: StepTime,
    draft_ms: StepTime,
    limit: int,
    lookup: TextLookup | None = None,
    width: Width = UNLIMITED,
) -> float:
    """Milliseconds of a text with a drafter across the WAN.

    The drafter has the distribution of a token one forward after it knows the token before. It knows a token as soon as
    that is one of those that it extends, and at the latest one way after it was committed. Without bounds it extends
    every token that has a rank, all in the same forward.

    With ``width`` it extends the first ``alternatives`` tokens of each distribution, those of side branches too: each
    that is not the most probable one begins a branch of its own, at once, however many there are. A branch at token q
    has the distributions of tokens q + 1 to q + depth. Then it rests until the drafter is told that the target went to
    q, one way after its commit: from then on it is the main line, which has no such end. That is what the live drafter
    (`core.drafter`) does at most. What is left out can only make it slower: scarcity of places, the least entropy and
    probability of a branch, the lookahead, the budget of nodes, and the time that it takes to begin a branch.

    Args:
        ranks: For each token of the text its place among the draft model's most probable ones there, 0 for the most
            probable one; None for a token that the drafter does not extend.
        prompt_tokens: Length of the prompt.
        rtt_ms: Round trip between target and drafter.
        target_ms: Duration of a target forward.
        draft_ms: Duration of a draft forward.
        limit: Most drafts per step.
        lookup: Of the same text; None: a target without prompt lookup.
        width: What the drafter extends, and at which pace.
    """
    remote = _Remote(ranks, rtt_ms / 2.0, draft_ms(width.running or 1), width)
    # The drafter gets the prompt when the target begins with it, and the first token is committed at 0.
    remote.open(rtt_ms / 2.0 - target_ms(prompt_tokens) + draft_ms(prompt_tokens))
    return _decode_ms(ranks, remote, target_ms, limit, lookup)


def colocated_decode_ms(
    ranks: Sequence[int | None],
    *,
    gamma: int,
    target_ms: StepTime,
    draft_ms: StepTime,
    limit: int,
    lookup: TextLookup | None = None,
) -> float:
    """Milliseconds of a text with the draft model beside the target: ``gamma`` forwards of it before each step.

    Each counts as one token, the least. vLLM's first one after a step goes over all tokens of that step, rejected ones
    included, and the new one (0.32, `set_inputs_first_pass`): up to ``gamma + 2``.

    Args:
        ranks: As for `ideal_decode_ms`; what counts is whether they are 0.
        gamma: Drafts per step.
        target_ms: Duration of a target forward.
        draft_ms: Duration of a draft forward.
        limit: Most drafts per step, lookup's included.
        lookup: Of the same text; None: a target without prompt lookup.
    """
    return _decode_ms(ranks, _Beside(gamma, gamma * draft_ms(1)), target_ms, limit, lookup)


def lookup_decode_ms(lookup: TextLookup, *, target_ms: StepTime, limit: int) -> float:
    """Milliseconds of a text with prompt lookup alone, at most ``limit`` tokens per step."""
    return _decode_ms((None,) * len(lookup), _Beside(0), target_ms, limit, lookup)


def oracle_decode_ms(tokens: int, *, target_ms: StepTime, limit: int) -> float:
    """Milliseconds of a text of ``tokens`` tokens when each step has ``limit`` drafts, all right, for nothing."""
    return _decode_ms((0,) * tokens, _Beside(limit), target_ms, limit)


def plain_decode_ms(tokens: int, *, target_ms: StepTime) -> float:
    """Milliseconds of a text of ``tokens`` tokens, decoded one by one."""
    return max(0, tokens - 1) * target_ms(1)


class _Drafts(Protocol):
    """Where the draft model's tokens come from."""

    @property
    def step_ms(self) -> float:
        """What they cost the target's side before each step."""

    def there(self, now_ms: float, limit: int) -> int:
        """How many tokens of the draft model's best continuation of what is committed are there, at most ``limit``."""

    def commit(self, begin: int, end: int, now_ms: float) -> None:
        """Tokens ``begin`` to ``end - 1`` are committed."""


class _Beside:
    """Drafts that are made on the target's side, the same number before each step."""

    def __init__(self, number: int, step_ms: float = 0.0) -> None:
        self._number = number
        self.step_ms = step_ms

    def there(self, now_ms: float, limit: int) -> int:
        return min(self._number, limit)

    def commit(self, begin: int, end: int, now_ms: float) -> None:
        pass


class _Remote:
    """The drafter across the WAN: when it has the distribution of each token."""

    step_ms = 0.0

    def __init__(self, ranks: Sequence[int | None], one_way_ms: float, forward_ms: float, width: Width) -> None:
        self._ranks = ranks
        self._one_way_ms = one_way_ms
        self._forward_ms = forward_ms
        self._alternatives = inf if width.alternatives is None else width.alternatives
        self._depth = inf if width.depth is None else width.depth
        self._next = 0  # the first token that is not committed
        self._next_ms = inf  # when its distribution is drafted
        self._branch_end = inf  # the last token that the branch gets by which the text last left the main line
        self._followed_ms = 0.0  # when the drafter hears that the target went there

    def open(self, first_ms: float) -> None:
        """The first token's distribution is drafted at ``first_ms``, the token itself committed at 0."""
        self._next_ms = first_ms
        self.commit(0, 1, 0.0)

    def there(self, now_ms: float, limit: int) -> int:
        count, drafted_ms = 0, self._next_ms
        while count < limit and drafted_ms + self._one_way_ms <= now_ms:
            count += 1
            drafted_ms = self._drafted_ms(self._next + count, drafted_ms)
        return count

    def commit(self, begin: int, end: int, now_ms: float) -> None:
        told_ms = now_ms + self._one_way_ms
        for index in range(begin, end):
            rank = self._ranks[index]
            known_ms = told_ms
            if rank is not None and rank < self._alternatives:
                known_ms = min(self._next_ms, told_ms)
                if rank > 0:
                    self._branch_end, self._followed_ms = index + self._depth, told_ms
            self._next_ms = self._drafted_ms(index + 1, known_ms)
        self._next = end

    def _drafted_ms(self, index: int, known_ms: float) -> float:
        """When the distribution of token ``index`` is drafted if the one before is known at ``known_ms``."""
        if index > self._branch_end:
            known_ms = max(known_ms, self._followed_ms)
        return known_ms + self._forward_ms


def _decode_ms(
    ranks: Sequence[int | None], drafts: _Drafts, target_ms: StepTime, limit: int, lookup: TextLookup | None = None
) -> float:
    if lookup is not None and len(lookup) != len(ranks):
        raise ValueError(f"lookup is of a text of {len(lookup)} tokens, ranks are of {len(ranks)}")
    now_ms, begin = 0.0, 1
    while begin < len(ranks):
        now_ms += drafts.step_ms
        offer = _offer(ranks, begin, drafts.there(now_ms, limit), limit, lookup)
        now_ms += target_ms(1 + offer.tokens)
        end = min(begin + offer.right + 1, len(ranks))
        drafts.commit(begin, end, now_ms)
        begin = end
    return now_ms


def _offer(ranks: Sequence[int | None], begin: int, drafted: int, limit: int, lookup: TextLookup | None) -> Offer:
    """What the step from token ``begin`` on verifies when ``drafted`` tokens of the draft model are there."""
    left = len(ranks) - begin
    right = 0
    while right < min(drafted, left) and ranks[begin + right] == 0:
        right += 1
    offer = Offer(right if right == left else drafted, right)
    if lookup is None:
        return offer
    if right == drafted < left:
        more = lookup.at(begin + right, limit - drafted)
        offer = Offer(drafted + more.tokens, right + more.right)
    alone = lookup.at(begin, limit)
    return max(offer, alone, key=lambda one: (one.right, -one.tokens))


def _judged(guess: Sequence[int], expected: Sequence[int]) -> Offer:
    """A guess, held against the text that follows; cut where that ends."""
    right = 0
    for guessed, token in zip(guess, expected, strict=False):
        if guessed != token:
            break
        right += 1
    return Offer(right if right == len(expected) else len(guess), right)
