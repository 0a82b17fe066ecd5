"""ControllerSession: what it counts, when it opens, what it accepts, and what it measures of its drafter."""

import pytest
from toys import limits

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Counters, Shared
from vllm_wanspec.core.draft import NO_DRAFT
from vllm_wanspec.core.messages import REJECT_CODES, Close, Commit, Nodes, Open, Reject
from vllm_wanspec.core.policy.length import Window
from vllm_wanspec.core.states import ControllerState
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.turnaround import ASSUMED_GAP_S, Coming, Turnaround
from vllm_wanspec.errors import RemoteProtocolError

PROMPT = [10, 11, 12, 13]
LIMITS = limits(16, 64, max_branches=4)


def make_session(prompt: list[int] = PROMPT) -> tuple[ControllerSession, Counters]:
    shared = Shared()
    return ControllerSession(prompt, shared), shared.counters


def open_session(
    session: ControllerSession, number: int = 1, *, now: float = 0.0, turnaround: Turnaround | None = None
) -> Open:
    return session.open(number, LIMITS, now, vocab_size=100, turnaround=turnaround or Turnaround())


def opened_session() -> tuple[ControllerSession, Counters]:
    session, counters = make_session()
    open_session(session)
    session.commit([20], 0.0)  # the token of the prefill
    session.receive(nodes([(1, 0, 20, -0.1), (2, 1, 30, -0.1), (3, 2, 31, -0.1), (4, 1, 40, -2.0)]), 0.0)
    return session, counters


def draft(session: ControllerSession, limit: int = 8) -> list[int]:
    return session.draft(limit, 0.0, 0.0).tokens


def nodes(items: list[tuple[int, int, int, float]], seen: int = len(PROMPT), number: int = 1) -> Nodes:
    records = (NodeRecord(n, p, t, q, 1.0) for n, p, t, q in items)
    return Nodes(number, seen, tuple(records))


def test_open_carries_the_context_and_the_limits() -> None:
    session, counters = make_session()
    assert session.wants_link
    assert open_session(session, 3) == Open(3, PROMPT, LIMITS, len(PROMPT))  # type: ignore[arg-type]
    assert not session.wants_link
    assert counters.opened_sessions == 1


def test_without_a_link_there_are_no_drafts_and_nothing_to_send() -> None:
    session, counters = make_session()
    assert draft(session) == []
    assert session.commit([20], 0.0) is None
    assert session.commit([21, 22], 0.0) is None
    assert session.close(0.0) is None
    assert session.length == len(PROMPT) + 3
    assert (counters.steps, counters.committed_tokens, counters.hits, counters.misses) == (1, 2, 0, 0)


def test_the_prefill_s_token_is_no_step() -> None:
    session, counters = make_session()
    session.commit([20], 0.0)
    assert (counters.steps, counters.committed_tokens) == (0, 0)
    session.commit([21, 22, 23], 0.0)
    assert (counters.steps, counters.committed_tokens) == (1, 3)


def test_commit_gives_its_absolute_position() -> None:
    session, _ = make_session()
    open_session(session, 5)
    assert session.commit([20], 0.0) == Commit(5, 4, (20,))
    assert session.commit([21, 22], 0.0) == Commit(5, 5, (21, 22))


def test_drafts_are_the_best_path_and_obey_the_limit() -> None:
    session, counters = opened_session()
    assert draft(session) == [30, 31]
    assert draft(session, 1) == [30]
    assert draft(session, 0) == []
    assert counters.offered_tokens == 0  # counted where drafts are handed out


@pytest.mark.parametrize(
    ("tokens", "hits", "branch_hits", "next_draft"),
    [([30], 1, 0, [31]), ([30, 31], 1, 0, []), ([40], 1, 1, [])],
)
def test_hits_in_the_main_line_and_in_a_branch(
    tokens: list[int], hits: int, branch_hits: int, next_draft: list[int]
) -> None:
    session, counters = opened_session()
    before = (counters.hits, counters.branch_hits, counters.misses)
    session.commit(tokens, 0.0)
    assert (counters.hits, counters.branch_hits, counters.misses) == (before[0] + hits, branch_hits, before[2])
    assert draft(session) == next_draft
    assert session.state is ControllerState.SERVED


