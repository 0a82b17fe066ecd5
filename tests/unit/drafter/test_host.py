"""What a Host needs of whoever owns branches, and what it tells them; with real connections: test_sharing."""

import logging
from collections.abc import Sequence

import pytest
from conftest import LogLines
from toys import draft_model

from vllm_wanspec.core.drafter import DraftStep, StartBranch
from vllm_wanspec.drafter.admission import FIRST_TOKEN_BOUND_S, RECENT_S
from vllm_wanspec.drafter.host import TELL_AGAIN_S, Host
from vllm_wanspec.drafter.turns import TURN_TOKENS


class Owner:
    """Remembers what it is told."""

    client_name = "eu"

    def __init__(self, sessions: int = 1) -> None:
        self.sessions = sessions
        self.told: list[tuple[object, ...]] = []

    def resize(self, width: int) -> None:
        self.told.append(("resize", width))

    def drafted(self, number: int, branch: int, steps: Sequence[DraftStep]) -> None:
        self.told.append(("drafted", number, branch, list(steps)))

    def ended(self, number: int, branch: int) -> None:
        self.told.append(("ended", number, branch))

    def failed(self, number: int, branch: int, reason: str) -> None:
        self.told.append(("failed", number, branch, reason))

    def forget(self, number: int, branch: int) -> None:
        self.told.append(("forget", number, branch))

    def drain(self) -> None:
        self.told.append(("drain",))

    def dismiss(self) -> int:
        self.told.append(("dismiss",))
        return self.sessions


class QuietHost(Host):
    """A host whose engine does nothing by itself."""

    def __init__(self, places: int = 8) -> None:
        self.time_s = 0.0
        super().__init__(draft_model(), running_branches=places, clock=lambda: self.time_s)
        self.ceased: list[int] = []
        self.extended: list[tuple[int, int]] = []

    def _extend(self, handle: int, start: StartBranch) -> None:
        self.extended.append((handle, start.max_tokens))

    def _cease(self, handle: int) -> None:
        self.ceased.append(handle)


STEP = DraftStep(7, -0.5, 1.0)


def test_what_the_engine_does_is_told_to_the_owner_of_the_branch() -> None:
    host, first, second = QuietHost(), Owner(), Owner()
    one = host.start(first, 3, StartBranch(5, 0, (1, 2), 2, (), 8))
    other = host.start(second, 3, StartBranch(6, 0, (1, 2), 2, (), 8))
    host.drafted(one, [STEP, STEP])
    host.ended(one)
    host.failed(other, "gone")
    host.gone(other)
    assert first.told == [("drafted", 3, 5, [STEP, STEP]), ("ended", 3, 5)]
    assert second.told == [("failed", 3, 6, "gone"), ("forget", 3, 6)]
    assert (host.running, host.branches_started, host.drafted_tokens) == (1, 2, 2)


def test_a_branch_that_is_gone_is_nobody_s() -> None:
    host, owner = QuietHost(), Owner()
    handle = host.start(owner, 1, StartBranch(1, 0, (1,), 1, (), 8))
    host.gone(handle)
    owner.told.clear()
    host.drafted(handle, [STEP])
    host.ended(handle)
    host.failed(handle, "late")
    host.stop(handle)
    assert (owner.told, host.ceased, host.drafted_tokens) == ([], [], 0)


def test_all_owners_are_told_their_sessions_share() -> None:
    host, small, large = QuietHost(), Owner(1), Owner(3)
    host.connections |= {small, large}
    host.share()
    assert small.told == [("resize", 4)]  # a half of the eight places, for one session
    assert large.told == [("resize", 1)]  # and for three


def test_times_are_counted_from_token_to_token() -> None:
    host, owner = QuietHost(), Owner()
    handle = host.start(owner, 1, StartBranch(1, 0, (1,), 1, (), 8))
    host.time_s = 0.25
    host.drafted(handle, [STEP])
    host.time_s = 0.5
    host.drafted(handle, [STEP])
    host.gone(handle)
    stats = host.stats()
    assert (stats.first_tokens, stats.first_seconds, stats.gap_seconds, stats.branch_seconds) == (1, 0.25, 0.25, 0.5)


def test_what_has_no_place_waits_and_is_begun_when_there_is_one() -> None:
    host, owner = QuietHost(places=1), Owner()
    first = host.start(owner, 1, StartBranch(1, 0, (1,), 1, (), 256))
    second = host.start(owner, 2, StartBranch(1, 0, (1,), 1, (), 256))
    third = host.start(owner, 3, StartBranch(1, 0, (1,), 1, (), 256))
    assert (host.running, host.waiting, host.branches_started) == (1, 2, 1)
    host.time_s = 2.0
    host.gone(first)
    assert host.extended == [(first, 256), (second, TURN_TOKENS)]  # another one waits still
    host.stop(third)
    assert owner.told == [("forget", 1, 1), ("forget", 3, 1)]
    assert (host.running, host.waiting, host.ceased) == (1, 0, [])
    assert host.stats().waited_seconds == 2.0
    host.drafted(third, [STEP])
    assert host.drafted_tokens == 0


def test_tokens_are_counted_by_client() -> None:
    host, owner = QuietHost(), Owner()
    handle = host.start(owner, 1, StartBranch(1, 0, (1,), 1, (), 8))
    host.drafted(handle, [STEP, STEP])
    assert host.stats().drafted == {"eu": 2}


def test_new_sessions_are_refused_while_first_tokens_are_late() -> None:
    host, owner = QuietHost(places=1), Owner()
    handles = []
    for number in range(1, 5):
        host.opened(owner, number, 3)
        handles.append(host.start(owner, number, StartBranch(1, 0, (1,), 1, (), 8)))
    assert host.refusal(3) is None
    host.time_s = FIRST_TOKEN_BOUND_S + 1.0
    assert host.refusal(3) == "slow"
    for handle in handles:  # those that are there go on
        host.drafted(handle, [STEP])
        host.gone(handle)
    assert owner.told.count(("drafted", 1, 1, [STEP])) == 1
    host.time_s += RECENT_S + 1.0
    assert host.refusal(3) is None


def test_draining_is_told_once_and_dismissing_begins_nothing() -> None:
    host, owner = QuietHost(places=1), Owner(2)
    host.connections.add(owner)
    running = host.start(owner, 1, StartBranch(1, 0, (1,), 1, (), 8))
    host.start(owner, 2, StartBranch(1, 0, (1,), 1, (), 8))
    host.drain()
    host.drain()
    assert owner.told == [("drain",)]
    assert host.refusal(1) == "draining"

    def ending() -> int:
        host.gone(running)
        return 2

    owner.dismiss = ending  # type: ignore[method-assign]
    host.dismiss()
    assert (host.running, len(host.extended), host.stats().dismissed) == (0, 1, 2)


@pytest.mark.parametrize(("after_s", "lines"), [(TELL_AGAIN_S - 1.0, 1), (TELL_AGAIN_S + 1.0, 2)])
def test_a_cause_is_told_once_in_a_while(log: LogLines, after_s: float, lines: int) -> None:
    host = QuietHost()
    host.complain("OSError: 1")
    host.time_s = after_s
    host.complain("OSError: 2")
    assert len(log.lines(logging.ERROR)) == lines
    host.complain("ValueError: 3")
    assert len(log.lines(logging.ERROR)) == lines + 1
