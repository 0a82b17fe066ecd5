"""Reading event logs: clocks, what is ignored, and what a broken line is told."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sample import CONTROLLER_S, DRAFTER_S, PEER, WALL_S, at_controller, at_drafter, call, header, write, write_pair

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.trace.log import Event, read_events

BEGIN = call(0, "req", "begin", context=[1])


def read(path: Path) -> list[Event]:
    return list(read_events(path))


def test_both_sides_come_on_one_clock(tmp_path: Path) -> None:
    controller, drafter = write_pair(tmp_path)
    begin, sent, *_ = read(controller)
    received = read(drafter)[0]
    assert (begin.side, begin.process, begin.key, begin.call) == ("controller", "the controller", "req-a", "begin")
    assert begin.at_s == pytest.approx(WALL_S)
    assert sent.data["peer"] == received.key == PEER
    assert received.at_s - sent.at_s == pytest.approx(0.010)


def test_unknown_calls_and_keys_are_ignored(tmp_path: Path) -> None:
    lines = [header("controller", 0.0), {"new": 1, **BEGIN}, {"t": 1, "k": "req", "call": "dreamt", "out": 5}]
    assert [event.call for event in read(write(tmp_path / "log", lines))] == ["begin"]


def test_unknown_messages_and_actions_pass(tmp_path: Path) -> None:
    path = write(tmp_path / "log", [header("drafter", 0.0), call(0, "x#1", "failed", out=[[99, "?"], ["paused", 3]])])
    assert len(read(path)) == 1


def test_a_restart_begins_a_new_clock(tmp_path: Path) -> None:
    lines = [header("controller", CONTROLLER_S), BEGIN, header("controller", 7.0, WALL_S + 60), {**BEGIN, "t": 8.0}]
    assert [event.at_s for event in read(write(tmp_path / "log", lines))] == [
        pytest.approx(WALL_S),
        pytest.approx(WALL_S + 61),
    ]


@pytest.mark.parametrize("cut", [b'{"t": 1', b'{"t": 1.5, "k": "r\xc3', b"{"])
def test_a_truncated_last_line_is_ignored(tmp_path: Path, cut: bytes) -> None:
    path = write(tmp_path / "log", [header("controller", 0.0), BEGIN])
    path.write_bytes(path.read_bytes() + cut)
    assert len(read(path)) == 1


def test_a_line_cut_by_a_restart_is_ignored(tmp_path: Path) -> None:
    restart = json.dumps(header("controller", 0.0)) + "\n" + json.dumps(BEGIN) + "\n"
    path = write(tmp_path / "log", [header("controller", 0.0), BEGIN])
    path.write_text(path.read_text() + '{"t": 3, "k": "r' + restart)
    assert len(read(path)) == 2


def test_a_last_line_without_its_end_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "log", [header("controller", 0.0), BEGIN])
    path.write_text(path.read_text().rstrip("\n"))
    assert len(read(path)) == 1


@pytest.mark.parametrize(
    ("side", "line", "expected"),
    [
        ("controller", "{oops}", "a JSON object"),
        ("controller", "", "a JSON object"),
        ("controller", "[" * 100_000, "a JSON object"),
        ("controller", "[1]", "a JSON object"),
        ("controller", {"t": "now", "k": "r", "call": "begin"}, "an event"),
        ("controller", {"t": 1, "call": "begin"}, "an event"),
        ("controller", call(0, "r", "begin"), 'a list of token ids as "context" of begin'),
        ("controller", call(0, "r", "begin", context=[1, -1]), 'a list of token ids as "context" of begin'),
        ("controller", call(0, "r", "begin", context=[2**80]), 'a list of token ids as "context" of begin'),
        ("controller", call(0, "r", "open", drafter="a", peer=7), 'a text as "peer" of open'),
        ("controller", call(0, "r", "link", drafter="a"), 'a text as "peer" of link'),
        ("controller", call(0, "r", "commit", tokens=[1], out=[[5, 1]]), 'messages or actions as "out" of commit'),
        ("controller", call(0, "r", "commit", tokens=5), 'a list of token ids as "tokens" of commit'),
        ("controller", call(0, "r", "receive", message=[5, 1, 2, [3]]), 'a nodes or reject message as "message"'),
        ("controller", call(0, "r", "receive", message=[6, 1, 2, [[1, 0, 5, -1.0]]]), "a nodes or reject message"),
        ("controller", call(0, "r", "receive", message=[6, 1, 2, [[1, 1, 5, -1.0, 0.0]]]), "a nodes or reject message"),
        ("controller", call(0, "r", "draft", limit=1, out=["a"]), 'a list of token ids as "out" of draft'),
        ("controller", call(0, "r", "wait", waited_s=-1), 'seconds from 0 as "waited_s" of wait'),
        ("drafter", call(0, "r", "open", message=[4, 1]), 'an open message as "message" of open'),
        ("drafter", call(0, "r", "open", message=[4, 1, [1], [8, 8]]), 'an open message as "message" of open'),
        ("drafter", call(0, "r", "open", message=[4, 1, [1], [8, 8], -1]), 'an open message as "message" of open'),
        ("drafter", call(0, "r", "open", message=[4, 1, [1], 8, 8, 4]), 'an open message as "message" of open'),
        ("drafter", call(0, "r", "drafted", branch=1, steps=[[1]]), '[token, logprob, entropy, ...] as "steps"'),
        ("drafter", call(0, "r", "close", out=[["start", 1]]), 'messages or actions as "out" of close'),
    ],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path: Path, side: str, line: Any, expected: str) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "log.jsonl"
    path.write_text(f"{json.dumps(header(side, 0.0))}\n{text}\n{json.dumps(BEGIN)}\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}, line 2: expected ")) as caught:
        read(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        json.dumps(BEGIN) + "\n",
        '{"wanspec_events": 1, "side": "middle", "name": "x", "wall_s": 1, "at_s": 1}\n',
        '{"wanspec_events": 1, "side": "drafter", "name": "x", "wall_s": NaN, "at_s": 1}\n',
    ],
)
def test_a_file_without_header_is_no_event_log(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"{path}, line 1: expected a header")):
        read(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log", [{**header("drafter", 0.0), "wanspec_events": 2}])
    with pytest.raises(ConfigError, match="event log of version 2; this program reads 1"):
        read(path)


@pytest.mark.parametrize("name", ["missing", "."])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read: "):
        read(tmp_path / name)


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    lines = [header("drafter", DRAFTER_S), *at_drafter() * 500]
    path = write(tmp_path / "log", lines)
    counts: list[int] = []
    assert len(list(read_events(path, counts.append))) == len(lines) - 1
    assert sum(counts) == path.stat().st_size
    assert len(counts) > 1


def test_the_sample_is_whole(tmp_path: Path) -> None:
    controller, drafter = write_pair(tmp_path)
    assert len(read(controller)) == len(at_controller()) - 1 + 4
    assert len(read(drafter)) == len(at_drafter())
