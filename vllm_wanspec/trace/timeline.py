"""Requests of a run, put together from the event logs of its processes.

The logs are streamed twice: first for the figures of all requests, then for everything about the ones that are shown,
so that memory follows what is shown and not the logs.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.trace.drafting import SessionReplay
from vllm_wanspec.trace.log import Event, read_events
from vllm_wanspec.trace.target import Arrival, Figures, Step, TargetReplay

Progress = Callable[[int], None]
SOME = 5


@dataclass(slots=True)
class Timeline:
    """A request at the target, and its sessions at drafters whose logs were given.

    ``clock_shift_s`` was added to the drafters' times, by peer, where the clocks of the two machines cannot both be
    right.
    """

    target: TargetReplay
    sessions: list[SessionReplay]
    clock_shift_s: dict[str, float] = field(default_factory=dict)

    @property
    def end_s(self) -> float:
        """When the last thing happened."""
        return max([self.target.end_s, *(session.end_s for session in self.sessions)])

    def delays_s(self) -> tuple[list[float], list[float]]:
        """One-way delays: of commits to the drafter, and of nodes from it."""
        up = [step.received_s - step.end_s for step in self.target.steps if step.received_s is not None]
        down = [arrival.at_s - arrival.sent_s for arrival in self.target.arrivals if arrival.sent_s is not None]
        return up, down


def summarize(paths: Sequence[Path], progress: Progress | None = None) -> list[Figures]:
    """The figures of every request, in the order of their beginnings.

    Raises:
        ConfigError: A file is unreadable or broken, or no file is of a controller, or none has a request.
    """
    seen, figures = False, []
    reader = _Requests(keep=False)
    for path in paths:
        for event in read_events(path, progress):
            seen = seen or event.side == "controller"
            begun = reader.follow(event)
            if begun is not None:
                figures.append(begun.figures)
    if not figures:
        files = ", ".join(map(str, paths))
        missing = "no request begins here" if seen else "no events of a controller here; give its log too"
        raise ConfigError(f"{files}: {missing}")
    return figures


def find_request(figures: Sequence[Figures], wanted: str | None) -> Figures:
    """The request of that id, or the only one whose id begins so; without one, the request with most tokens.

    Raises:
        ConfigError: There is none, or more than one.
    """
    if wanted is None:
        return max(figures, key=lambda figure: figure.tokens)
    found = [figure for figure in figures if figure.id == wanted]
    found = found or [figure for figure in figures if figure.id.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    listed = found or figures
    names = ", ".join(repr(figure.id) for figure in listed[:SOME]) + (", ..." if len(listed) > SOME else "")
    problem = f"begins the ids of {len(found)} requests" if found else "is not a request of the log"
    raise ConfigError(f"--request: {wanted!r} {problem}; there are {names}")


def load(paths: Sequence[Path], wanted: Collection[Figures], progress: Progress | None = None) -> list[Timeline]:
    """Everything about the wanted requests, which `summarize` has found in the same files."""
    ids, peers = {figures.id for figures in wanted}, {peer for figures in wanted for peer in figures.peers}
    requests, targets = _Requests(keep=True, ids=ids), []
    sessions: dict[str, SessionReplay] = {}
    for event in (event for path in paths for event in read_events(path, progress)):
        if event.side == "controller":
            begun = requests.follow(event)
            if begun is not None:
                targets.append(begun)
        elif event.key in sessions:
            sessions[event.key].follow(event)
        elif event.key in peers and event.call == "open":
            sessions[event.key] = SessionReplay(event.key, event)
    return [_join(target, [sessions[peer] for peer in target.figures.peers if peer in sessions]) for target in targets]


class _Requests:
    """The requests of controllers' logs; an id that begins again is another request."""

    def __init__(self, *, keep: bool, ids: Collection[str] | None = None) -> None:
        self._keep = keep
        self._ids = ids
        self._begun: dict[str, int] = {}
        self._active: dict[tuple[str, str], TargetReplay] = {}

    def follow(self, event: Event) -> TargetReplay | None:
        """Take an event; the request, if one that is wanted begins with it."""
        if event.side != "controller":
            return None
        key = event.process, event.key
        if event.call != "begin":
            active = self._active.get(key)
            if active is not None:
                active.follow(event)
                if active.closed:
                    del self._active[key]
            return None
        count = self._begun[event.key] = self._begun.get(event.key, 0) + 1
        name = event.key if count == 1 else f"{event.key} ({count})"
        self._active.pop(key, None)
        if self._ids is not None and name not in self._ids:
            return None
        self._active[key] = TargetReplay(name, event, keep=self._keep)
        return self._active[key]


def _join(target: TargetReplay, sessions: list[SessionReplay]) -> Timeline:
    """Tell each commit when it was received and each message when it was sent, on one clock."""
    timeline = Timeline(target, sessions)
    for session in sessions:
        commits, messages = list(_commits(target, session)), list(_messages(target, session))
        up = [received_s - step.end_s for step, received_s in commits]
        down = [arrival.at_s - sent_s for arrival, sent_s in messages]
        shift_s = _clock_shift_s(up, down)
        if shift_s:
            session.shift(shift_s)
            timeline.clock_shift_s[session.key] = shift_s
        for step, received_s in commits:
            step.received_s = received_s + shift_s
        for arrival, sent_s in messages:
            arrival.sent_s = sent_s + shift_s
    return timeline


def _commits(target: TargetReplay, session: SessionReplay) -> Iterator[tuple[Step, float]]:
    received_s = {receipt.position: receipt.at_s for receipt in session.receipts}
    for step in target.steps:
        if step.sent and step.peer == session.key and step.position in received_s:
            yield step, received_s[step.position]


def _messages(target: TargetReplay, session: SessionReplay) -> Iterator[tuple[Arrival, float]]:
    for arrival in target.arrivals:
        if arrival.peer == session.key and arrival.first_id in session.sent_s:
            yield arrival, session.sent_s[arrival.first_id]


def _clock_shift_s(up: list[float], down: list[float]) -> float:
    """What to add to the drafter's clock: nothing, unless something would arrive before it was sent.

    Then the clocks of the two machines differ, and equal shortest delays both ways are the likeliest truth.
    """
    if min([*up, *down], default=0.0) >= 0.0:
        return 0.0
    if up and down:
        return (min(down) - min(up)) / 2
    return -min(up) if up else min(down)
