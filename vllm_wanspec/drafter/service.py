"""The session host: sessions of all connections, over a draft engine and whatever transport carries the frames.

One event loop owns everything here. Engine output and commits change sessions; the nodes that follow wait in the
connection's outbox until its writer takes them, several sessions' nodes in one frame.
"""

import asyncio
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from vllm_wanspec.core.calibration import Calibration
from vllm_wanspec.core.drafter import Action, DrafterSession, DraftStep, StartBranch, StopBranch
from vllm_wanspec.core.events import RecordedDrafterSession, Sink
from vllm_wanspec.core.messages import (
    MAX_NODES_PER_MESSAGE,
    PROTOCOL_VERSION,
    Close,
    Commit,
    Hello,
    Message,
    Nodes,
    Open,
    Ping,
    Pong,
    Refuse,
    Reject,
    Welcome,
    decode,
    frames,
)
from vllm_wanspec.drafter.engines import DraftEngine
from vllm_wanspec.errors import RemoteProtocolError

logger = logging.getLogger("vllm.wanspec.drafter")

MAX_OUTBOX = 16384
DEFAULT_RUNNING_BRANCHES = 64


@dataclass(frozen=True)
class DraftModel:
    """What a drafter says of itself; sizes as in `Welcome`."""

    name: str
    fingerprint: str
    vocab_size: int
    max_context: int
    max_sessions: int = 256
    max_nodes: int = 4096


class HostStats(NamedTuple):
    """A host's counts.

    Attributes:
        sessions: Open sessions.
        running: Branches that the engine is extending.
        drafted_tokens: Tokens that the engine gave for sessions.
        branches_started: Engine requests.
        branch_seconds: Time that branches have run, summed over them.
        first_tokens: Branches that have given a token.
        first_seconds: From their start to it, summed over them.
        gap_seconds: Between a branch's tokens, summed over all that are not its first.
    """

    sessions: int = 0
    running: int = 0
    drafted_tokens: int = 0
    branches_started: int = 0
    branch_seconds: float = 0.0
    first_tokens: int = 0
    first_seconds: float = 0.0
    gap_seconds: float = 0.0


@dataclass(slots=True)
class _Owner:
    """Whose branch the engine extends, and when it began or gave its last token."""

    connection: "Connection"
    number: int
    branch: int
    since_s: float
    fresh: bool = True