@pytest.mark.parametrize("tokens", [[50], [30, 50], [30, 31, 32]])
def test_a_commit_that_leaves_the_tree_is_a_miss(tokens: list[int]) -> None:
    session, counters = opened_session()
    before = (counters.hits, counters.misses)
    session.commit(tokens, 0.0)
    assert (counters.hits, counters.misses) == (before[0], before[1] + 1)
    assert draft(session) == []


def test_commits_while_one_is_pending_are_blind() -> None:
    session, counters = opened_session()
    session.commit([50], 0.0)
    before = (counters.hits, counters.misses, counters.blind_steps)
    session.commit([51], 0.0)
    session.commit([52], 0.0)
    assert (counters.hits, counters.misses, counters.blind_steps) == (before[0], before[1], before[2] + 2)


def test_late_stale_and_added_nodes_are_told_apart() -> None:
    session, counters = make_session()
    open_session(session)
    session.commit([20], 0.0)
    session.commit([21], 0.0)
    arrived = nodes([(1, 0, 20, -0.1), (2, 0, 25, -2.0), (3, 1, 21, -0.1), (4, 3, 22, -0.1), (5, 2, 26, -0.1)])
    session.receive(arrived, 0.0)
    assert (counters.added_nodes, counters.stale_nodes, counters.late_drafts) == (1, 2, 2)
    assert (counters.received_nodes, counters.late_hits) == (5, 2)
    assert draft(session) == [22]


def test_what_the_drafter_has_seen_is_pending_no_more_and_is_not_counted() -> None:
    session, counters = make_session()
    open_session(session)
    session.commit([20], 0.0)
    session.receive(nodes([(2, 1, 21, -0.1)], seen=5), 0.0)  # node 1 stands for 20
    assert (counters.added_nodes, counters.stale_nodes, counters.late_drafts) == (1, 0, 0)
    assert session.tree is not None
    assert not session.tree.pending
    assert draft(session) == [21]


def test_nodes_cannot_have_seen_what_was_not_committed() -> None:
    session, _ = opened_session()
    session.receive(nodes([(5, 3, 32, -0.1)], seen=5), 0.0)
    with pytest.raises(RemoteProtocolError, match="position 6 of 5"):
        session.receive(nodes([], seen=6), 0.0)


def test_broken_trees_are_the_peer_s_fault() -> None:
    session, _ = opened_session()
    with pytest.raises(RemoteProtocolError, match=r"outside 0\.\.99"):
        session.receive(nodes([(5, 1, 100, -0.5)]), 0.0)


def test_nodes_after_the_link_is_lost_are_ignored() -> None:
    session, counters = opened_session()
    session.link_lost(0.0)
    added = counters.added_nodes
    session.receive(nodes([(5, 4, 41, -0.1)]), 0.0)
    assert draft(session) == []
    assert counters.added_nodes == added


def test_a_session_opens_again_with_the_full_context() -> None:
    session, counters = opened_session()
    session.commit([30, 31], 0.0)
    session.link_lost(0.0)
    assert session.tree is None
    assert session.wants_link
    session.commit([32], 0.0)
    opened = open_session(session, 2)
    assert (opened.session, opened.limits, opened.total) == (2, LIMITS, len(PROMPT) + 4)
    assert list(opened.tokens) == [*PROMPT, 20, 30, 31, 32]
    session.receive(nodes([(1, 0, 33, -0.1)], seen=8, number=2), 0.0)
    assert draft(session) == [33]
    assert counters.opened_sessions == 2


