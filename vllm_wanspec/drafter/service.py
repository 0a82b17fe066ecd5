"""The session host: sessions of all connections, over a draft engine and whatever transport carries the frames.

One event loop owns everything here. Engine output and commits change sessions; the nodes that follow wait in the
connection's outbox until its writer takes them, several sessions' nodes in one frame.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_wanspec.core.calibration import Calibration
from vllm_wanspec.core.drafter import Action, DrafterSession, StartBranch, StopBranch
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


class Host:
    """What the connections of one drafter share: the engine, its places for running branches, and counts.

    Attributes:
        drafted_tokens: Tokens that the engine gave for sessions.
        branches_started: Engine requests.
    """

    def __init__(
        self,
        engine: DraftEngine,
        model: DraftModel,
        *,
        running_branches: int = DEFAULT_RUNNING_BRANCHES,
        sink: Sink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Serve over ``engine``.

        Args:
            engine: Continues contexts.
            model: What it serves.
            running_branches: Engine requests at a time, over all sessions; each session may always have one.
            sink: Takes the event log's records.
            clock: Seconds, monotonic.
        """
        self.engine = engine
        self.model = model
        self.sink = sink
        self.now = clock
        self.connections: set[Connection] = set()
        self.drafted_tokens = 0
        self.branches_started = 0
        self._places = running_branches
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


class Connection:
    """One controller's connection.

    Feed it with `receive`; run `write` beside. Both end the connection by raising or returning, and `close` then
    stops everything that the engine still does for it.
    """

    def __init__(self, host: Host, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Serve from ``host``; ``send`` puts one frame on the wire and may wait for the peer."""
        self._host = host
        self._model = host.model
        self._send = send
        self._calibration = Calibration()
        self._client = ""
        self._sessions: dict[int, DrafterSession] = {}
        self._last_number = 0
        self._tasks: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._outbox: list[Message] = []
        self._wake = asyncio.Event()
        self._greeted = False
        host.connections.add(self)

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    @property
    def running(self) -> int:
        """Branches that the engine is extending."""
        return len(self._tasks)

    async def receive(self, frame: bytes) -> bool:
        """Take one frame; False when the controller was refused and the connection should end.

        Raises:
            RemoteProtocolError: No correct controller sends that, or it sends without reading. Its sessions' lookahead
                bounds what one message can put into the outbox, so checking here bounds the outbox.
        """
        if len(self._outbox) >= MAX_OUTBOX:
            raise RemoteProtocolError(f"the controller does not read: {MAX_OUTBOX} messages wait for it")
        for message in decode(frame):
            if not self._greeted:
                return await self._greet(message)
            self._take(message)
        return True

    async def write(self) -> None:
        """Send what gathers in the outbox, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._outbox = self._outbox, []
            for frame in frames(gathered(batch)):
                await self._send(frame)

    def resize(self, width: int) -> None:
        """Let each session run ``width`` branches."""
        for number, session in list(self._sessions.items()):
            if session.width != min(width, session.limits.running_branches):
                self._do(number, session.resize(width, self._host.now()))

    async def close(self) -> None:
        """End all sessions and wait until their engine requests are gone."""
        for number in list(self._sessions):
            self._end(number)
        self._host.connections.discard(self)
        self._host.share()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _greet(self, message: Message) -> bool:
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
        for frame in frames([answer]):
            await self._send(frame)
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
                    self._host.count_running(1)
                    task = self._tasks[number, branch] = asyncio.create_task(self._run(number, action))
                    # Not in the task itself: one that is stopped before it has begun never runs at all.
                    task.add_done_callback(partial(self._forget, number, branch))
                case StopBranch(branch=branch):
                    if (number, branch) in self._tasks:
                        self._tasks[number, branch].cancel()
                case Reject():
                    self._sessions.pop(number, None)
                    self._post(action)
                    self._host.share()
                case _:
                    self._post(action)

    async def _run(self, number: int, start: StartBranch) -> None:
        """Let the engine extend one branch, and tell the session."""
        try:
            async with aclosing(self._host.engine.draft(start.tokens, start.max_tokens)) as outputs:
                async for steps in outputs:
                    session = self._sessions.get(number)
                    if session is None:
                        return
                    self._host.drafted_tokens += len(steps)
                    self._do(number, session.drafted(start.branch, steps, self._host.now()))
            session = self._sessions.get(number)
            if session is not None:
                self._do(number, session.ended(start.branch, self._host.now()))
        except Exception as error:
            session = self._sessions.get(number)
            if session is not None and start.branch in session.running:
                logger.error("draft engine failed (%s: %s); session %d rejected", type(error).__name__, error, number)
                self._do(number, session.failed(self._host.now()))

    def _forget(self, number: int, branch: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number, branch]
        self._host.count_running(-1)

    def _end(self, number: int) -> None:
        session = self._sessions.pop(number, None)
        if session is not None:
            self._do(number, session.close(self._host.now()))
            self._host.share()

    def _post(self, message: Message) -> None:
        """Queue a message for the writer."""
        self._outbox.append(message)
        self._wake.set()


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
