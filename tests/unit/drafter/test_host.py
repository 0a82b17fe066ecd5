"""What a Host needs of whoever owns branches, and what it tells them; with real connections: test_sharing."""

from collections.abc import Sequence

from toys import draft_model

from vllm_wanspec.core.drafter import DraftStep, StartBranch
from vllm_wanspec.drafter.host import Host


class Owner:
    """Remembers what it is told."""

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


class QuietHost(Host):
    """A host whose engine does nothing by itself."""

    def __init__(self) -> None:
        self.time_s = 0.0
        super().__init__(draft_model(), running_branches=8, clock=lambda: self.time_s)
        self.ceased: list[int] = []

    def _extend(self, handle: int, start: StartBranch) -> None:
        pass

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
    assert small.told == large.told == [("resize", 2)]  # eight places for four sessions


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
