"""Which drafter is chosen for a session, and what is asked of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.choice import Chosen, choose, choose_other, limits_for
from vllm_wanspec.core.health import FIRST_PROBE_S, OPENING, Bar, LinkHealth
from vllm_wanspec.core.messages import MAX_CONTEXT_TOKENS, Limits, Welcome
from vllm_wanspec.core.states import LinkState

NOW = 100.0


class Link:
    """What the choice looks at."""

    def __init__(self, rtt_s: float, *, up: bool = True, max_sessions: int = 99, max_context: int = 10**9) -> None:
        self.rtt_s = rtt_s
        self.welcome = Welcome(1, "m", 50, "f", max_sessions, 4096, max_context) if up else None
        self.health = LinkHealth()
        self.draining = False

    def become(self, state: LinkState, since_s: float = NOW) -> "Link":
        """In that state, by drafts that never came."""
        for at_s in (since_s - 60.0, since_s)[2 - [*LinkState].index(state) :]:
            self.health.unanswered(0, 2.0, at_s, waited=False)
        self.health._probe_at = since_s + FIRST_PROBE_S
        assert self.health.state is state
        return self


def found(*links: Link, on: tuple[int, ...] = (), length: int = 3, **more: object) -> Chosen | None:
    """What is chosen where so many sessions are on each."""
    counts = on or (0,) * len(links)
    served = {link: range(count) for link, count in zip(links, counts, strict=True)}
    return choose(served, length, NOW, **more)  # type: ignore[arg-type]


def chosen(*links: Link, **more: object) -> Link | None:
    """The link chosen; no probe."""
    choice = found(*links, **more)  # type: ignore[arg-type]
    if choice is None:
        return None
    assert choice.welcome is choice.link.welcome
    assert not choice.probe
    return choice.link  # type: ignore[return-value]


def test_the_nearest_drafter_serves() -> None:
    far, near = Link(0.07), Link(0.02)
    assert chosen(far, near) is near


@pytest.mark.parametrize(("sessions", "expected"), [(1, 1), (2, 0), (3, 0)])
def test_each_session_counts_as_one_round_trip_more(sessions: int, expected: int) -> None:
    links = Link(0.05), Link(0.02)
    assert chosen(*links, on=(0, sessions)) is links[expected]


def test_of_equal_ones_the_first() -> None:
    links = Link(0.02), Link(0.02)
    assert chosen(*links) is links[0]
    assert chosen(*links, on=(1, 0)) is links[1]


def test_only_those_that_are_connected_have_room_and_take_the_context() -> None:
    down, full, small, last = Link(0.01, up=False), Link(0.01, max_sessions=2), Link(0.01, max_context=7), Link(9.0)
    assert chosen(down, full, small, last, on=(0, 2, 0, 0), length=8) is last
    assert chosen(down, full, small, on=(0, 2, 0), length=8) is None
    assert chosen(down, full, small, on=(0, 1, 1), length=7) is full
    assert chosen(small, length=7) is small
    assert chosen() is None


def test_no_context_is_longer_than_the_protocol_takes() -> None:
    assert chosen(Link(0.01), length=MAX_CONTEXT_TOKENS) is not None
    assert chosen(Link(0.01), length=MAX_CONTEXT_TOKENS + 1) is None


def test_settings_become_limits() -> None:
    tree = TreeSettings(
        entropy_threshold_nats=0.5,
        max_branches=3,
        running_branches=5,
        branch_depth=7,
        max_nodes=300,
        lookahead_tokens=40,
        min_probability=0.01,
    )
    assert limits_for(tree, 4096, 21) == Limits(40, 300, 3, 5, 7, 0.5, 0.01)
    assert limits_for(tree, 200, 21).max_nodes == 200  # the drafter's own bound


def test_what_is_left_to_us_is_filled_in() -> None:
    limits = limits_for(TreeSettings(entropy_threshold_nats="adaptive", lookahead_tokens="auto"), 4096, 21)
    assert (limits.lookahead, limits.entropy_threshold_nats) == (21, None)


# Drafters that are not healthy


@pytest.mark.parametrize("state", [LinkState.SUSPECT, LinkState.BROKEN])
@pytest.mark.parametrize("new", [True, False])
def test_a_healthy_drafter_is_preferred_however_far(state: LinkState, new: bool) -> None:
    bad, good = Link(0.001).become(state), Link(0.5)
    assert chosen(bad, good, on=(0, 50), new=new) is good


def test_a_suspect_serves_where_nobody_else_can_and_a_broken_one_does_not() -> None:
    suspect, broken = Link(0.5).become(LinkState.SUSPECT), Link(0.001).become(LinkState.BROKEN)
    full = Link(0.001, max_sessions=2)
    assert chosen(broken, suspect) is suspect
    assert chosen(full, suspect, on=(2, 0)) is suspect
    assert chosen(broken) is None


@pytest.mark.parametrize("state", [LinkState.SUSPECT, LinkState.BROKEN])
def test_a_probe_is_a_new_request_or_one_that_nobody_else_takes(state: LinkState) -> None:
    bad, good = Link(0.5).become(state, NOW - 120.0), Link(0.02)
    choice = found(bad, good, new=True)
    assert choice is not None
    assert (choice.link, choice.probe) == (bad, True)
    assert chosen(bad, good, new=False) is good
    alone = found(bad, new=False)
    assert alone is not None
    assert alone.probe


def test_there_is_one_probe_at_a_time() -> None:
    bad = Link(0.5).become(LinkState.BROKEN, NOW - 120.0)
    bad.health.opened(1, NOW - FIRST_PROBE_S, waits=True, probe=True)
    assert chosen(bad) is None


def test_requests_that_are_not_new_wait_until_some_have_been_drafted_for() -> None:
    near, far = Link(0.02), Link(0.2)
    near.health.opening = OPENING
    assert chosen(near, new=False) is None
    assert chosen(near, new=True) is near
    assert chosen(near, far, new=False) is far
    far.health.opening = OPENING
    assert chosen(near, far, Link(0.01).become(LinkState.SUSPECT), new=False) is None  # soon there is a place


def test_a_reject_bars_one_drafter_for_one_request() -> None:
    near, far = Link(0.02), Link(0.2)
    bar = Bar()
    bar.rejected("overloaded", NOW)
    assert chosen(near, far, bars={near: bar}) is far
    assert chosen(near, bars={near: bar}) is None
    assert choose({near: ()}, 3, NOW + 1.0, {near: bar}) is not None  # type: ignore[dict-item]
    bar.rejected("vocabulary", NOW)
    assert choose({near: ()}, 3, NOW + 1e9, {near: bar}) is None  # type: ignore[dict-item]


def test_a_session_moves_to_a_healthy_drafter_alone_and_to_another() -> None:
    def other(than: Link, *links: Link) -> Link | None:
        choice = choose_other(dict.fromkeys((than, *links), ()), 3, NOW, {}, than)  # type: ignore[arg-type]
        return None if choice is None else choice.link  # type: ignore[return-value]

    here, good, full = Link(0.01), Link(0.2), Link(0.02)
    full.health.opening = OPENING
    assert other(here, full, good) is good
    assert other(here, full) is None
    assert other(here) is None
    assert other(here, Link(0.01).become(LinkState.SUSPECT, NOW - 120.0)) is None


def test_a_drafter_whose_first_drafts_come_late_gets_fewer_sessions_and_is_asked_again_later() -> None:
    slow, far = Link(0.01), Link(0.05)
    slow.health.opened(1, NOW - 1.0, waits=True, probe=False)
    slow.health.answered(1.0, 3, NOW)
    assert chosen(slow, far) is far
    assert choose({slow: (), far: ()}, 3, NOW + 300.0).link is slow  # type: ignore[dict-item, union-attr]


def test_load_counts() -> None:
    full, far = Link(0.02), Link(0.05)
    assert chosen(full, far) is full
    full.health.load = 0.9
    assert chosen(full, far) is far
    far.health.load = 3.0
    assert chosen(full, far) is full


@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.sampled_from(LinkState), st.booleans()), min_size=1, max_size=5))
def test_a_healthy_drafter_is_never_barred_by_the_faults_of_others(drafters: list[tuple]) -> None:
    links = [Link(rtt_s, up=up).become(state) for rtt_s, state, up in drafters]
    able = [link for link in links if link.welcome is not None]
    healthy = [link for link in able if link.health.state is LinkState.HEALTHY]
    suspect = [link for link in able if link.health.state is LinkState.SUSPECT]
    expected = min(healthy or suspect, key=lambda link: link.rtt_s, default=None)
    assert chosen(*links) is expected
