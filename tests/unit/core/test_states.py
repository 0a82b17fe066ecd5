"""The tables that sessions and links' health run by: docs made from them, and every entry really played."""

from pathlib import Path

import pytest
from branch_play import Play, even_step
from toys import limits
from tree_checks import record

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.drafter import DrafterSession, DraftStep, StartBranch
from vllm_wanspec.core.health import LinkHealth
from vllm_wanspec.core.messages import Commit, Nodes, Open, Reject
from vllm_wanspec.core.states import (
    CONTROLLER_TABLE,
    DRAFTER_TABLE,
    LINK_TABLE,
    MEANINGS,
    ControllerEvent,
    ControllerState,
    DrafterEvent,
    DrafterState,
    LinkEvent,
    LinkState,
    states_markdown,
)
from vllm_wanspec.core.turnaround import Turnaround

DOCS = Path(__file__).parents[3] / "docs" / "reference" / "states.md"


def test_the_docs_are_those_made_from_the_tables() -> None:
    assert DOCS.read_text(encoding="utf-8") == states_markdown(), "run `make docs`"


def test_every_state_has_a_meaning_and_a_row() -> None:
    text = states_markdown()
    for state in (*ControllerState, *DrafterState, *LinkState):
        assert f"| **{state}** | {MEANINGS[state]} |" in text
    for event in (*ControllerEvent, *DrafterEvent, *LinkEvent):
        assert f"| {event} |" in text
    assert set(MEANINGS) == {*ControllerState, *DrafterState, *LinkState}


def test_every_state_can_be_reached_and_left_but_the_last() -> None:
    for table, first, last in (
        (CONTROLLER_TABLE, ControllerState.UNSERVED, ControllerState.CLOSED),
        (DRAFTER_TABLE, DrafterState.NEW, DrafterState.ENDED),
        (LINK_TABLE, LinkState.HEALTHY, None),
    ):
        reached = {first}
        for _ in table:
            reached |= {after for (state, _), after in table.items() if state in reached}
        assert reached == set(type(first))
        assert {state for (state, _), after in table.items() if after != state} == reached - {last}


# The controller's side


def open_on_a_link(session: ControllerSession, now: float = 1e9) -> None:
    session.open(1, limits(), now, vocab_size=100, turnaround=Turnaround())
    session.receive(Nodes(1, session.length, (record(1, 0, 5), record(2, 1, 6))), now)


def controller_in(state: ControllerState) -> ControllerSession:
    session = ControllerSession([1, 2], Shared())
    if state is ControllerState.UNSERVED:
        return session
    if state is ControllerState.CLOSED:
        session.close(0.0)
        return session
    open_on_a_link(session)
    match state:
        case ControllerState.BLIND:
            session.commit([9], 0.0)
    return session


CONTROLLER_PLAYS = {
    ControllerEvent.OPEN: open_on_a_link,
    ControllerEvent.STAY: lambda session: session.commit([5], 0.0),
    ControllerEvent.LEAVE: lambda session: session.commit([9], 0.0),
    ControllerEvent.CATCH_UP: lambda session: session.receive(Nodes(1, 3, (record(4, 3, 9),)), 0.0),
    ControllerEvent.REJECT: lambda session: session.receive(Reject(1, "gap"), 0.0),
    ControllerEvent.LOSE: lambda session: session.link_lost(0.0),
    ControllerEvent.CLOSE: lambda session: session.close(0.0),
}


@pytest.mark.parametrize(("state", "event"), CONTROLLER_TABLE, ids=str)
def test_every_entry_of_the_controller_s_table(state: ControllerState, event: ControllerEvent) -> None:
    session = controller_in(state)
    assert session.state is state
    CONTROLLER_PLAYS[event](session)
    assert session.state is CONTROLLER_TABLE[state, event]


@pytest.mark.parametrize("state", [ControllerState.SERVED, ControllerState.CLOSED])
def test_opening_where_it_is_not_wanted_is_a_bug(state: ControllerState) -> None:
    session = controller_in(state)
    assert not session.wants_link
    with pytest.raises(KeyError):
        open_on_a_link(session)


# A link


