"""Which drafter is chosen for a session, and what is asked of it."""

import pytest

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.choice import choose, limits_for
from vllm_wanspec.core.messages import MAX_CONTEXT_TOKENS, Limits, Welcome


class Link:
    """What the choice looks at."""

    def __init__(self, rtt_s: float, *, up: bool = True, max_sessions: int = 99, max_context: int = 10**9) -> None:
        self.rtt_s = rtt_s
        self.welcome = Welcome(1, "m", 50, "f", max_sessions, 4096, max_context) if up else None


def chosen(*links: Link, on: tuple[int, ...] = (), length: int = 3) -> Link | None:
    """The link chosen where so many sessions are on each."""
    counts = on or (0,) * len(links)
    served = {link: range(count) for link, count in zip(links, counts, strict=True)}
    found = choose(served, length)  # type: ignore[arg-type]
    if found is None:
        return None
    assert found.welcome is found.link.welcome
    return found.link  # type: ignore[return-value]


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
