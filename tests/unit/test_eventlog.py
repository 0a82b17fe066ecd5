"""The event log's file, and logs of both sides from a real pool and a real drafter."""

import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import LogLines
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, toy, wait_until

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.core.messages import Open, from_plain
from vllm_wanspec.eventlog import EventLog

TOY = toy(seed=8)
PROMPT = [3, 2, 1]
LIMIT = 4


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_header_and_then_one_line_per_record(tmp_path: Path) -> None:
    path, before_s, before = tmp_path / "events.jsonl", time.time(), time.monotonic()
    log = EventLog(path, "drafter", "toy")
    log.record({"t": 1.5, "k": "a#1", "call": "close", "out": []})
    log.record({"t": 2.0, "k": "é", "call": "note"})
    log.close()
    header, *records = lines(path)
    assert (header["wanspec_events"], header["side"], header["name"]) == (1, "drafter", "toy")
    assert before_s <= header["wall_s"] <= time.time()
    assert before <= header["at_s"] <= time.monotonic()
    assert records == [{"t": 1.5, "k": "a#1", "call": "close", "out": []}, {"t": 2.0, "k": "é", "call": "note"}]


def test_a_second_run_appends_with_a_header_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for name in ("first", "second"):
        log = EventLog(path, "controller", name)
        log.record({"call": name})
        log.close()
    assert [line.get("name", line.get("call")) for line in lines(path)] == ["first", "first", "second", "second"]


def test_what_was_recorded_is_readable_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, "drafter", "toy")
    log.record({"call": "x"})
    wait_until(lambda: path.exists() and path.read_text(encoding="utf-8").count("\n") == 2)
    log.close()
    log.close()
    log.record({"call": "too late"})
    assert len(lines(path)) == 2


class SlowDisk:
    """A file that takes nothing until it is let."""

    def __init__(self) -> None:
        self.let = threading.Event()
        self.written: list[str] = []

    def __enter__(self) -> "SlowDisk":
        return self

    def __exit__(self, *_: object) -> None: ...

    def write(self, text: str) -> None:
        assert self.let.wait(10.0)
        self.written.append(text)

    def flush(self) -> None: ...


def test_a_slow_disk_costs_events_which_are_counted(
    tmp_path: Path, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk()
    monkeypatch.setattr("vllm_wanspec.eventlog.MAX_WAITING", 10)
    monkeypatch.setattr(Path, "open", lambda *_, **__: disk)
    events = EventLog(tmp_path / "events.jsonl", "drafter", "toy")
    wait_until(events._waiting.empty)  # the header is with the disk
    began_s = time.monotonic()
    for number in range(25):
        events.record({"n": number})
    assert time.monotonic() - began_s < 1.0  # nobody waits for the disk
    disk.let.set()
    events.close()  # the queue is full: its end must get through all the same
    assert not events._thread.is_alive()
    assert [json.loads(text).get("n") for text in disk.written] == [None, *range(10)]
    assert [line for line in log.warnings() if "15 events are missing" in line]


def test_a_path_that_cannot_be_written_is_one_warning(tmp_path: Path, log: LogLines) -> None:
    events = EventLog(tmp_path / "absent" / "events.jsonl", "drafter", "toy")
    wait_until(lambda: not events._thread.is_alive())
    for number in range(100):
        events.record({"n": number})
    events.close()
    [warning] = log.warnings()
    assert "absent/events.jsonl: No such file" in warning
    with pytest.raises(queue.Empty):  # and nothing is kept for nobody, but for what came before the warning
        for _ in range(5):
            events._waiting.get_nowait()


def test_both_sides_of_a_live_pair(tmp_path: Path, short_waits: None) -> None:
    logs = {side: EventLog(tmp_path / f"{side}.jsonl", side, side) for side in ("controller", "drafter")}
    with DrafterServer(TOY, sink=logs["drafter"].record) as server:
        settings = Settings.model_validate(
            {"draft_endpoints": [{"name": "eu", "url": server.url}], "late": {"policy": "fixed"}}
        )
        pool = DraftPool(
            settings,
            fingerprint=FINGERPRINT,
            vocab_size=VOCAB_SIZE,
            speculation_length=LIMIT,
            sink=logs["controller"].record,
            seed=1,
        )
        pool.start()
        wait_until(lambda: pool.links[0].welcome)
        play(pool, 20)
        wait_until(lambda: server.sessions == 0)
        pool.stop()
    for log in logs.values():
        log.close()
    near, far = (lines(tmp_path / f"{side}.jsonl") for side in logs)
    assert [near[0]["side"], far[0]["side"]] == ["controller", "drafter"]
    check_controller(near[1:])
    check_drafter(far[1:])
    [link] = [record for record in near if record.get("call") == "link"]
    assert {record["k"] for record in far[1:]} == {link["peer"]}  # what the two logs know each other's sessions by


def play(pool: DraftPool, steps: int) -> None:
    pool.begin([], [("a", PROMPT)])
    context, draft = list(PROMPT), []
    for _ in range(steps):
        tokens = TOY.verify(context, draft)
        context += tokens
        pool.step([("a", tokens)])
        [draft] = pool.draft(["a"], LIMIT)
    pool.begin(["a"], [])


def check_controller(records: list[dict[str, Any]]) -> None:
    calls = [record["call"] for record in records]
    assert calls[:3] == ["begin", "link", "open"]
    assert calls[-1] == "close"
    assert {"commit", "receive", "draft", "wait"} <= set(calls)
    assert {record["k"] for record in records} == {"a"}
    assert records[0]["context"] == PROMPT
    wait = next(record for record in records if record["call"] == "wait")
    assert wait["waited_s"] > 0.0
    committed = [token for record in records if record["call"] == "commit" for token in record["tokens"]]
    assert committed == TOY.continuation(PROMPT, len(committed))


def check_drafter(records: list[dict[str, Any]]) -> None:
    assert records[0]["call"] == "open"
    opened = from_plain(records[0]["message"])
    assert isinstance(opened, Open)
    assert opened.tokens == tuple(PROMPT)
    times = [record["t"] for record in records]
    assert times == sorted(times)
    out = [action for record in records for action in record["out"]]
    assert {action[0] for action in out} >= {"start", "stop", 6}
    first = next(action for action in out if action[0] == "start")
    assert first[:4] == ["start", 1, 0, len(PROMPT)]  # the context by its length alone
