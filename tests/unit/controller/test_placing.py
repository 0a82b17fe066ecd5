"""Which link a pool's sessions are on, where drafters fail: moved, probed, and back when they are well again."""

import pytest
from conftest import LogLines
from two_drafters import STEP_S, VOCAB, Answer, GoodDrafter, TwoDrafters

from vllm_wanspec.core.health import DOUBT_S, MAX_PROBE_S, OPENING, PATIENCE_S, PINGS_UNANSWERED, Why
from vllm_wanspec.core.messages import Close, Commit, Message, Nodes, Open, Reject
from vllm_wanspec.core.states import LinkState
from vllm_wanspec.core.tree import NodeRecord


def silent(_: Message) -> list[Message]:
    return []


class Late:
    """Drafts what is right, each time when it has just been committed."""

    def __init__(self) -> None:
        self._at: dict[int, tuple[int, int, int]] = {}  # a session's length when opened, last id, and position

    def __call__(self, message: Message) -> list[Message]:
        if isinstance(message, Open):
            self._at[message.session] = (len(message.tokens), 0, len(message.tokens))
        elif isinstance(message, Commit) and message.session in self._at:
            opened, last, position = self._at[message.session]
            end = message.position
            records = []
            for token in range(position, end):
                records.append(NodeRecord(last + 1, last, token % VOCAB, -0.1, 0.5))
                last += 1
            self._at[message.session] = (opened, last, end)
            return [Nodes(message.session, opened, tuple(records))] if records else []
        return []


class Mended:
    """Silent until it is mended; what was opened before then it does not know."""

    def __init__(self) -> None:
        self.well = False
        self.opened: list[int] = []
        self._good = GoodDrafter()
        self._known: set[int] = set()

    def __call__(self, message: Message) -> list[Message]:
        if isinstance(message, Open):
            self.opened.append(message.session)
            if self.well:
                self._known.add(message.session)
        if isinstance(message, Open | Commit) and message.session in self._known:
            return self._good(message)
        return []


def run(two: TwoDrafters, seconds: float) -> None:
    for _ in range(round(seconds / STEP_S)):
        two.step()


def on(two: TwoDrafters) -> list[int]:
    """Sessions on the bad link, and on the good one."""
    return [two.pool.sessions_on(link) for link in two.pool.links]


def alone(bad: Answer, requests: int = 4) -> TwoDrafters:
    """The bad drafter is the only one that is connected."""
    two = TwoDrafters(bad, requests=requests)
    good = two.pool.links[1]
    good.welcome = None
    two.pool.link_lost(good)
    return two


def test_sessions_move_from_a_drafter_that_drafts_nothing_and_one_line_says_so(log: LogLines) -> None:
    two = TwoDrafters(silent)
    run(two, PATIENCE_S - 0.5)
    assert on(two) == [4, 4]
    run(two, 1.5)
    assert on(two) == [0, 8]
    bad = two.pool.links[0].health
    assert (bad.state, bad.why, bad.moves) == (LinkState.SUSPECT, Why.UNANSWERED, 4)
    run(two, 60.0)
    [line] = log.warnings()
    said = "suspect, its sessions move to healthy drafters, if there are any: it drafts nothing for what it is asked"
    assert line.startswith(f"drafter bad: {said}; ")
    assert line.endswith("see whether its engine still runs")


def test_what_drafts_too_late_for_any_use_loses_its_sessions(log: LogLines) -> None:
    two = TwoDrafters(Late())
    run(two, 5.0)
    assert on(two) == [4, 4]  # that is too short to judge by
    assert min(two.shares(after_s=15.0).values()) > 0.9
    bad = two.pool.links[0].health
    assert (on(two), bad.why, bad.added) == ([0, 8], Why.USELESS, 0.0)
    assert two.pool.counters.late_hits > 0
    assert "hardly any of its drafts are taken" in log.warnings()[0]


def test_a_drafter_that_helps_is_not_suspected(log: LogLines) -> None:
    two = TwoDrafters(GoodDrafter())
    run(two, 60.0)
    assert on(two) == [4, 4]
    assert not log.warnings()
    assert [link.health.added for link in two.pool.links] == pytest.approx([4.0, 4.0], abs=0.1)


def test_a_request_that_is_forgotten_moves_alone() -> None:
    good = GoodDrafter()
    two = TwoDrafters(lambda message: [] if message.session == 1 else good(message))  # type: ignore[union-attr]
    run(two, PATIENCE_S + 1.0)
    assert on(two) == [3, 5]
    assert two.pool.links[0].health.state is LinkState.HEALTHY


def test_only_so_many_sessions_at_once_wait_for_their_first_draft_where_they_move() -> None:
    two = TwoDrafters(silent, requests=64)
    assert on(two) == [32, 32]
    good = two.answers[two.pool.links[1]]
    slow: list[Message] = []

    def busy(message: Message) -> list[Message]:
        """Serves those that it has; others wait."""
        if isinstance(message, Close | Open | Commit) and message.session > 32:
            slow.append(message)
            return []
        return good(message)

    two.answers[two.pool.links[1]] = busy
    run(two, PATIENCE_S + 1.5)
    assert on(two) == [32 - OPENING, 32 + OPENING]
    two.answers[two.pool.links[1]] = good
    answers = [answer for message in slow for answer in good(message)]
    two.pool.link_received(two.pool.links[1], answers)
    run(two, 2.5)
    assert on(two) == [0, 64]


