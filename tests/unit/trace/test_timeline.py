"""What the timeline says of the sample written by hand, of which every fact is known, and of longer logs."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sample import (
    CONTROLLER_S,
    DRAFTER_S,
    PEER,
    WALL_S,
    at_controller,
    at_drafter,
    call,
    header,
    plain_request,
    write,
    write_made_up,
    write_pair,
)

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.trace.target import Figures, Had, TargetReplay
from vllm_wanspec.trace.timeline import Timeline, find_request, load, summarize
from vllm_wanspec.trace.tree import Fate


def load_one(*paths: Path, name: str | None = None) -> Timeline:
    [timeline] = load(paths, [find_request(summarize(paths), name)])
    return timeline


@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    return load_one(*write_pair(tmp_path))


def ms(at_s: float | None) -> float | None:
    return None if at_s is None else round(1e3 * (at_s - WALL_S), 3)


def test_steps(timeline: Timeline) -> None:
    steps = timeline.target.steps
    assert [(step.had, step.outcome, step.tokens, step.drafted, step.accepted) for step in steps] == [
        ("prefill", "hit", [10], [], 0),
        ("full", "caught", [12], [11, 13], 0),
        ("branch", "miss", [20, 21, 30], [20, 21], 2),
        ("none", "blind", [40], [], 0),
        ("short", "beyond", [42, 43], [42], 1),
        ("none", "unlinked", [44], [], 0),
        ("none", "beyond", [45], [], 0),
        ("none", "blind", [46], [], 0),
    ]
    assert [step.position for step in steps] == [3, 4, 5, 8, 9, 11, 12, 13]
    times = [(0, 40), (41, 80), (81, 121), (122, 161), (168, 210), (216, 250), (256, 290), (291, 330)]
    assert [(ms(step.start_s), ms(step.end_s)) for step in steps] == times
    assert [ms(step.received_s) for step in steps] == [50, 90, 131, 171, 220, None, None, None]


def test_waits_and_links(timeline: Timeline) -> None:
    target = timeline.target
    assert [(ms(wait.start_s), ms(wait.end_s)) for wait in target.waits] == [(162, 168)]
    assert [round(step.waited_s, 6) for step in target.steps] == [0, 0, 0, 0, 0.006, 0, 0, 0]
    assert [(link.drafter, ms(link.start_s), ms(link.end_s), link.ending) for link in target.links] == [
        ("west", 0, 215, "link lost"),
        ("east", 255, 340, "rejected: overloaded"),
    ]


def test_a_session_that_ends_since_its_drafts_are_of_no_use_is_no_lost_link(tmp_path: Path) -> None:
    lines = [line for line in at_controller() if line["t"] <= CONTROLLER_S + 0.215]
    at = next(place for place, line in enumerate(lines) if line["call"] == "link_lost")
    lines.insert(at, call(215, "req-a", "leave"))
    timeline = load_one(write(tmp_path / "log", [header("controller", CONTROLLER_S), *lines]))
    assert [link.ending for link in timeline.target.links] == ["no more of its drafts can be used"]


def test_arrivals(timeline: Timeline) -> None:
    assert [(ms(a.at_s), a.nodes, a.added, a.stale, a.late, a.live_nodes) for a in timeline.target.arrivals] == [
        (25, 1, 1, 0, 0, 1),
        (30, 2, 2, 0, 0, 3),
        (35, 2, 2, 0, 0, 5),
        (36, 2, 2, 0, 0, 7),
        (105, 2, 2, 0, 0, 4),
        (106, 1, 1, 0, 0, 5),
        (135, 1, 0, 1, 0, 0),
        (165, 2, 0, 1, 1, 0),
        (166, 1, 1, 0, 0, 1),
    ]


def test_what_became_of_the_nodes(timeline: Timeline) -> None:
    fates = {node.id: node.fate for node in timeline.target.nodes}
    expected = {
        Fate.FORESEEN: [1],
        Fate.CAUGHT: [3],
        Fate.ACCEPTED: [5, 7, 15],
        Fate.REJECTED: [2, 4],
        Fate.UNUSED: [6, 8, 9, 10],
        Fate.STALE: [11, 14],
        Fate.ECHO: [12],
        Fate.LATE: [13],
    }
    assert fates == {number: fate for fate, numbers in expected.items() for number in numbers}
    counts = timeline.target.count_fates()
    assert (counts["drafted"], counts["used"], counts["wasted"], counts["late"]) == (14, 5, 8, 1)


def test_the_committed_path(timeline: Timeline) -> None:
    path = timeline.target.path
    assert [cell.token for cell in path] == [10, 12, 20, 21, 30, 40, 42, 43, 44, 45, 46]
    assert [cell.position for cell in path] == list(range(4, 15))
    assert [cell.node and cell.node.id for cell in path] == [1, 3, 5, 7, 12, 13, 15, None, None, None, None]
    # A late node belongs to the step that committed its token, not to the one that it came in.
    assert [cell.node.step for cell in path if cell.node] == [0, 1, 2, 2, 2, 3, 4]
    assert [[node.id for node in step.draft_nodes] for step in timeline.target.steps] == [
        [], [2, 4], [5, 7], [], [15], [], [], [],
    ]  # fmt: skip


def test_figures(tmp_path: Path) -> None:
    served, plain = summarize(write_pair(tmp_path))
    assert (served.id, served.drafters, served.peers) == ("req-a", ["west", "east"], [PEER, "cd#1"])
    assert (served.tokens, served.steps, served.offered, served.accepted) == (11, 7, 5, 3)
    assert (served.hits, served.caught, served.misses, served.beyond, served.blind) == (1, 1, 3, 2, 2)
    assert (served.waits, served.nodes, served.steps_without_draft) == (1, 14, 4)
    assert served.tokens_per_step == pytest.approx(10 / 7)
    assert served.ms_per_token == pytest.approx(29.0)
    # 14 nodes of 6 bytes, 7 bytes around each of 9 messages, and the reject; echoes do not travel.
    assert served.bytes_received == 14 * 6 + 9 * 7 + 14
    assert served.bytes_sent > 0
    assert (plain.id, plain.tokens, plain.steps, plain.drafters, plain.misses) == ("req-b", 2, 1, [], 0)


def test_figures_do_not_depend_on_what_is_kept(tmp_path: Path) -> None:
    paths = write_made_up(tmp_path, requests=2, tokens=40)
    figures = summarize(paths)
    assert [timeline.target.figures for timeline in load(paths, figures)] == figures


def test_branches(timeline: Timeline) -> None:
    [session] = timeline.sessions
    assert [
        (b.number, b.node, b.main, b.lane, b.tokens, ms(b.start_s), ms(b.end_s), b.ending, ms(b.promoted_s))
        for b in session.branches
    ] == [
        (1, 0, True, 0, 4, 10, 90, "stopped", None),
        (2, 3, False, 1, 5, 20, 131, "stopped", 90),
        (3, 12, True, 0, 2, 131, 180, "finished", None),
    ]
    assert [(ms(receipt.at_s), receipt.position, receipt.tokens) for receipt in session.receipts] == [
        (50, 3, 1), (90, 4, 1), (131, 5, 3), (171, 8, 1), (220, 9, 2),
    ]  # fmt: skip
    assert session.passes == 11


@pytest.mark.parametrize(
    ("first", "commits", "opening"),
    [
        ([1, 2], [(2, [3, 4]), (4, [5]), (5, [6, 7])], [True, True, False]),
        ([1, 2, 3, 4], [(4, [5]), (5, [6]), (6, [7])], [True, False, False]),
        ([1, 2], [(2, [3, 4, 5, 6]), (5, [6, 7])], [False, False]),
        ([], [(0, [1, 2, 3, 4, 5]), (5, [6, 7])], [True, False]),
        ([1, 2, 3, 4, 5], [(5, [6]), (3, [4, 5]), (3, [4, 5, 6, 7])], [False, True, False]),
    ],
    ids=["two pieces", "one piece", "a commit across the end", "nothing kept", "repeated"],
)
def test_only_what_comes_after_the_opening_context_makes_nodes(
    tmp_path: Path, first: list[int], commits: list[tuple[int, list[int]]], opening: list[bool]
) -> None:
    """The context is [1, 2, 3, 4, 5], however it comes; 6 and 7 are committed later, and are nodes 1 and 2."""

    def does(at_ms: float, name: str, **data: Any) -> dict[str, Any]:
        return call(at_ms, PEER, name, DRAFTER_S, **data)

    lines = [does(10, "open", message=[4, 7, first, [8, 8], 5], out=[])]
    lines += [does(11 + at, "commit", message=[5, 7, *commit], out=[]) for at, commit in enumerate(commits)]
    lines += [
        does(20, "resize", width=1, out=[["start", 1, 2, 7, 8]]),
        does(25, "drafted", branch=1, steps=[[8, -0.1, 0.2, []]], out=[[6, 7, 7, [[3, 2, 8, -0.1, 0.2]]]]),
        does(26, "resize", width=2, out=[["start", 2, 3, 8, 8]]),
    ]
    controller, _ = write_pair(tmp_path)
    timeline = load_one(controller, write(tmp_path / "drafter", [header("drafter", DRAFTER_S), *lines]))
    [session] = timeline.sessions
    assert [(branch.node, branch.main, branch.tokens) for branch in session.branches] == [(2, True, 1), (3, True, 0)]
    assert [receipt.opening for receipt in session.receipts] == opening


def test_a_failed_and_a_running_branch(tmp_path: Path) -> None:
    def does(at_ms: float, key: str, name: str, **data: Any) -> dict[str, Any]:
        return call(at_ms, key, name, DRAFTER_S, **data)

    drafter = write(
        tmp_path / "drafter",
        [
            header("drafter", DRAFTER_S),
            does(10, PEER, "open", message=[4, 7, [1, 2, 3], [8, 8], 3], out=[["start", 1, 0, 3, 8]]),
            does(11, PEER, "resize", width=1, out=[["start", 2, 0, 3, 8]]),
            does(12, PEER, "failed", out=[["stop", 2], [8, 7, "engine"]]),
            does(13, "cd#1", "open", message=[4, 1, [1], [8, 8], 1], out=[["start", 1, 0, 1, 8]]),
            does(14, "ef#1", "commit", message=[5, 1, 1, [1]], out=[]),
        ],
    )
    controller, _ = write_pair(tmp_path)
    failed, running = load_one(controller, drafter).sessions
    assert [(branch.ending, branch.lane) for branch in failed.branches] == [("failed", 0), ("failed", 1)]
    assert [(ms(rejection.at_s), rejection.code) for rejection in failed.rejections] == [(12, "engine")]
    assert [(branch.ending, branch.end_s) for branch in running.branches] == [("", None)]


def test_one_way_delays(timeline: Timeline) -> None:
    up, down = timeline.delays_s()
    assert up == [pytest.approx(0.010)] * 5
    assert down == [pytest.approx(0.010)] * 9
    assert timeline.clock_shift_s == {}


@pytest.mark.parametrize("wrong_s", [-3.0, 0.5])
def test_clocks_that_cannot_both_be_right(tmp_path: Path, timeline: Timeline, wrong_s: float) -> None:
    controller, drafter = write_pair(tmp_path)
    write(drafter, [header("drafter", DRAFTER_S, WALL_S + wrong_s), *at_drafter()])
    shifted = load_one(controller, drafter)
    assert shifted.clock_shift_s == {PEER: pytest.approx(-wrong_s)}
    up, down = shifted.delays_s()
    assert up == [pytest.approx(0.010)] * 5
    assert down == [pytest.approx(0.010)] * 9
    for branch, right in zip(shifted.sessions[0].branches, timeline.sessions[0].branches, strict=True):
        assert branch.start_s == pytest.approx(right.start_s)


def test_the_order_of_the_files_does_not_matter(tmp_path: Path, timeline: Timeline) -> None:
    controller, drafter = write_pair(tmp_path)
    turned = load_one(drafter, controller)
    assert turned.target.steps[2].received_s == timeline.target.steps[2].received_s


def test_without_the_drafter_log(tmp_path: Path) -> None:
    controller, _ = write_pair(tmp_path)
    alone = load_one(controller)
    assert alone.sessions == []
    assert all(step.received_s is None for step in alone.target.steps)
    assert len(alone.target.steps) == 8


def test_both_sides_in_one_file(tmp_path: Path) -> None:
    lines = [header("controller", CONTROLLER_S), *at_controller(), header("drafter", DRAFTER_S), *at_drafter()]
    timeline = load_one(write(tmp_path / "both", lines))
    assert len(timeline.sessions) == 1


def test_an_id_that_begins_again_is_another_request(tmp_path: Path) -> None:
    lines = [header("controller", CONTROLLER_S), *plain_request("same"), *plain_request("same")[:3]]
    path = write(tmp_path / "log", lines)
    assert [(figures.id, figures.tokens) for figures in summarize([path])] == [("same", 2), ("same (2)", 2)]
    assert not load_one(path, name="same (2)").target.closed


def test_events_of_a_request_that_never_began_are_ignored(tmp_path: Path) -> None:
    lines = [header("controller", CONTROLLER_S), *plain_request("late")[1:], *plain_request("whole")]
    assert [figures.id for figures in summarize([write(tmp_path / "log", lines)])] == ["whole"]


def test_messages_of_an_earlier_session_are_ignored(tmp_path: Path) -> None:
    lines = at_controller()
    late = call(300, "req-a", "receive", message=[6, 7, 3, [[16, 15, 5, -0.1, 0.1]]], out=[])
    before = next(index for index, line in enumerate(lines) if line["t"] > late["t"])
    path = write(tmp_path / "log", [header("controller", CONTROLLER_S), *lines[:before], late, *lines[before:]])
    assert len(load_one(path).target.arrivals) == 9


def test_draft_tokens_that_were_not_verified_are_not_rejected(tmp_path: Path) -> None:
    """The scheduler may cut a draft: [10, 11] was taken, and the step yielded only 10."""
    lines = [
        header("controller", CONTROLLER_S),
        call(0, "r", "begin", context=[1]),
        call(0, "r", "open", drafter="west", peer=PEER, out=[]),
        call(1, "r", "receive", message=[6, 7, 1, [[1, 0, 10, -0.1, 0.2], [2, 1, 11, -0.1, 0.2]]], out=[]),
        call(2, "r", "draft", limit=2, out=[10, 11]),
        call(3, "r", "commit", tokens=[10], out=[]),
    ]
    target = load_one(write(tmp_path / "log", lines)).target
    assert [node.fate for node in target.nodes] == [Fate.FORESEEN, Fate.LEFT]


def test_drafts_that_a_device_made_are_shown_like_others(tmp_path: Path) -> None:
    """[10, 11] came from the tree, 12 from prompt lookup; the target took the first two."""
    nodes = [[2, 1, 10, -0.1, 0.2], [3, 2, 11, -0.1, 0.2]]  # 1 stands for the 9 that was committed
    lines = [
        header("controller", CONTROLLER_S),
        call(0, "r", "begin", context=[1]),
        call(0, "r", "open", drafter="west", peer=PEER, out=[]),
        call(1, "r", "commit", tokens=[9], out=[]),
        call(2, "r", "receive", message=[6, 7, 2, nodes], out=[]),
        call(30, "r", "told", looked_up=1, match=3, out=[10, 11, 12]),
        call(30, "r", "commit", tokens=[10, 11, 99], out=[]),
        call(60, "r", "commit", tokens=[98], out=[]),
    ]
    target = load_one(write(tmp_path / "log", lines)).target
    assert [(step.had, step.drafted, step.accepted) for step in target.steps] == [
        (Had.PREFILL, [], 0),
        (Had.FULL, [10, 11, 12], 2),
        (Had.NONE, [], 0),
    ]
    assert [node.fate for node in target.nodes] == [Fate.ECHO, Fate.ACCEPTED, Fate.ACCEPTED]
    assert target.figures.bytes_sent == 0
    assert target.steps[1].end_s - target.steps[1].start_s == pytest.approx(0.029)


def test_orphans_and_repeats_do_no_harm(tmp_path: Path) -> None:
    nodes = [[5, 4, 10, -0.1, 0.2], [6, 0, 11, -0.1, 0.2], [7, 0, 11, -0.1, 0.2], [6, 0, 12, -0.1, 0.2]]
    lines = [
        header("controller", CONTROLLER_S),
        call(0, "r", "begin", context=[1]),
        call(0, "r", "open", drafter="west", peer=PEER, out=[]),
        call(1, "r", "receive", message=[6, 7, 1, nodes], out=[]),
        call(3, "r", "commit", tokens=[99], out=[]),
    ]
    target: TargetReplay = load_one(write(tmp_path / "log", lines)).target
    assert [node.fate for node in target.nodes] == [Fate.STALE, Fate.UNUSED, Fate.STALE, Fate.UNUSED]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("req-c", "'req-c' is not a request of the log; there are 'req-a', 'req-b'"),
        ("req", "'req' begins the ids of 2 requests; there are 'req-a', 'req-b'"),
    ],
)
def test_an_unknown_request_is_told_the_known_ones(tmp_path: Path, wanted: str, message: str) -> None:
    figures = summarize(write_pair(tmp_path))
    with pytest.raises(ConfigError, match=f"^--request: {message}$"):
        find_request(figures, wanted)


def test_only_some_known_requests_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"'r4', \.\.\.$"):
        find_request([Figures(f"r{number}", "p") for number in range(9)], "x")


def test_finding_a_request(tmp_path: Path) -> None:
    figures = summarize(write_pair(tmp_path))
    assert find_request(figures, None).id == "req-a"
    assert find_request(figures, "req-b").id == "req-b"
    assert find_request([Figures("long-id", "p"), *figures], "long").id == "long-id"


def test_no_controller_and_no_request(tmp_path: Path) -> None:
    _, drafter = write_pair(tmp_path)
    with pytest.raises(ConfigError, match="no events of a controller"):
        summarize([drafter])
    with pytest.raises(ConfigError, match="no request begins here"):
        summarize([write(tmp_path / "log", [header("controller", 0.0), call(0, "r", "link_lost")])])


def test_made_up_logs_add_up(tmp_path: Path) -> None:
    paths = write_made_up(tmp_path, requests=2, tokens=60)
    for timeline in load(paths, summarize(paths)):
        target, counts = timeline.target, timeline.target.count_fates()
        assert sum(counts[fate] for fate in Fate) == len(target.nodes)
        assert counts["used"] + counts["late"] + counts["wasted"] == counts["drafted"] == target.figures.nodes
        assert counts[Fate.ACCEPTED] == target.figures.accepted == sum(step.accepted for step in target.steps)
        assert counts[Fate.CAUGHT] == target.figures.caught
        assert [node.id for node in target.nodes] == list(range(1, len(target.nodes) + 1))
        assert len(target.path) == target.figures.tokens == sum(len(step.tokens) for step in target.steps)
        assert all(step.received_s is not None and step.received_s > step.end_s for step in target.steps[:-1])
        assert all(arrival.sent_s is not None and arrival.sent_s < arrival.at_s for arrival in target.arrivals)
        [session] = timeline.sessions
        for lane in {branch.lane for branch in session.branches}:
            ends = [(branch.start_s, branch.end_s) for branch in session.branches if branch.lane == lane]
            assert all(end is None or end <= start for (_, end), (start, _) in pairwise(ends))
