"""The event log: every input and output of both session kinds, as plain data, and how to play it again.

Sessions that record are subclasses, so that sessions that do not pay nothing. A record is a dict of JSON types; who
writes it, and where, is the caller's. The timeline page, the Chrome trace and the replay test all read it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.draft import NO_DRAFT, Draft
from vllm_wanspec.core.drafter import Action, DrafterSession, DraftStep, StartBranch, StopBranch
from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.messages import Close, Commit, Limits, Nodes, Open, Reject, Resumed, from_plain, to_plain
from vllm_wanspec.core.policy.length import Window
from vllm_wanspec.core.turnaround import Turnaround
from vllm_wanspec.errors import RemoteProtocolError

LOG_VERSION = 1

Record = dict[str, Any]
Sink = Callable[[Record], None]


def header(side: str, name: str, *, wall_s: float, at_s: float) -> Record:
    """A log's first record: whose it is, and its clock (``at_s``) beside the wall clock at one moment."""
    return {"wanspec_events": LOG_VERSION, "side": side, "name": name, "wall_s": wall_s, "at_s": at_s}


def action_to_log(action: Action) -> list[Any]:
    """An action of the drafter's session as plain data; a branch's context by its length alone."""
    match action:
        case StartBranch():
            return ["start", action.branch, action.node, action.length + len(action.path), action.max_tokens]
        case StopBranch():
            return ["stop", action.branch]
        case _:
            return to_plain(action)


class RecordedControllerSession(ControllerSession):
    """A `ControllerSession` that tells a sink of every call.

    The log does not repeat the drafts that `fall_back` and `commit` are given: it is the one that the session gave
    last since the commit before, in the pool as in `replay`, or was told of where a device made it.
    """

    __slots__ = ("_key", "_sink")

    def __init__(
        self,
        context: Sequence[int],
        shared: Shared,
        window: Window | None = None,
        *,
        key: str,
        sink: Sink,
        now: float,
    ) -> None:
        """As `ControllerSession`; ``key`` names the session in the log, ``sink`` takes the records."""
        super().__init__(context, shared, window)
        self._key, self._sink = key, sink
        self._record(now, "begin", context=list(context), windowed=window is not None)

    def open(
        self,
        number: int,
        limits: Limits,
        now: float,
        *,
        vocab_size: int,
        turnaround: Turnaround,
        resumes: Resumed | None = None,
    ) -> Open:
        """See `ControllerSession.open`."""
        opened = super().open(number, limits, now, vocab_size=vocab_size, turnaround=turnaround, resumes=resumes)
        self._record(now, "open", vocab_size=vocab_size, out=[to_plain(opened)])
        return opened

    def note(self, call: str, now: float, **values: Any) -> None:
        """Put something into the log that is no call of the session: which link it is on, a wait."""
        self._record(now, call, **values)

    def commit(self, tokens: Sequence[int], now: float, draft: Draft = NO_DRAFT) -> Commit | None:
        """See `ControllerSession.commit`."""
        message = super().commit(tokens, now, draft)
        self._record(now, "commit", tokens=list(tokens), out=[to_plain(message)] if message else [])
        return message

    def receive(self, message: Nodes | Reject, now: float) -> None:
        """See `ControllerSession.receive`."""
        self._record(now, "receive", message=to_plain(message), out=[])
        super().receive(message, now)

    def draft(self, limit: int, least: float, now: float) -> Draft:
        """See `ControllerSession.draft`."""
        draft = super().draft(limit, least, now)
        self._record(now, "draft", limit=limit, least=least, out=draft.tokens)
        return draft

    def fall_back(self, draft: Draft, limit: int, least: float, now: float) -> Draft:
        """See `ControllerSession.fall_back`."""
        longer = super().fall_back(draft, limit, least, now)
        self._record(now, "fall_back", limit=limit, least=least, out=longer.tokens)
        return longer

    def told(self, tokens: Sequence[int], looked_up: int, match: int, now: float) -> Draft:
        """See `ControllerSession.told`."""
        draft = super().told(tokens, looked_up, match, now)
        self._record(now, "told", looked_up=looked_up, match=match, out=draft.tokens)
        return draft

    def link_lost(self, now: float) -> None:
        """See `ControllerSession.link_lost`."""
        super().link_lost(now)
        self._record(now, "link_lost", out=[])

    def close(self, now: float) -> Close | None:
        """See `ControllerSession.close`."""
        message = super().close(now)
        self._record(now, "close", out=[to_plain(message)] if message else [])
        return message

    def _record(self, now: float, call: str, **values: Any) -> None:
        self._sink({"t": now, "k": self._key, "call": call, **values})