@pytest.mark.parametrize("urgent", ["r0", "r2"])
def test_those_with_the_fewest_drafts_left_move_first(urgent: str) -> None:
    two = TwoDrafters(GoodDrafter(), requests=4)
    bad = two.pool.links[0]
    assert [two.pool._sessions[name].link for name in ("r0", "r2")] == [bad, bad]
    two.pool.step([(urgent, [3, 4, 5])])
    bad._outbox.take()
    two.pool.link_beats(bad, PINGS_UNANSWERED)
    first, *_ = (message.session for message in bad._outbox.take() if isinstance(message, Close))
    assert {1: "r0", 2: "r2"}[first] == urgent


def test_where_there_is_no_other_a_drafter_keeps_its_sessions_until_it_is_broken(log: LogLines) -> None:
    two = alone(silent)
    run(two, PATIENCE_S + 2.0)
    assert on(two) == [4, 0]
    assert two.pool.links[0].health.state is LinkState.SUSPECT
    run(two, DOUBT_S + PATIENCE_S)
    assert two.pool.links[0].health.state is LinkState.BROKEN
    assert on(two)[0] <= 1
    assert "broken, it gets no session but a probe now and then" in log.warnings()[-1]


def test_a_broken_drafter_gets_ever_fewer_probes_and_all_sessions_when_it_is_well_again(log: LogLines) -> None:
    mended = Mended()
    two = alone(mended)
    run(two, 20.0)
    assert two.pool.links[0].health.state is LinkState.BROKEN
    before = len(mended.opened)
    run(two, 4 * MAX_PROBE_S)
    assert 4 <= len(mended.opened) - before <= 10
    assert on(two)[0] <= 1
    mended.well = True
    run(two, MAX_PROBE_S + PATIENCE_S + 1.0)
    assert on(two) == [4, 0]
    assert min(two.shares(after_s=0.0).values()) > 0.9
    assert two.pool.links[0].health.state is LinkState.HEALTHY
    assert log.lines()[-1] == "drafter bad: healthy again, it gets sessions as before"
    assert len(log.lines()) == 3  # suspect, broken, healthy


def test_new_requests_probe_a_drafter_beside_a_healthy_one() -> None:
    mended = Mended()
    two = TwoDrafters(mended)
    run(two, 10.0)
    before = len(mended.opened)
    mended.well = True
    two.pool.begin([], [("new", [0, 1, 2]), ("another", [0, 1, 2])])
    two._deliver()
    assert len(mended.opened) - before == 1
    assert two.pool.links[0].health.state is LinkState.HEALTHY


def test_a_reject_of_a_probe_costs_the_request_no_more_than_a_step() -> None:
    two = TwoDrafters(lambda m: [Reject(m.session, "engine")] if isinstance(m, Open) else [])
    run(two, 10.0)
    two.pool.begin([], [("new", [0, 1, 2])])
    two._deliver()
    two.length["new"] = 3
    two.step()
    assert two.pool._sessions["new"].link is two.pool.links[1]
    assert two.pool.links[0].health.probes == 1


def test_unanswered_pings_move_sessions_without_a_step() -> None:
    two = TwoDrafters(silent)
    bad = two.pool.links[0]
    two.pool.link_beats(bad, PINGS_UNANSWERED - 1)
    assert on(two) == [4, 4]
    two.pool.link_beats(bad, PINGS_UNANSWERED)
    assert on(two) == [0, 8]
    two.pool.link_beats(bad, 0)
    assert bad.health.state is LinkState.HEALTHY


def test_a_lost_link_s_sessions_open_elsewhere_a_few_at_a_time() -> None:
    two = TwoDrafters(silent, requests=64)
    bad = two.pool.links[0]
    bad.welcome = None
    two.pool.link_lost(bad)
    assert on(two) == [0, 32 + OPENING]
    run(two, 1.0)
    assert on(two) == [0, 64]


def test_steps_whose_drafts_are_not_wanted_say_nothing_of_a_drafter() -> None:
    two = TwoDrafters(GoodDrafter())
    for _ in range(2000):
        two.pool.draft(list(two.length), 0)
        two.now += STEP_S
        rows = [(name, [length % VOCAB]) for name, length in two.length.items()]
        for name, _ in rows:
            two.length[name] += 1
        two.pool.step(rows)
        two._deliver()
    assert [link.health.rows for link in two.pool.links] == [0, 0]
    assert {link.health.state for link in two.pool.links} == {LinkState.HEALTHY}


def test_a_fault_of_ours_in_looking_after_sessions_costs_no_step(
    log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = TwoDrafters(GoodDrafter())

    def faulty(now: float) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(two.pool._placing, "_review", faulty)
    run(two, 3.0)
    assert min(two.shares(after_s=0.0).values()) > 0.9
    [line] = log.warnings()
    assert "sessions stay on their links from now on by a fault of ours" in line
