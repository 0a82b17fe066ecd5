"""AnswerClock over a tree: which answers and gaps count, and when the next draft is expected. With a session around it:
test_controller."""

import pytest

from vllm_wanspec.core.flat import FlatTree
from vllm_wanspec.core.messages import Nodes
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.turnaround import ASSUMED_GAP_S, LONGEST_GAP_S, AnswerClock, Coming, Turnaround

START = 10
"""Tokens in the context that the session opened with."""
UNKNOWN = -1.0


class Served:
    """A tree, and the clock of the drafter that fills it."""

    def __init__(self, *, answer_s: float | None = None, gap_s: float | None = None) -> None:
        self.turnaround = Turnaround()
        if answer_s is not None:
            self.turnaround.answer_s.add(answer_s)
        if gap_s is not None:
            self.turnaround.gap_s.add(gap_s)
        self.tree = FlatTree(START, vocab_size=100, max_nodes=64)
        self.clock = AnswerClock(self.turnaround, START)

    def arrive(self, now: float, *records: tuple[int, int, int], seen: int = START) -> None:
        """Nodes (id, parent, token), drafted with knowledge of ``seen`` tokens."""
        nodes = tuple(NodeRecord(*record, -0.1, 1.0) for record in records)
        self.tree.catch_up(seen)
        self.tree.append(nodes)
        self.clock.received(Nodes(1, seen, nodes), self.tree, now)

    def leave(self, now: float, *tokens: int) -> None:
        """A commit that leaves the tree."""
        assert self.tree.commit(tokens).stayed < len(tokens)
        self.clock.asked = self.tree.committed_length, now

    def coming(self, now: float, agreement: float = 0.8, **more: float) -> Coming | None:
        return self.clock.coming(self.tree, now, agreement, **more)

    @property
    def answer_s(self) -> float:
        return self.turnaround.answer_s.get(UNKNOWN)

    @property
    def gap_s(self) -> float:
        return self.turnaround.gap_s.get(UNKNOWN)


def test_a_turnaround_begins_without_measurements() -> None:
    served = Served()
    assert (served.answer_s, served.gap_s) == (UNKNOWN, UNKNOWN)


def test_an_answer_is_timed_from_the_commit_that_asked_for_it() -> None:
    served = Served()
    served.arrive(1.0, (1, 0, 5))
    served.leave(2.0, 7)
    served.arrive(2.25, (3, 2, 6), seen=START + 1)
    assert served.answer_s == pytest.approx(0.25)


def test_the_answer_to_the_opening_is_not_timed() -> None:
    served = Served()
    served.arrive(9.0, (1, 0, 5))
    assert served.answer_s == UNKNOWN


def test_a_miss_before_the_opening_is_answered_waits_for_the_same_prefill() -> None:
    served = Served(answer_s=0.1)
    served.leave(1.0, 7)
    assert served.coming(1.0) is None
    served.arrive(9.0, (2, 1, 7), seen=START + 1)
    assert served.answer_s == 0.1
    served.leave(10.0, 8)
    assert served.coming(10.0) == Coming(pytest.approx(10.1), 1.0, ASSUMED_GAP_S)


def test_what_was_on_its_way_is_no_answer() -> None:
    served = Served()
    served.arrive(1.0, (1, 0, 5))
    served.leave(2.0, 7)
    served.arrive(2.1, (2, 1, 6))  # drafted before the drafter knew
    assert served.answer_s == UNKNOWN
    served.arrive(2.5, (4, 3, 8), seen=START + 1)  # 3 is what was committed
    assert served.answer_s == pytest.approx(0.5)


def test_gaps_are_those_of_the_main_line_and_rests_are_none() -> None:
    served = Served()
    served.arrive(1.0, (1, 0, 5), (2, 0, 6))
    served.arrive(1.01, (3, 2, 7))  # a branch's
    assert served.gap_s == UNKNOWN
    served.arrive(1.04, (4, 1, 8), (5, 4, 9))
    assert served.gap_s == pytest.approx(0.02)
    served.arrive(1.04 + LONGEST_GAP_S, (6, 5, 10))
    assert served.gap_s == pytest.approx(0.02)
    served.arrive(1.04 + LONGEST_GAP_S + 0.02, (7, 6, 11))  # the rest is over
    assert served.gap_s == pytest.approx(0.02)


def test_a_line_that_was_left_is_not_followed_any_more() -> None:
    served = Served()
    served.arrive(1.0, (1, 0, 5), (2, 0, 6))
    assert served.tree.commit([6]).missed
    served.clock.line_left()
    served.arrive(1.05, (3, 2, 7))  # begins the line anew
    assert served.gap_s == UNKNOWN
    served.arrive(1.06, (4, 3, 8))
    assert served.gap_s == pytest.approx(0.01)


def test_nothing_is_coming_where_a_draft_is_there_or_no_answer_is_known() -> None:
    served = Served()
    assert served.coming(0.0) is None  # opening
    served.arrive(1.0, (1, 0, 5))
    assert served.coming(1.0) is None  # a draft is there
    served.leave(2.0, 7)
    assert served.coming(2.0) is None  # nobody knows how long answers take


def test_a_line_that_was_used_up_goes_on_one_gap_after_its_last_token() -> None:
    served = Served(gap_s=0.02)
    served.arrive(1.0, (1, 0, 5))
    served.tree.commit([5])
    assert served.coming(1.01) == Coming(pytest.approx(1.02), 1.0, 0.02)
    assert served.coming(3.0) == Coming(3.0, 1.0, 0.02)  # overdue


def test_drafts_must_agree_with_each_token_committed_since_they_were_asked_for() -> None:
    served = Served(answer_s=0.1, gap_s=0.01)
    served.arrive(1.0, (1, 0, 5))
    served.leave(2.0, 7)
    assert served.coming(2.0) == Coming(pytest.approx(2.1), 1.0, 0.01)
    served.tree.commit([8, 9])
    assert served.coming(2.0) == Coming(pytest.approx(2.1 + 2 * 0.01), pytest.approx(0.8**2), 0.01)


def test_what_comes_too_late_is_not_told() -> None:
    served = Served(answer_s=0.1)
    served.arrive(1.0, (1, 0, 5))
    served.leave(2.0, 7)
    assert served.coming(2.0, until=2.09) is None
    assert served.coming(2.0, until=2.11) is not None