class Host(ABC):
    """What the connections of one drafter share: the way to the engine, its places for running branches, and counts.

    ``drafted_tokens`` and ``branches_started`` are as in `HostStats`.
    """

    def __init__(
        self,
        model: DraftModel,
        *,
        running_branches: int = DEFAULT_RUNNING_BRANCHES,
        sink: Sink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin without connections.

        Args:
            model: What the engine serves.
            running_branches: Engine requests at a time, over all sessions; each session may always have one.
            sink: Takes the event log's records.
            clock: Seconds, monotonic.
        """
        self.model = model
        self.sink = sink
        self.now = clock
        self.connections: set[Connection] = set()
        self.drafted_tokens = 0
        self.branches_started = 0
        self._first_tokens = 0
        self._first_seconds = 0.0
        self._gap_seconds = 0.0
        self._places = running_branches
        self._handles = itertools.count(1)
        self._owners: dict[int, _Owner] = {}
        self._running = 0
        self._branch_seconds = 0.0
        self._changed_s = clock()

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return sum(connection.sessions for connection in self.connections)

    @property
    def running(self) -> int:
        """Branches that the engine is extending."""
        return self._running

    @property
    def branch_seconds(self) -> float:
        """Time that branches have run, summed over them: its growth per second is their mean number."""
        return self._branch_seconds + self._running * (self.now() - self._changed_s)

    def count_running(self, change: int) -> None:
        """A branch began (1) or ended (-1)."""
        self._branch_seconds = self.branch_seconds
        self._changed_s = self.now()
        self._running += change
        self.branches_started += change > 0

    def width(self) -> int:
        """Branches that one session may run now: an equal share of the places, at least one."""
        return max(1, self._places // max(1, self.sessions))

    def share(self) -> None:
        """Tell all sessions their share of the places."""
        width = self.width()
        for connection in self.connections:
            connection.resize(width)

    def stats(self) -> HostStats:
        """The counts now."""
        return HostStats(
            self.sessions,
            self.running,
            self.drafted_tokens,
            self.branches_started,
            self.branch_seconds,
            self._first_tokens,
            self._first_seconds,
            self._gap_seconds,
        )

    def start(self, connection: "Connection", number: int, start: StartBranch) -> int:
        """Let the engine extend a branch of a session; its handle."""
        handle = next(self._handles)
        self._owners[handle] = _Owner(connection, number, start.branch, self.now())
        self.count_running(1)
        self._extend(handle, start)
        return handle

    def stop(self, handle: int) -> None:
        """Let the engine drop a branch."""
        if handle in self._owners:
            self._cease(handle)

    def drafted(self, handle: int, steps: Sequence[DraftStep]) -> None:
        """The engine gave tokens for a branch."""
        owner = self._owners.get(handle)
        if owner is not None:
            self._time(owner, len(steps))
            owner.connection.drafted(owner.number, owner.branch, steps)

    def ended(self, handle: int) -> None:
        """The engine has given all that a branch asked for."""
        owner = self._owners.get(handle)
        if owner is not None:
            owner.connection.ended(owner.number, owner.branch)

    def failed(self, handle: int, reason: str) -> None:
        """The engine cannot serve a branch."""
        owner = self._owners.get(handle)
        if owner is not None:
            owner.connection.failed(owner.number, owner.branch, reason)

    def gone(self, handle: int) -> None:
        """The engine is through with a branch."""
        owner = self._owners.pop(handle)
        owner.connection.forget(owner.number, owner.branch)
        self.count_running(-1)

    def _time(self, owner: _Owner, tokens: int) -> None:
        """Count tokens of a branch, and how long it took to give them."""
        now = self.now()
        waited_s, owner.since_s = now - owner.since_s, now
        self.drafted_tokens += tokens
        if owner.fresh and tokens:
            owner.fresh = False
            self._first_tokens += 1
            self._first_seconds += waited_s
        elif tokens:
            self._gap_seconds += waited_s

    @abstractmethod
    def _extend(self, handle: int, start: StartBranch) -> None:
        """Have the engine begin."""

    @abstractmethod
    def _cease(self, handle: int) -> None:
        """Have the engine stop."""


class StreamingHost(Host):
    """A host over an engine that streams, each branch in a task of its own."""

    def __init__(self, engine: DraftEngine, model: DraftModel, **settings: Any) -> None:
        """Serve over ``engine``; settings as for `Host`."""
        super().__init__(model, **settings)
        self.engine = engine
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def settled(self, handles: Iterable[int]) -> None:
        """Wait until the engine is through with branches that were stopped."""
        tasks = [self._tasks[handle] for handle in handles if handle in self._tasks]
        await asyncio.gather(*tasks, return_exceptions=True)

    def _extend(self, handle: int, start: StartBranch) -> None:
        task = self._tasks[handle] = asyncio.create_task(self._run(handle, start))
        # Not in the task itself: one that is stopped before it has begun never runs at all.
        task.add_done_callback(partial(self._finished, handle))

    def _cease(self, handle: int) -> None:
        self._tasks[handle].cancel()

    async def _run(self, handle: int, start: StartBranch) -> None:
        try:
            async with aclosing(self.engine.draft(start.tokens, start.max_tokens)) as outputs:
                async for steps in outputs:
                    self.drafted(handle, steps)
            self.ended(handle)
        except Exception as error:
            self.failed(handle, f"{type(error).__name__}: {error}")

    def _finished(self, handle: int, task: asyncio.Task[None]) -> None:
        del self._tasks[handle]
        self.gone(handle)


class Connection:
    """One controller's connection.

    Feed it with `receive` and put on the wire what `frames` gives. Where one of them raises or refuses the connection
    ends, and `end` then stops everything that the engine still does for it.
    """

    def __init__(self, host: Host, wake: Callable[[], None] = lambda: None) -> None:
        """Serve from ``host``; ``wake`` is called when there is something to send."""
        self._host = host
        self._model = host.model
        self._wake = wake
        self._calibration = Calibration()
        self._client = ""
        self._sessions: dict[int, DrafterSession] = {}
        self._last_number = 0
        self._handles: dict[tuple[int, int], int] = {}
        self._outbox: list[Message] = []
        self._greeted = False
        host.connections.add(self)

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    @property
    def running(self) -> int:
        """Branches that the engine is extending."""
        return len(self._handles)

    def receive(self, frame: bytes) -> bool:
        """Take one frame; False when the controller was refused and the connection should end.

        Raises:
            RemoteProtocolError: No correct controller sends that, or it sends without reading. Its sessions' lookahead
                bounds what one message can put into the outbox, so checking here bounds the outbox.
        """
        if len(self._outbox) >= MAX_OUTBOX:
            raise RemoteProtocolError(f"the controller does not read: {MAX_OUTBOX} messages wait for it")
        for message in decode(frame):
            if not self._greeted:
                return self._greet(message)
            self._take(message)
        return True

    def frames(self) -> list[bytes]:
        """What is to be sent now."""
        batch, self._outbox = self._outbox, []
        return list(frames(gathered(batch)))

    def resize(self, width: int) -> None:
        """Let each session run ``width`` branches."""
        for number, session in list(self._sessions.items()):
            if session.width != min(width, session.limits.running_branches):
                self._do(number, session.resize(width, self._host.now()))

    def drafted(self, number: int, branch: int, steps: Sequence[DraftStep]) -> None:
        """The engine gave tokens for a session's branch."""
        session = self._sessions.get(number)
        if session is not None:
            self._do(number, session.drafted(branch, steps, self._host.now()))

    def ended(self, number: int, branch: int) -> None:
        """The engine has given all that a session's branch asked for."""
        session = self._sessions.get(number)
        if session is not None:
            self._do(number, session.ended(branch, self._host.now()))

    def failed(self, number: int, branch: int, reason: str) -> None:
        """The engine cannot serve a session's branch."""
        session = self._sessions.get(number)
        if session is not None and branch in session.running:
            logger.error("draft engine failed (%s); session %d rejected", reason, number)
            self._do(number, session.failed(self._host.now()))

    def forget(self, number: int, branch: int) -> None:
        """The engine is through with a session's branch."""
        del self._handles[number, branch]

    def end(self) -> list[int]:
        """End all sessions; the handles of the branches that the engine still has."""
        for number in list(self._sessions):
            self._end(number)
        self._host.connections.discard(self)
        self._host.share()
        return list(self._handles.values())

    def _greet(self, message: Message) -> bool:
        if not isinstance(message, Hello):
            raise RemoteProtocolError("the first message is not hello")
        model = self._model
        refusal: Refuse | None = None
        if message.version != PROTOCOL_VERSION:
            refusal = Refuse("version", f"this drafter speaks version {PROTOCOL_VERSION}, not {message.version}")
        elif message.fingerprint != model.fingerprint:
            refusal = Refuse("vocabulary", f"the tokenizer of {model.name} maps ids to other tokens than the target's")
        answer: Message = refusal or Welcome(
            PROTOCOL_VERSION,
            model.name,
            model.vocab_size,
            model.fingerprint,
            model.max_sessions,
            model.max_nodes,
            model.max_context,
        )
        self._greeted = refusal is None
        self._client = message.client
        self._post(answer)
        return self._greeted

    def _take(self, message: Message) -> None:
        match message:
            case Open():
                self._open(message)
            case Commit(session=number):
                session = self._sessions.get(number)
                if session is not None:
                    self._do(number, session.committed(message, self._host.now()))
                elif number > self._last_number:
                    raise RemoteProtocolError(f"commit to session {number}, which was never opened")
            case Close(session=number):
                self._end(number)
            case Ping(sent_us=sent_us):
                self._post(Pong(sent_us))
            case _:
                raise RemoteProtocolError(f"unexpected {type(message).__name__.lower()} message")

    def _open(self, opened: Open) -> None:
        number, model = opened.session, self._model
        if number <= self._last_number:
            raise RemoteProtocolError(f"session number {number} does not rise above {self._last_number}")
        self._last_number = number
        if len(self._sessions) >= model.max_sessions:
            self._post(Reject(number, "overloaded"))
        elif len(opened.tokens) > model.max_context:
            self._post(Reject(number, "too_long"))
        elif max(opened.tokens) >= model.vocab_size:
            self._post(Reject(number, "vocabulary"))
        elif opened.limits.max_nodes > model.max_nodes:
            raise RemoteProtocolError(f"session {number} wants {opened.limits.max_nodes} nodes of {model.max_nodes}")
        else:
            session = self._sessions[number] = self._new_session(opened)
            now = self._host.now()
            self._do(number, session.start(now))
            self._host.share()

    def _new_session(self, opened: Open) -> DrafterSession:
        settings: dict[str, Any] = {
            "vocab_size": self._model.vocab_size,
            "max_context": self._model.max_context,
            "calibration": self._calibration,
            "width": 1,  # until all have their share
        }
        sink = self._host.sink
        if sink is None:
            return DrafterSession(opened, **settings)
        return RecordedDrafterSession(opened, key=f"{self._client}#{opened.session}", sink=sink, **settings)

    def _do(self, number: int, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartBranch(branch=branch):
                    self._handles[number, branch] = self._host.start(self, number, action)
                case StopBranch(branch=branch):
                    self._host.stop(self._handles.get((number, branch), 0))
                case Reject():
                    self._sessions.pop(number, None)
                    self._post(action)
                    self._host.share()
                case _:
                    self._post(action)

    def _end(self, number: int) -> None:
        session = self._sessions.pop(number, None)
        if session is not None:
            self._do(number, session.close(self._host.now()))
            self._host.share()

    def _post(self, message: Message) -> None:
        """Queue a message for the writer."""
        self._outbox.append(message)
        self._wake()


class Port(Protocol):
    """One controller's way to a host; `receive` and `frames` may be awaited side by side."""

    async def receive(self, frame: bytes) -> bool:
        """Hand in a frame; see `Connection.receive`."""
        ...

    async def frames(self) -> list[bytes]:
        """Wait for something to send."""
        ...

    def leftovers(self) -> list[bytes]:
        """What is to be sent to a controller that was refused."""
        ...

    async def close(self) -> None:
        """End all sessions."""
        ...


class LocalPort:
    """A `Port` to a host in the same event loop."""

    def __init__(self, host: StreamingHost) -> None:
        """Connect."""
        self._host = host
        self._written = asyncio.Event()
        self.connection = Connection(host, self._written.set)

    async def receive(self, frame: bytes) -> bool:
        """See `Port`."""
        return self.connection.receive(frame)

    async def frames(self) -> list[bytes]:
        """See `Port`."""
        await self._written.wait()
        self._written.clear()
        return self.connection.frames()

    def leftovers(self) -> list[bytes]:
        """See `Port`."""
        return self.connection.frames()

    async def close(self) -> None:
        """End all sessions and wait until their engine requests are gone."""
        await self._host.settled(self.connection.end())


async def serve(port: Port, incoming: AsyncIterator[bytes], send: Callable[[bytes], Awaitable[None]]) -> None:
    """Carry a controller's frames both ways until it goes or is refused; then close the port.

    Args:
        port: To the host.
        incoming: What the controller sends, until it goes.
        send: Puts a frame on the wire, and may wait for the peer.

    Raises:
        RemoteProtocolError: No correct controller does that. What ``incoming`` and ``send`` raise comes out too.
    """

    async def read() -> None:
        async for frame in incoming:
            if not await port.receive(frame):
                for last in port.leftovers():
                    await send(last)
                return

    async def write() -> None:
        while True:
            for frame in await port.frames():
                await send(frame)

    tasks = asyncio.create_task(read()), asyncio.create_task(write())
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await port.close()


def gathered(messages: Sequence[Message]) -> list[Message]:
    """The same messages with each session's successive nodes in one: one engine step gives every branch its own."""
    result: list[Message] = []
    last: dict[int, int] = {}
    for message in messages:
        if isinstance(message, Nodes):
            place = last.get(message.session)
            known = result[place] if place is not None else None
            if place is not None and isinstance(known, Nodes) and known.seen == message.seen:
                nodes = known.nodes + message.nodes
                if len(nodes) <= MAX_NODES_PER_MESSAGE:
                    result[place] = Nodes(known.session, known.seen, nodes)
                    continue
            last[message.session] = len(result)
        result.append(message)
    return result
