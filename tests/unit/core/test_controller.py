"""ControllerSession: what it counts, when it opens, and what it accepts."""

from itertools import pairwise

import pytest

from vllm_wanspec.core.controller import FIRST_REOPEN_DELAY_S, MAX_REOPEN_DELAY_S, ControllerSession, Counters
from vllm_wanspec.core.messages import REJECT_CODES, Close, Commit, Nodes, Open, Reject
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.errors import RemoteProtocolError

PROMPT = [10, 11, 12, 13]


def make_session(prompt: list[int] = PROMPT) -> tuple[ControllerSession, Counters]:
    counters = Counters()
    return ControllerSession(prompt, counters, max_nodes=64, alternatives=4), counters


def open_session(session: ControllerSession, number: int = 1, **changes: int) -> Open:
    limits = {"vocab_size": 100, "max_nodes": 1000, "lookahead": 16, **changes}
    return session.open(number, **limits)


def opened_session() -> tuple[ControllerSession, Counters]:
    session, counters = make_session()
    open_session(session)
    session.commit([20])  # the token of the prefill
    session.receive(nodes([(1, 0, 20, -0.1), (2, 1, 30, -0.1), (3, 2, 31, -0.1), (4, 1, 40, -2.0)]), 0.0)
    return session, counters


def nodes(items: list[tuple[int, int, int, float]], seen: int = len(PROMPT), number: int = 1) -> Nodes:
    records = (NodeRecord(n, p, t, q, 0.0 if q == 0.0 else 1.0) for n, p, t, q in items)
    return Nodes(number, seen, tuple(records))


def test_open_carries_the_context_and_the_smaller_budget() -> None:
    session, counters = make_session()
    assert session.wants_link(0.0)
    assert open_session(session, 3) == Open(3, tuple(PROMPT), 16, 64, 4)
    assert not session.wants_link(0.0)
    assert counters.opened_sessions == 1
    again, _ = make_session()
    opened = open_session(again, max_nodes=32)
    assert opened.max_nodes == 32


def test_without_a_link_there_are_no_drafts_and_nothing_to_send() -> None:
    session, counters = make_session()
    assert session.draft(8) == []
    assert session.commit([20]) is None
    assert session.commit([21, 22]) is None
    assert session.close() is None
    assert session.length == len(PROMPT) + 3
    assert (counters.steps, counters.committed_tokens, counters.hits, counters.misses) == (1, 2, 0, 0)


def test_the_prefill_s_token_is_no_step() -> None:
    session, counters = make_session()
    session.commit([20])
    assert (counters.steps, counters.committed_tokens) == (0, 0)
    session.commit([21, 22, 23])
    assert (counters.steps, counters.committed_tokens) == (1, 3)


def test_commit_gives_its_absolute_position() -> None:
    session, _ = make_session()
    open_session(session, 5)
    assert session.commit([20]) == Commit(5, 4, (20,))
    assert session.commit([21, 22]) == Commit(5, 5, (21, 22))


def test_drafts_are_the_best_path_and_obey_the_limit() -> None:
    session, counters = opened_session()
    assert session.draft(8) == [30, 31]
    assert session.draft(1) == [30]
    assert session.draft(0) == []
    assert counters.offered_tokens == 0  # counted where drafts are handed out


def test_a_hit_in_the_main_line_and_one_in_a_branch() -> None:
    session, counters = opened_session()
    before = (counters.hits, counters.misses)
    session.commit([30])
    assert (counters.hits, counters.misses) == (before[0] + 1, before[1])
    assert session.draft(8) == [31]
    session, counters = opened_session()
    before = (counters.hits, counters.misses)
    session.commit([40])
    assert (counters.hits, counters.misses) == (before[0] + 1, before[1])
    assert session.draft(8) == []


@pytest.mark.parametrize("tokens", [[50], [30, 50], [30, 31, 32]])
def test_a_commit_that_leaves_the_tree_is_a_miss(tokens: list[int]) -> None:
    session, counters = opened_session()
    before = (counters.hits, counters.misses)
    session.commit(tokens)
    assert (counters.hits, counters.misses) == (before[0], before[1] + 1)
    assert session.draft(8) == []


def test_commits_while_one_is_pending_are_blind() -> None:
    session, counters = opened_session()
    session.commit([50])
    before = (counters.hits, counters.misses, counters.blind_steps)
    session.commit([51])
    session.commit([52])
    assert (counters.hits, counters.misses, counters.blind_steps) == (before[0], before[1], before[2] + 2)