@pytest.mark.parametrize("code", sorted(REJECT_CODES))
def test_reject_codes(code: str) -> None:
    session, counters = opened_session()
    session.receive(Reject(1, code), 100.0)
    assert session.tree is None
    assert draft(session) == []
    assert session.wants_link  # perhaps another drafter takes it
    assert counters.rejected_sessions == 1


def test_close_is_final() -> None:
    session, _ = opened_session()
    assert session.close(0.0) == Close(1)
    assert session.close(0.0) is None
    assert not session.wants_link
    assert draft(session) == []


# Late drafts


def test_late_drafts_that_were_wrong_are_no_hits() -> None:
    session, counters = make_session()
    open_session(session)
    session.commit([20], 0.0)
    session.receive(nodes([(1, 0, 25, -0.1)]), 0.0)
    assert (counters.late_drafts, counters.late_hits) == (1, 0)
    assert session.state is ControllerState.BLIND


def test_a_tree_says_whether_nodes_have_come_since_its_last_draft() -> None:
    session, _ = make_session()
    open_session(session)
    assert session.tree is not None
    assert not session.tree.changed
    session.receive(nodes([(1, 0, 20, -0.1)]), 0.0)
    assert session.tree.changed
    assert draft(session) == [20]
    assert not session.tree.changed
    session.commit([20], 0.0)
    assert not session.tree.changed


def test_a_draft_says_how_much_of_it_is_expected() -> None:
    session, _ = opened_session()
    made = session.draft(8, 0.0, 0.0)
    assert made.tokens == [30, 31]
    assert 1.0 < made.expected < 2.0
    assert session.draft(8, 0.99, 0.0) == NO_DRAFT


# When the next draft is expected


def test_after_opening_nothing_is_expected_until_an_answer_has_been_timed() -> None:
    turnaround = Turnaround()
    session, _ = make_session()
    assert session.coming(0.0, 0.8) is None  # no link
    open_session(session, now=1.0, turnaround=turnaround)
    assert session.coming(1.0, 0.8) is None
    session.receive(nodes([(1, 0, 20, -0.1)]), 1.25)
    session.commit([50], 2.0)
    assert session.coming(2.0, 0.8) is None  # how long answers take is not known
    session.receive(nodes([(3, 2, 51, -0.1)], seen=5), 2.25)  # 2 is what was committed
    assert turnaround.answer_s.get(-1.0) == pytest.approx(0.25)
    assert session.coming(2.3, 0.8) is None  # it has a draft
    session.commit([60], 3.0)
    assert session.coming(3.1, 0.8) == Coming(pytest.approx(3.25), 1.0, ASSUMED_GAP_S)
    assert session.coming(6.0, 0.8) == Coming(6.0, 1.0, ASSUMED_GAP_S)  # overdue: at any moment


def test_the_answer_to_an_open_takes_a_prefill_and_is_no_example_of_others() -> None:
    turnaround = Turnaround()
    turnaround.answer_s.add(0.1)
    session, _ = make_session()
    for number, now in ((1, 1.0), (2, 20.0)):  # at first, and again after a lost link
        open_session(session, number, now=now, turnaround=turnaround)
        assert session.coming(now, 0.8) is None  # what is known is of other answers
        session.receive(nodes([(1, 0, 20, -0.1)], number=number), now + 9.0)
        assert turnaround.answer_s.get(-1.0) == 0.1
        session.link_lost(now + 9.5)


def test_once_an_open_is_answered_its_line_goes_on() -> None:
    session, _ = make_session()
    open_session(session, now=1.0)
    session.receive(nodes([(1, 0, 20, -0.1)]), 10.0)
    session.commit([20], 10.001)
    assert session.coming(10.001, 0.8) == Coming(pytest.approx(10.0 + ASSUMED_GAP_S), 1.0, ASSUMED_GAP_S)


