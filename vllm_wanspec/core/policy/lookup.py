"""Prompt lookup: drafts from the request's own text, for steps that no drafter has served. They cost no forward pass.

The last few tokens are sought earlier in the text, the longest match first and the latest of equal ones; what followed
there is the draft. (Saxena's prompt lookup; how likely a match of a given length is to go on is measured here.)
"""

from array import array
from collections.abc import Sequence

from vllm_wanspec.core.draft import Draft

LENGTHS = (3, 2, 1)
"""Tokens of a match, the most telling first."""
WINDOW_TOKENS = 2048
"""So far back is sought: a bound on the time that it takes on the serving path."""
POOR_DRAFT_TOKENS = 0.5
"""A draft of which fewer tokens can be expected to be taken is held against prompt lookup alone."""
ALL_IDS = 2**31
_WIDTH = array("I").itemsize


class LookupRates:
    """How often the token after a match is what the target takes, per length of the match; shared by all sessions.

    Attributes:
        chance: By length; 0.5 before anything is known, index 0 unused.
    """

    def __init__(self) -> None:
        """Start without measurements."""
        size = max(LENGTHS) + 1
        self._seen = [2.0] * size
        self._right = [1.0] * size
        self.chance = [0.5] * size

    def saw(self, length: int, guess: Sequence[int], taken: Sequence[int]) -> int:
        """Learn from a guess and what the target took; how many tokens of the guess were right."""
        right = 0
        for guessed, token in zip(guess, taken, strict=False):
            self._seen[length] += 1.0
            if guessed != token:
                break
            right += 1
        self._right[length] += right
        self.chance[length] = self._right[length] / self._seen[length]
        return right


class Text:
    """The end of a request's tokens, searchable: as many as are ever sought in, and those that came since.

    Attributes:
        length: Tokens of the request that it knows of.
    """

    __slots__ = ("_bytes", "length")

    def __init__(self) -> None:
        """Begin empty."""
        self._bytes = bytearray()
        self.length = 0

    def append(self, tokens: Sequence[int]) -> None:
        """Add tokens."""
        self._bytes += array("I", tokens).tobytes()
        self.length += len(tokens)

    def follow(self, context: Sequence[int]) -> None:
        """Know a context that has grown since it was followed last."""
        known, size = self.length, len(context)
        self._bytes += array("I", context[max(known, size - WINDOW_TOKENS) :]).tobytes()
        self.length = size

    def continuation(self, limit: int, drafted: Sequence[int] = ()) -> tuple[int, list[int]]:
        """What followed the last tokens when they stood in the text before.

        Args:
            limit: Most tokens.
            drafted: Tokens to be taken for the text's end.

        Returns:
            The length of the match, and at most ``limit`` tokens; 0 and none where nothing matches.
        """
        text = self._bytes
        known = len(text)
        if drafted:
            text += array("I", drafted).tobytes()
        try:
            return self._after_match(text, limit)
        finally:
            del text[known:]

    def _after_match(self, text: bytearray, limit: int) -> tuple[int, list[int]]:
        size = len(text)
        first = max(0, size - _WIDTH * WINDOW_TOKENS)
        for length in LENGTHS:
            width = length * _WIDTH
            if size - first <= width:
                continue
            last, end = text[size - width :], size - 1
            while (place := text.rfind(last, first, end)) % _WIDTH and place > 0:
                end = place + width - 1  # not a token's beginning: on, before it
            if place >= 0 and not place % _WIDTH:
                begin = place + width
                found = array("I", bytes(text[begin : begin + limit * _WIDTH])).tolist()
                return length, found
        return 0, []


def lengthened(
    draft: Draft, text: Text, rates: LookupRates, limit: int, least: float, vocab_size: int = ALL_IDS
) -> Draft:
    """A draft with what prompt lookup goes on with; where it promises little, lookup alone if that promises more.

    Args:
        draft: What a drafter gave, without a guess.
        text: The request's tokens.
        rates: How often lookup is right.
        limit: Most tokens of both.
        least: The guess ends where the chance that the target takes all of the draft falls below this.
        vocab_size: Ids are below this; a guess ends before one that stands in the text and is not.
    """
    drafted, expected, chance, _, _, branch = draft
    if expected < POOR_DRAFT_TOKENS:
        match, guess, worth = guessed(text, rates, [], 1.0, limit, least, vocab_size)
        if worth > expected:
            return Draft([], worth, 1.0, guess, match)
        if not drafted:
            return Draft([], expected + worth, 1.0, guess, match)
    match, guess, worth = guessed(text, rates, drafted, chance, limit, least, vocab_size)
    return Draft(drafted, expected + worth, chance, guess, match, branch)


def guessed(
    text: Text,
    rates: LookupRates,
    drafted: Sequence[int],
    chance: float,
    limit: int,
    least: float = 0.0,
    vocab_size: int = ALL_IDS,
) -> tuple[int, tuple[int, ...], float]:
    """What prompt lookup goes on with after ``drafted``, of which the target takes all with ``chance``.

    Returns:
        Length of the match, tokens, and how many of them can be expected to be taken.
    """
    length, found = text.continuation(max(0, limit - len(drafted)), drafted)
    each = rates.chance[length]
    guess: list[int] = []
    expected = 0.0
    for token in found:
        chance *= each
        if chance < least or token >= vocab_size:
            break
        expected += chance
        guess.append(token)
    return length, tuple(guess), expected