class RecordedDrafterSession(DrafterSession):
    """A `DrafterSession` that tells a sink of every call."""

    def __init__(self, opened: Open, *, key: str, sink: Sink, **settings: Any) -> None:
        """As `DrafterSession`; ``key`` names the session in the log, ``sink`` takes the records."""
        super().__init__(opened, **settings)
        self._key, self._sink = key, sink
        self._opened = opened
        self._settings = {name: value for name, value in settings.items() if isinstance(value, int)}

    def start(self, now: float) -> list[Action]:
        """See `DrafterSession.start`."""
        message = to_plain(self._opened)
        return self._record(now, "open", super().start(now), message=message, settings=self._settings)

    def committed(self, commit: Commit, now: float) -> list[Action]:
        """See `DrafterSession.committed`."""
        return self._record(now, "commit", super().committed(commit, now), message=to_plain(commit))

    def drafted(self, number: int, steps: Iterable[DraftStep], now: float) -> list[Action]:
        """See `DrafterSession.drafted`."""
        steps = list(steps)
        told = [[s.token, s.logprob, s.entropy_nats, list(s.alternatives)] for s in steps]
        return self._record(now, "drafted", super().drafted(number, steps, now), branch=number, steps=told)

    def wanted(self, tokens: int, now: float) -> list[Action]:
        """See `DrafterSession.wanted`."""
        return self._record(now, "wanted", super().wanted(tokens, now), tokens=tokens)

    def ended(self, number: int, now: float) -> list[Action]:
        """See `DrafterSession.ended`."""
        return self._record(now, "ended", super().ended(number, now), branch=number)

    def failed(self, now: float) -> list[Action]:
        """See `DrafterSession.failed`."""
        return self._record(now, "failed", super().failed(now))

    def resize(self, width: int, now: float) -> list[Action]:
        """See `DrafterSession.resize`."""
        return self._record(now, "resize", super().resize(width, now), width=width)

    def close(self, now: float) -> list[Action]:
        """See `DrafterSession.close`."""
        return self._record(now, "close", super().close(now))

    def _record(self, now: float, call: str, actions: list[Action], **values: Any) -> list[Action]:
        out = [action_to_log(action) for action in actions]
        self._sink({"t": now, "k": self._key, "call": call, **values, "out": out})
        return actions


def replay(records: Iterable[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], list[Any]]]:
    """Play the calls of one log again with new sessions, in order.

    Args:
        records: One process's log, its header included; what sessions share (calibration) is learnt again on the way,
            so the log must be whole from the header on.

    Yields:
        Each record of a session's call, and what the new session gives out for it, in JSON's types; equal to the
        record's ``out``, as read from the log, if the code decides as it did when the log was written.
    """
    player: _ControllerReplay | _DrafterReplay | None = None
    for record in records:
        if "wanspec_events" in record:
            player = _ControllerReplay() if record["side"] == "controller" else _DrafterReplay()
        elif player is not None:
            out = player.play(record)
            if out is not None:
                yield record, _plain(out)


def _plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples become lists."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(slots=True)
class _Played:
    """A session, and what it drafted last since its last commit: as the pool keeps them."""

    session: ControllerSession
    draft: Draft = NO_DRAFT


class _ControllerReplay:
    """Sessions of one controller, by the keys of the log."""

    def __init__(self) -> None:
        self._shared = Shared()
        self._played: dict[str, _Played] = {}

    def play(self, record: Mapping[str, Any]) -> list[Any] | None:
        key, now, call = record["k"], record["t"], record["call"]
        if call == "begin":
            window = Window() if record["windowed"] else None
            self._played[key] = _Played(ControllerSession(record["context"], self._shared, window))
            return None
        played = self._played.get(key)
        if played is None:
            return None
        session = played.session
        match call:
            case "open":
                opened = from_plain(record["out"][0])
                assert isinstance(opened, Open)
                vocab_size = record["vocab_size"]
                message: Any = session.open(
                    opened.session,
                    opened.limits,
                    now,
                    vocab_size=vocab_size,
                    turnaround=Turnaround(),
                    resumes=opened.resumes,
                )
            case "commit":
                message = session.commit(record["tokens"], now, played.draft)
                played.draft = NO_DRAFT
            case "receive":
                received = from_plain(record["message"])
                assert isinstance(received, Nodes | Reject)
                with suppress(RemoteProtocolError):  # as when it was recorded; the link's loss comes next
                    session.receive(received, now)
                message = None
            case "draft":
                played.draft = session.draft(record["limit"], record["least"], now)
                return played.draft.tokens
            case "fall_back":
                played.draft = session.fall_back(played.draft, record["limit"], record["least"], now)
                return played.draft.tokens
            case "told":
                played.draft = session.told(record["out"], record["looked_up"], record["match"], now)
                return played.draft.tokens
            case "link_lost":
                session.link_lost(now)
                message = None
            case "close":
                message = session.close(now)
            case _:
                return None
        return [] if message is None else [to_plain(message)]


class _DrafterReplay:
    """Sessions of one drafter; those of one connection (the key's part before ``#``) share a calibration."""

    def __init__(self) -> None:
        self._calibrations: dict[str, Calibration] = {}
        self._sessions: dict[str, DrafterSession] = {}

    def play(self, record: Mapping[str, Any]) -> list[Any] | None:
        key, now, call = record["k"], record["t"], record["call"]
        if call == "open":
            opened = from_plain(record["message"])
            assert isinstance(opened, Open)
            calibration = self._calibrations.setdefault(key.partition("#")[0], Calibration())
            session = DrafterSession(opened, calibration=calibration, **record["settings"])
            self._sessions[key] = session
            return [action_to_log(action) for action in session.start(now)]
        session = self._sessions[key]
        match call:
            case "commit":
                commit = from_plain(record["message"])
                assert isinstance(commit, Commit)
                actions = session.committed(commit, now)
            case "drafted":
                steps = [DraftStep(t, p, e, tuple((a, q) for a, q in others)) for t, p, e, others in record["steps"]]
                actions = session.drafted(record["branch"], steps, now)
            case "wanted":
                actions = session.wanted(record["tokens"], now)
            case "ended":
                actions = session.ended(record["branch"], now)
            case "failed":
                actions = session.failed(now)
            case "resize":
                actions = session.resize(record["width"], now)
            case "close":
                actions = session.close(now)
            case _:
                return None
        return [action_to_log(action) for action in actions]
