"""How soon a drafter answers: what is measured of it, and when a session's next draft is therefore expected.

`Turnaround` is what all sessions of one drafter measure together. `AnswerClock` is one session's own: it notes when the
drafter had to begin anew, tells its answer from what was on its way before, and follows the main line. It decides
nothing, and it changes neither the tree nor the session.
"""

from math import inf
from typing import NamedTuple

from vllm_wanspec.core.flat import FlatTree
from vllm_wanspec.core.learned.estimates import Smoothed
from vllm_wanspec.core.messages import Nodes

ASSUMED_GAP_S = 0.008
LONGEST_GAP_S = 0.1
"""What takes longer between two tokens was a rest, not the drafter's pace."""


class Turnaround:
    """How soon a drafter answers: measured times, shared by the sessions of one drafter.

    Attributes:
        answer_s: From a commit that leaves the tree to the first nodes drafted with knowledge of it.
        gap_s: Between two tokens of the main line.
    """

    def __init__(self) -> None:
        """Start without measurements."""
        self.answer_s = Smoothed()
        self.gap_s = Smoothed()


class Coming(NamedTuple):
    """The next draft of a request that has none: when it is expected (seconds), and the chance that it is of use.

    A named tuple, since it is made on the serving path.
    """

    at_s: float
    chance: float
    gap_s: float


class AnswerClock:
    """Times the drafter of one session, from the session's opening on a link to the link's loss; ``now`` in seconds.

    Attributes:
        turnaround: The drafter's; measured here.
        asked: Set where a commit has left the tree: the drafter must begin anew at a context of so many tokens, since
            when. An attribute, since it is on the serving path; noted when the clock is next asked.
    """

    __slots__ = ("_answered", "_asked_length", "_asked_s", "_front", "_front_s", "asked", "turnaround")

    def __init__(self, turnaround: Turnaround, length: int) -> None:
        """Begin with a session's opening, at a context of ``length`` tokens.

        The first answer takes a whole prefill, and tells nothing of later ones: it is not timed.
        """
        self.turnaround = turnaround
        self._asked_length = length
        self._asked_s: float | None = None
        self.asked: tuple[int, float] | None = None
        self._answered = False
        self._front: int | None = None
        self._front_s = 0.0

    def _note_asked(self) -> None:
        if self.asked is not None:
            opening = not self._answered and self._asked_s is None
            self._asked_length, asked_s = self.asked
            self._asked_s = None if opening else asked_s
            self._answered = False
            self._front = None
            self.asked = None

    def line_left(self) -> None:
        """The target took another token than the main line's: its end, as followed so far, is no more."""
        self._front = None

    def received(self, message: Nodes, tree: FlatTree, now: float) -> None:
        """Learn how fast the drafter answers and drafts from nodes that ``tree`` has taken."""
        self._note_asked()
        if not self._answered:
            if message.seen < self._asked_length:  # what was on its way before tells nothing
                return
            if self._asked_s is not None:
                self.turnaround.answer_s.add(now - self._asked_s)
            self._answered = True
        if self._front is None:
            self._front, self._front_s = tree.line[0], now
            return
        advanced = 0
        for record in message.nodes:
            if record.parent == self._front:
                self._front = record.id
                advanced += 1
        if advanced:
            gap_s = (now - self._front_s) / advanced
            if gap_s < LONGEST_GAP_S:
                self.turnaround.gap_s.add(gap_s)
            self._front_s = now

    def coming(self, tree: FlatTree, now: float, agreement: float, until: float = inf) -> Coming | None:
        """When the next draft is expected, where ``tree`` has none; None where none can be expected ``until`` then.

        Drafts asked for by a commit that left the tree come one answer time later, one gap apart; those that meet
        tokens committed meanwhile are of use only if all of them agree, each with chance ``agreement``.
        """
        self._note_asked()
        behind = len(tree.pending)
        if tree.at < len(tree.path):
            return None
        gap_s = self.turnaround.gap_s.get(ASSUMED_GAP_S)
        if self._answered:
            first_s = self._front_s + gap_s
        else:
            answer_s = self.turnaround.answer_s.get(0.0)
            if answer_s == 0.0 or self._asked_s is None:
                return None
            first_s = self._asked_s + answer_s
            behind = max(0, tree.committed_length - self._asked_length) if behind else 0
        at_s = max(now, first_s) + behind * gap_s
        return Coming(at_s, agreement**behind, gap_s) if at_s <= until else None