def link_in(state: LinkState) -> LinkHealth:
    """A link's health at 100 s; one that is not healthy has been so for an hour."""
    health = LinkHealth()
    for at_s in (-3500.0, -3400.0)[: [*LinkState].index(state)]:
        health.unanswered(1, 2.0, at_s, waited=False)
    return health


LINK_PLAYS = {
    LinkEvent.FAIL: lambda health: health.unanswered(1, 2.0, 100.0, waited=False),
    LinkEvent.FAIL_ON: lambda health: health.unanswered(1, 2.0, 100.0, waited=False),
    LinkEvent.BREAK: lambda health: health.lost(1, 0, 100.0),
    LinkEvent.PROVE: lambda health: health.drafted(100.0),
}


@pytest.mark.parametrize(("state", "event"), LINK_TABLE, ids=str)
def test_every_entry_of_a_link_s_table(state: LinkState, event: LinkEvent) -> None:
    health = link_in(state)
    assert health.state is state
    changed = LINK_PLAYS[event](health)
    assert health.state is LINK_TABLE[state, event]
    assert changed == (health.state is not state)


# The draft side


def drafter(**changes: object) -> Play:
    return Play(width=1, max_branches=1, **changes)


def drafter_in(state: DrafterState) -> Play:
    if state is DrafterState.FULL:
        play = drafter(lookahead=20, max_nodes=8)
        play.settle()
        return play
    play = drafter(lookahead=4)
    if state is DrafterState.RESTING:
        play.settle()
    elif state is DrafterState.ENDED:
        play.do(play.session.close(0.0))
    return play


@pytest.mark.parametrize(
    ("state", "event", "play_on"),
    [
        (DrafterState.DRAFTING, DrafterEvent.DRAFT, lambda play: play.advance(1)),
        (DrafterState.DRAFTING, DrafterEvent.REST, lambda play: play.advance(1, 4)),
        (DrafterState.RESTING, DrafterEvent.DRAFT, lambda play: play.commit(3, 4, 5)),
        (DrafterState.RESTING, DrafterEvent.REST, lambda play: play.commit(3)),
        (DrafterState.FULL, DrafterEvent.DRAFT, lambda play: play.commit(3)),
        (DrafterState.FULL, DrafterEvent.FILL, lambda play: play.session.resize(1, 0.0)),
        *[(s, DrafterEvent.REJECT, lambda play: play.commit(5000)) for s in DrafterState if s not in {"new", "ended"}],
        *[
            (s, DrafterEvent.CLOSE, lambda play: play.session.close(0.0))
            for s in DrafterState
            if s not in {"new", "ended"}
        ],
    ],
)
def test_entries_of_the_drafter_s_table(state: DrafterState, event: DrafterEvent, play_on) -> None:
    play = drafter_in(state)
    assert play.session.state is state
    play_on(play)
    assert play.session.state is DRAFTER_TABLE[state, event]


def test_a_budget_that_is_used_up_while_drafting() -> None:
    play = drafter(lookahead=20, max_nodes=8)
    play.advance(1, 7)
    assert play.session.state is DrafterState.DRAFTING
    play.advance(1)
    assert play.session.state is DRAFTER_TABLE[DrafterState.DRAFTING, DrafterEvent.FILL]


@pytest.mark.parametrize(
    ("max_context", "state"), [(100, DrafterState.DRAFTING), (3, DrafterState.RESTING)], ids=["room", "no room"]
)
def test_a_new_session_begins_to_draft_where_there_is_room(max_context: int, state: DrafterState) -> None:
    session = DrafterSession(Open(1, (0, 1, 2), limits()), vocab_size=1000, max_context=max_context)
    assert session.state is DrafterState.NEW
    actions = session.start(0.0)
    assert session.state is state
    assert [type(action) for action in actions] == [StartBranch] * (state is DrafterState.DRAFTING)


def test_whoever_goes_on_with_a_session_that_is_over_has_a_bug() -> None:
    play = drafter_in(DrafterState.ENDED)
    for call in (
        lambda: play.session.close(0.0),
        lambda: play.session.committed(Commit(7, 3, (3,)), 0.0),
        lambda: play.session.failed(0.0),
    ):
        with pytest.raises(KeyError):
            call()
    assert play.session.drafted(1, [even_step([0, 1, 2]), DraftStep(1, 0.0, 0.0)], 0.0) == []
