"""Draft: what the target may verify next for one request. The session makes it; whoever serves the target keeps it
until the commit that tells what became of it.
"""

from typing import NamedTuple


class Draft(NamedTuple):
    """Tokens for one request's next step, and how they came about; a named tuple, since the serving path makes it.

    Attributes:
        drafted: Token ids that a drafter gave; not to be changed.
        expected: How many of all tokens the target can be expected to take.
        chance: Chance that it takes all of ``drafted``.
        guess: Token ids that prompt lookup goes on with.
        match: Tokens of the match that they followed; 0 without one.
        branch: How many of ``drafted``, counted from the first, are a side branch's; see `Counters.accepted_branch`.
    """

    drafted: list[int]
    expected: float
    chance: float
    guess: tuple[int, ...] = ()
    match: int = 0
    branch: int = 0

    @property
    def tokens(self) -> list[int]:
        """All token ids, none where there is nothing to use; a list of the caller's own."""
        return [*self.drafted, *self.guess]


NO_DRAFT = Draft([], 0.0, 1.0)
