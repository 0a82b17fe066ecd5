"""A run as a Chrome trace (Trace Event JSON), for chrome://tracing and Perfetto.

The target and each drafter are processes; a request is a thread of the target, a lane of branches one of its drafter:
a thread for each of hundreds of short branches would be unreadable.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_wanspec.trace.drafting import SessionReplay
from vllm_wanspec.trace.page import write_text
from vllm_wanspec.trace.target import Step
from vllm_wanspec.trace.timeline import Timeline

Entry = dict[str, Any]

LEAST_US = 1.0
"""Shortest slice: an arrow needs one to begin or end in."""


def write_chrome(path: Path, timelines: Sequence[Timeline]) -> None:
    """Write the trace of some requests.

    Raises:
        ConfigError: The file cannot be written.
    """
    trace = {"traceEvents": trace_events(timelines), "displayTimeUnit": "ms"}
    write_text(path, json.dumps(trace, separators=(",", ":"), allow_nan=False))


def trace_events(timelines: Sequence[Timeline]) -> list[Entry]:
    """The events, names first, then by time; microseconds since the first request began."""
    clock = _Clock(min(timeline.target.start_s for timeline in timelines))
    threads = _Threads()
    events: list[Entry] = []
    for number, timeline in enumerate(timelines):
        events += _target_events(timeline, clock, threads, number)
        for session in timeline.sessions:
            events += _drafter_events(timeline, session, clock, threads)
    # A drafter whose clock is behind may have been heard of before the first request.
    early = min((event["ts"] for event in events), default=0.0)
    for event in events:
        event["ts"] = round(event["ts"] - min(early, 0.0), 3)
    return [*threads.names, *sorted(events, key=lambda event: float(event["ts"]))]


class _Clock:
    def __init__(self, start_s: float) -> None:
        self._start_s = start_s

    def __call__(self, at_s: float) -> float:
        return round(1e6 * (at_s - self._start_s), 3)


class _Threads:
    """Numbers for processes and threads, and the events that name them."""

    def __init__(self) -> None:
        self.names: list[Entry] = []
        self._pids: dict[tuple[str, str], int] = {}
        self._tids: dict[tuple[int, str], int] = {}

    def ids(self, side: str, process: str, thread: str) -> Entry:
        """``pid`` and ``tid`` of a thread."""
        pid = self._pids.get((side, process))
        if pid is None:
            pid = self._pids[side, process] = len(self._pids) + 1
            self._name("process", pid, 0, f"{side} ({process})")
        tid = self._tids.get((pid, thread))
        if tid is None:
            tid = self._tids[pid, thread] = len(self._tids) + 1
            self._name("thread", pid, tid, thread)
        return {"pid": pid, "tid": tid}

    def _name(self, kind: str, pid: int, tid: int, name: str) -> None:
        self.names.append({"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}})


def _target_events(timeline: Timeline, clock: _Clock, threads: _Threads, number: int) -> Iterator[Entry]:
    target = timeline.target
    name = target.figures.id
    where = threads.ids("target", target.figures.process, name)
    for index, step in enumerate(target.steps):
        yield from _step_events(step, index, clock, where)
        if step.received_s is not None:
            flow = {"name": "commit", "cat": "wire", "id": f"{number}.{index}"}
            yield {**flow, **where, "ph": "s", "ts": clock(step.end_s) - LEAST_US / 2}
            session = next(session for session in timeline.sessions if session.key == step.peer)
            yield {
                **flow,
                **_session_thread(threads, session, name),
                "ph": "f",
                "bp": "e",
                "ts": clock(step.received_s),
            }
    for wait in target.waits:
        yield _slice("wait", "wait", clock(wait.start_s), clock(wait.end_s), where)
    for arrival in target.arrivals:
        args = {"nodes": arrival.nodes, "stale": arrival.stale, "late": arrival.late, "bytes": arrival.bytes}
        yield _instant("nodes", clock(arrival.at_s), where, args)
    for link in target.links:
        yield _instant(f"session at {link.drafter}", clock(link.start_s), where, {"peer": link.peer})
        if link.end_s is not None:
            yield _instant(link.ending, clock(link.end_s), where, {"drafter": link.drafter})
    sizes = [*((arrival.at_s, arrival.live_nodes) for arrival in target.arrivals)]
    sizes += ((step.end_s, step.live_nodes) for step in target.steps)
    for at_s, size in sorted(sizes):
        yield _counter(f"live nodes of {name}", clock(at_s), where, "nodes", size)


def _step_events(step: Step, index: int, clock: _Clock, where: Entry) -> Iterator[Entry]:
    args = {
        "position": step.position,
        "drafted": step.drafted,
        "committed": step.tokens,
        "accepted": step.accepted,
        "had": step.had,
        "outcome": step.outcome,
    }
    title = f"step {step.accepted}/{len(step.drafted)}" if step.drafted else "step without draft"
    yield _slice(title if index else "prefill", "step", clock(step.start_s), clock(step.end_s), where, args)
    yield _instant(f"commit +{len(step.tokens)} {step.outcome}", clock(step.end_s), where, {"tokens": step.tokens})


def _drafter_events(timeline: Timeline, session: SessionReplay, clock: _Clock, threads: _Threads) -> Iterator[Entry]:
    name = timeline.target.figures.id
    own = _session_thread(threads, session, name)
    for receipt in session.receipts:
        start = clock(receipt.at_s)
        place: Entry = {"position": receipt.position, "tokens": receipt.tokens}
        title = "context received" if receipt.opening else "commit received"
        yield _slice(title, "commit", start, start + LEAST_US, own, place)
    for rejection in session.rejections:
        yield _instant(f"reject: {rejection.code}", clock(rejection.at_s), own, {})
    changes: list[tuple[float, int]] = []
    for branch in sorted(session.branches, key=lambda branch: branch.lane):
        end_s = session.end_s if branch.end_s is None else branch.end_s
        lane = "main line" if branch.lane == 0 else f"branches {branch.lane}"
        where = threads.ids("drafter", session.process, f"{name} {session.key}: {lane}")
        args: Entry = {"branch": branch.number, "node": branch.node, "tokens": branch.tokens, "ending": branch.ending}
        title = "main line" if branch.main else "branch" if branch.promoted_s is None else "branch, then main line"
        yield _slice(title, "branch", clock(branch.start_s), clock(end_s), where, args)
        changes += (branch.start_s, 1), (end_s, -1)
    running = 0
    for at_s, change in sorted(changes):
        running += change
        yield _counter(f"running branches of {name} {session.key}", clock(at_s), own, "branches", running)


def _session_thread(threads: _Threads, session: SessionReplay, name: str) -> Entry:
    return threads.ids("drafter", session.process, f"{name} {session.key}")


def _slice(name: str, kind: str, start: float, end: float, where: Entry, args: Entry | None = None) -> Entry:
    duration = round(max(end - start, 0.0), 3)
    return {"ph": "X", "name": name, "cat": kind, "ts": start, "dur": duration, **where, "args": args or {}}


def _instant(name: str, at: float, where: Entry, args: Entry) -> Entry:
    return {"ph": "i", "s": "t", "name": name, "cat": "event", "ts": at, **where, "args": args}


def _counter(name: str, at: float, where: Entry, unit: str, value: int) -> Entry:
    return {"ph": "C", "name": name, "ts": at, **where, "args": {unit: value}}
