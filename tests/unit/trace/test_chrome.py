"""The Chrome trace: valid, complete, and its arrows begin and end in slices."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sample import DRAFTER_S, PEER, at_drafter, call, header, write, write_made_up, write_pair

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.trace.chrome import write_chrome
from vllm_wanspec.trace.timeline import load, summarize

Entry = dict[str, Any]


def written(folder: Path, paths: tuple[Path, ...]) -> list[Entry]:
    file = folder / "trace.json"
    write_chrome(file, load(paths, summarize(paths)))
    trace = json.loads(file.read_text("utf-8"))
    assert trace["displayTimeUnit"] == "ms"
    events: list[Entry] = trace["traceEvents"]
    return events


@pytest.fixture
def events(tmp_path: Path) -> list[Entry]:
    return written(tmp_path, write_pair(tmp_path))


def of(events: list[Entry], phase: str, name: str = "") -> list[Entry]:
    return [event for event in events if event["ph"] == phase and event["name"].startswith(name)]


def check(events: list[Entry]) -> None:
    """What the format asks of every trace."""
    named = {(event["name"], event["pid"], event["tid"]) for event in of(events, "M")}
    slices: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        assert event["ph"] in "MXisfC"
        assert isinstance(event["name"], str)
        assert event["name"]
        assert ("process_name", event["pid"], 0) in named
        if event["ph"] != "M":
            assert event["ts"] >= 0
            assert ("thread_name", event["pid"], event["tid"]) in named
        if event["ph"] == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    for thread in slices.values():
        assert all(end <= start + 0.002 for (_, end), (start, _) in pairwise(sorted(thread)))
    ends = {event["id"]: event for event in of(events, "f")}
    assert len(ends) == len(of(events, "s")) == len(of(events, "f"))
    for begin in of(events, "s"):
        end = ends[begin["id"]]
        assert begin["ts"] < end["ts"]
        for event in (begin, end):
            assert any(start <= event["ts"] <= stop for start, stop in slices[event["pid"], event["tid"]])


def test_it_is_valid(events: list[Entry]) -> None:
    check(events)


def test_it_is_complete(events: list[Entry]) -> None:
    processes = [event["args"]["name"] for event in of(events, "M", "process_name")]
    assert processes == ["target (the controller)", "drafter (the drafter)"]
    threads = [event["args"]["name"] for event in of(events, "M", "thread_name")]
    assert threads == ["req-a", "req-a ab#7", "req-a ab#7: main line", "req-a ab#7: branches 1", "req-b"]
    steps = [event["name"] for event in of(events, "X", "step") if event["tid"] == 1]
    assert steps == ["step 0/2", "step 2/2", "step without draft", "step 1/1", *["step without draft"] * 3]
    assert len(of(events, "X", "prefill")) == 2
    [wait] = of(events, "X", "wait")
    assert (wait["ts"], wait["dur"]) == (pytest.approx(162_000), pytest.approx(6_000))
    assert [event["name"] for event in of(events, "X", "main line")] == ["main line", "main line"]
    [branch] = of(events, "X", "branch, then main line")
    assert (branch["ts"], branch["dur"], branch["args"]["node"]) == (20_000, pytest.approx(111_000), 3)
    assert len(of(events, "X", "commit received")) == len(of(events, "s")) == 5
    assert len(of(events, "i", "commit")) == 10
    assert len(of(events, "i", "nodes")) == 9
    others = [event["name"] for event in of(events, "i") if not event["name"].startswith(("commit", "nodes"))]
    assert others == [
        "session at west", "link lost", "session at east", "rejected: overloaded",
    ]  # fmt: skip


def test_counters(events: list[Entry]) -> None:
    assert [event["args"]["branches"] for event in of(events, "C", "running branches")] == [1, 2, 1, 0, 1, 0]
    sizes = [event["args"]["nodes"] for event in of(events, "C", "live nodes of req-a")]
    assert max(sizes) == 7
    assert len(sizes) == 17


def test_pieces_of_a_context_are_no_commits(tmp_path: Path) -> None:
    controller, drafter = write_pair(tmp_path)
    opened, *lines = at_drafter()
    opened["message"][2:] = [1], [16, 64], 3
    piece = call(11, PEER, "commit", DRAFTER_S, message=[5, 7, 1, [2, 3]], out=[])
    write(drafter, [header("drafter", DRAFTER_S), opened, piece, *lines])
    events = written(tmp_path, (controller, drafter))
    check(events)
    [received] = of(events, "X", "context received")
    assert (received["ts"], received["args"]) == (11_000, {"position": 1, "tokens": 2})
    assert len(of(events, "X", "commit received")) == len(of(events, "s")) == 5


@pytest.mark.parametrize("drafters", [0, 1])
def test_made_up_logs(tmp_path: Path, drafters: int) -> None:
    paths = write_made_up(tmp_path, requests=3, tokens=30)
    events = written(tmp_path, paths[: 1 + drafters])
    check(events)
    assert bool(of(events, "s")) is bool(drafters)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    paths = write_pair(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written: "):
        write_chrome(tmp_path / "no" / "trace.json", load(paths, summarize(paths)))
