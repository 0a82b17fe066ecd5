"""Whose branch gets the next place: shares, main lines, use, and turns that replaced branches keep."""

from collections import Counter

import pytest

from vllm_wanspec.drafter.turns import CREDIT_S, Turns

A, B, C = "a", "b", "c"


def granted(turns: Turns, now: float = 0.0) -> list[int]:
    """Everybody who gets a place now, in order."""
    result = []
    while (handle := turns.next(now)) is not None:
        result.append(handle)
    return result


def test_places_are_given_while_there_are_any() -> None:
    turns = Turns(2)
    for handle in (1, 2, 3):
        turns.ask(handle, A, handle, main=True, now=1.0)
    assert granted(turns, 1.5) == [1, 2]
    assert (turns.running, turns.waiting, turns.granted, turns.waited_s) == (2, 1, 2, 1.0)
    turns.done(1, 2.0)
    assert granted(turns, 2.0) == [3]
    assert turns.waited_s == 2.0


def test_a_main_line_goes_before_side_branches_whoever_has_used_more() -> None:
    turns = Turns(1)
    turns.ask(1, A, 1, main=True, now=0.0)
    turns.next(0.0)
    turns.ask(2, B, 1, main=False, now=0.0)
    turns.ask(3, A, 1, main=True, now=0.0)
    turns.done(1, 9.0)
    assert turns.next(9.0) == 3


def test_connections_share_before_sessions_do() -> None:
    turns = Turns(8)
    for session in range(1, 257):
        turns.ask(session, A, session, main=True, now=0.0)
    turns.ask(1000, B, 1, main=True, now=0.0)
    for handle in range(1001, 1011):
        turns.ask(handle, B, 1, main=False, now=0.0)
    got = granted(turns)
    assert sum(handle >= 1000 for handle in got) == 4
    assert 1000 in got


def test_what_one_connection_does_not_want_another_gets() -> None:
    turns = Turns(8)
    for session in range(1, 20):
        turns.ask(session, A, session, main=True, now=0.0)
    turns.ask(1000, B, 1, main=True, now=0.0)
    assert len(granted(turns)) == 8


def test_whoever_has_used_less_comes_first() -> None:
    turns = Turns(1)
    turns.ask(1, A, 1, main=True, now=0.0)
    assert turns.next(0.0) == 1
    turns.ask(2, A, 2, main=True, now=0.0)
    turns.ask(3, A, 1, main=True, now=0.0)
    turns.done(1, 0.5)
    assert granted(turns, 0.5) == [2]
    turns.done(2, 0.6)
    assert granted(turns, 0.6) == [3]


def test_a_session_whose_waiting_branch_is_replaced_keeps_its_turn() -> None:
    turns = Turns(1)
    for handle in (1, 2, 3):
        turns.ask(handle, A, handle, main=True, now=0.0)
    assert turns.next(0.0) == 1
    turns.done(2, 0.1)
    turns.ask(4, A, 2, main=True, now=0.1)
    turns.done(1, 0.2)
    assert turns.next(0.2) == 4


@pytest.mark.parametrize("sessions", [24, 64])
def test_nobody_starves_where_commits_replace_what_waits(sessions: int) -> None:
    turns, places, handle = Turns(16), Counter[int](), 0
    current: dict[int, int] = {}
    running: dict[int, float] = {}
    for round_number in range(400):
        now = round_number * 0.04
        for session in range(sessions):  # each commit ends what the session has, running or not, and asks anew
            old = current.get(session)
            if old is not None and (old not in running or now - running[old] >= 0.2):
                turns.done(old, now)
                running.pop(old, None)
                old = None
            if old is None:
                handle += 1
                turns.ask(handle, A, session, main=True, now=now)
                current[session] = handle
        by_handle = {number: session for session, number in current.items()}
        for number in granted(turns, now):
            running[number] = now
            places[by_handle[number]] += 1
    assert len(places) == sessions
    assert max(places.values()) <= 2 * min(places.values())


def test_a_promoted_branch_that_waits_is_a_main_line() -> None:
    turns = Turns(1)
    turns.ask(1, A, 1, main=True, now=0.0)
    turns.next(0.0)
    turns.ask(2, A, 2, main=False, now=0.0)
    turns.ask(3, A, 3, main=True, now=0.0)
    turns.ask(4, A, 2, main=False, now=0.0)
    turns.lead(4)
    turns.lead(99)
    turns.done(3, 0.0)
    turns.done(1, 0.1)
    assert turns.next(0.1) == 4


def test_who_was_away_is_owed_no_more_than_a_little() -> None:
    turns = Turns(1)
    turns.ask(1, B, 1, main=True, now=0.0)
    turns.next(0.0)
    turns.done(1, 0.0)
    handle, now = 2, 0.0
    for _ in range(20):  # A alone, for a hundred seconds
        turns.ask(handle, A, 1, main=True, now=now)
        turns.next(now)
        now += 5.0
        turns.done(handle, now)
        handle += 1
    got = Counter[str]()  # B is back, and both want one place all the time
    turns.ask(handle, A, 1, main=True, now=now)
    turns.ask(handle + 1, B, 1, main=True, now=now)
    owners = {handle: A, handle + 1: B}
    handle += 2
    while now < 140.0:
        number = turns.next(now)
        assert number is not None
        who = owners.pop(number)
        now += 0.5
        got[who] += 1
        turns.done(number, now)
        turns.ask(handle, who, 1, main=True, now=now)
        owners[handle] = who
        handle += 1
    assert abs(got[A] - got[B]) <= 2 * (CREDIT_S + 5.0) / 0.5


def test_what_is_over_leaves_nothing() -> None:
    turns = Turns(2)
    for session in range(1, 6):
        turns.ask(session, A, session, main=bool(session % 2), now=0.0)
    got = granted(turns)
    for handle in {*range(1, 6)} - {*got}:
        turns.done(handle, 1.0)
    for session in range(1, 6):
        turns.leave(A, session)
    turns.leave(C, 1)
    turns.leave_all(A)
    for handle in got:  # the engine is through with them later
        turns.done(handle, 2.0)
    assert (turns.running, turns.waiting, turns._connections, turns._asking, turns._branches) == (0, 0, {}, {}, {})
    assert turns.next(3.0) is None