def test_a_miss_is_answered_by_what_was_drafted_after_it() -> None:
    turnaround = Turnaround()
    turnaround.answer_s.add(0.1)
    session, _ = make_session()
    open_session(session, turnaround=turnaround)
    session.receive(nodes([(1, 0, 20, -0.1)]), 0.3)
    session.commit([50], 1.0)
    session.receive(nodes([(2, 1, 30, -0.1)]), 1.01)  # was on its way
    assert turnaround.answer_s.get(0.0) == pytest.approx(0.1)
    assert session.coming(1.02, 0.8) == Coming(pytest.approx(1.1), 1.0, ASSUMED_GAP_S)
    assert turnaround.gap_s.get(-1.0) == -1.0
    session.receive(nodes([(4, 3, 51, -0.1)], seen=5), 1.05)
    assert 0.05 < turnaround.answer_s.get(0.0) < 0.1  # 50 ms after the commit, smoothed


def test_drafts_that_meet_committed_tokens_must_agree_with_all_of_them() -> None:
    turnaround = Turnaround()
    turnaround.gap_s.add(0.01)
    turnaround.answer_s.add(0.1)
    session, _ = make_session()
    open_session(session, now=0.5, turnaround=turnaround)
    session.receive(nodes([(1, 0, 10, -0.1)]), 0.6)  # the open is answered
    session.commit([20], 1.03)
    assert session.coming(1.06, 0.8) == Coming(pytest.approx(1.13), 1.0, 0.01)
    session.commit([21, 22], 1.06)  # the drafter does not know these when it answers
    assert session.coming(1.06, 0.8) == Coming(pytest.approx(1.13 + 2 * 0.01), pytest.approx(0.8**2), 0.01)
    session.receive(nodes([(3, 2, 21, -0.1)], seen=5), 1.12)  # 2 is 20
    assert session.coming(1.12, 0.8) == Coming(pytest.approx(1.12 + 2 * 0.01), pytest.approx(0.8), 0.01)


def test_a_line_that_was_used_up_goes_on_one_gap_later() -> None:
    turnaround = Turnaround()
    session, _ = make_session()
    open_session(session, turnaround=turnaround)
    for number in range(1, 5):
        session.receive(nodes([(number, number - 1, 20 + number, -0.1)]), 1.0 + 0.02 * number)
    assert turnaround.gap_s.get(-1.0) == pytest.approx(0.02)
    session.commit([21, 22, 23, 24], 1.09)
    assert session.coming(1.09, 0.8) == Coming(pytest.approx(1.1), 1.0, pytest.approx(0.02))
    session.commit([25], 1.095)  # the one that was coming
    assert session.state is ControllerState.BLIND


def test_side_branches_and_pauses_are_no_gaps() -> None:
    turnaround = Turnaround()
    session, _ = make_session()
    open_session(session, turnaround=turnaround)
    session.receive(nodes([(1, 0, 21, -0.1), (2, 0, 31, -2.0)]), 1.0)
    session.receive(nodes([(3, 2, 32, -0.1)]), 1.001)
    assert turnaround.gap_s.get(-1.0) == -1.0
    session.receive(nodes([(4, 1, 22, -0.1), (5, 4, 23, -0.1)]), 1.03)
    assert turnaround.gap_s.get(-1.0) == pytest.approx(0.015)
    session.receive(nodes([(6, 5, 24, -0.1)]), 9.0)  # it had rested
    assert turnaround.gap_s.get(-1.0) == pytest.approx(0.015)


# The adaptive window


def test_a_window_observes_every_commit_that_could_be_predicted() -> None:
    class Watching(Window):
        def observe(self, followed: int, missed: bool, cost: object) -> None:
            seen.append((followed, missed))

    seen: list[tuple[int, bool]] = []
    session = ControllerSession(PROMPT, Shared(), Watching())
    open_session(session)
    session.receive(nodes([(1, 0, 20, -0.1), (2, 1, 30, -0.1), (3, 2, 31, -0.1), (4, 1, 40, -2.0)]), 0.0)
    session.commit([20], 0.0)
    session.commit([30, 99], 0.0)
    session.commit([7], 0.0)  # blind
    assert seen == [(1, False), (1, True)]