def test_late_stale_and_added_nodes_are_told_apart() -> None:
    session, counters = make_session()
    open_session(session)
    session.commit([20])
    session.commit([21])
    arrived = nodes([(1, 0, 20, -0.1), (2, 0, 25, -2.0), (3, 1, 21, -0.1), (4, 3, 22, -0.1), (5, 2, 26, -0.1)])
    session.receive(arrived, 0.0)
    assert (counters.added_nodes, counters.stale_nodes, counters.late_drafts) == (1, 2, 2)
    assert session.draft(8) == [22]


def test_echoes_are_neither_late_nor_added() -> None:
    session, counters = make_session()
    open_session(session)
    session.commit([20])
    session.receive(nodes([(1, 0, 20, 0.0)], seen=5), 0.0)
    assert (counters.added_nodes, counters.stale_nodes, counters.late_drafts) == (0, 0, 0)
    assert session.tree is not None
    assert not session.tree.pending


def test_nodes_cannot_have_seen_what_was_not_committed() -> None:
    session, _ = opened_session()
    session.receive(nodes([], seen=5), 0.0)
    with pytest.raises(RemoteProtocolError, match="position 6 of 5"):
        session.receive(nodes([], seen=6), 0.0)


def test_broken_trees_are_the_peer_s_fault() -> None:
    session, _ = opened_session()
    with pytest.raises(RemoteProtocolError, match=r"outside 0\.\.99"):
        session.receive(nodes([(9, 1, 100, -0.5)]), 0.0)


def test_nodes_after_the_link_is_lost_are_ignored() -> None:
    session, counters = opened_session()
    session.link_lost()
    added = counters.added_nodes
    session.receive(nodes([(5, 4, 41, -0.1)]), 0.0)
    assert session.draft(8) == []
    assert counters.added_nodes == added


def test_a_session_opens_again_with_the_full_context() -> None:
    session, counters = opened_session()
    session.commit([30, 31])
    session.link_lost()
    assert session.tree is None
    assert session.wants_link(0.0)
    session.commit([32])
    assert open_session(session, 2) == Open(2, (*PROMPT, 20, 30, 31, 32), 16, 64, 4)
    session.receive(nodes([(1, 0, 33, -0.1)], seen=8, number=2), 0.0)
    assert session.draft(8) == [33]
    assert counters.opened_sessions == 2


@pytest.mark.parametrize("code", sorted(REJECT_CODES))
def test_reject_codes(code: str) -> None:
    session, counters = opened_session()
    session.receive(Reject(1, code), 100.0)
    assert session.tree is None
    assert session.draft(8) == []
    assert not session.wants_link(100.0)
    assert session.wants_link(1e9) == (code not in {"too_long", "vocabulary"})
    assert counters.rejected_sessions == 1


def test_the_wait_after_rejects_doubles_up_to_a_limit() -> None:
    session, _ = make_session()
    waits = []
    for attempt in range(12):
        open_session(session, attempt + 1)
        session.receive(Reject(attempt + 1, "overloaded"), 0.0)
        wait_s = FIRST_REOPEN_DELAY_S
        while not session.wants_link(wait_s):
            wait_s *= 1.01
        waits.append(wait_s)
    assert waits[0] == pytest.approx(2 * FIRST_REOPEN_DELAY_S, rel=0.02)
    assert all(a <= b for a, b in pairwise(waits))
    assert waits[-1] == pytest.approx(MAX_REOPEN_DELAY_S, rel=0.02)


def test_nodes_after_a_reject_start_the_waits_over() -> None:
    session, _ = make_session()
    for attempt in range(1, 6):
        open_session(session, attempt)
        session.receive(Reject(attempt, "overloaded"), 0.0)
    open_session(session, 6)
    session.receive(nodes([(1, 0, 20, -0.1)], number=6), 0.0)
    session.receive(Reject(6, "overloaded"), 0.0)
    assert session.wants_link(2.1 * FIRST_REOPEN_DELAY_S)


def test_close_is_final() -> None:
    session, _ = opened_session()
    assert session.close() == Close(1)
    assert session.close() is None
    assert not session.wants_link(1e9)
    assert session.draft(8) == []


def test_counters_are_listed_by_name() -> None:
    counters = Counters(hits=3)
    listed = dict(counters.items())
    assert listed["hits"] == 3
    assert listed["local_draft_passes"] == 0
    assert all(isinstance(value, int) for value in listed.values())
