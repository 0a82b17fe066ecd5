"""The session host: sessions of one connection, over a draft engine and whatever transport carries the frames.

One event loop owns everything here. Engine output and commits change sessions; the nodes that follow wait in the
connection's outbox until its writer takes them, several sessions' nodes in one frame.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from vllm_wanspec.core.drafter import Action, DrafterSession, StartBranch, StopBranch
from vllm_wanspec.core.messages import (
    PROTOCOL_VERSION,
    Close,
    Commit,
    Hello,
    Message,
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


@dataclass(frozen=True)
class DraftModel:
    """What a drafter says of itself; sizes as in `Welcome`."""

    name: str
    fingerprint: str
    vocab_size: int
    max_context: int
    max_sessions: int = 256
    max_nodes: int = 4096


class Connection:
    """One controller's connection.

    Feed it with `receive`; run `write` beside. Both end the connection by raising or returning, and `close` then
    stops everything that the engine still does for it.
    """

    def __init__(self, engine: DraftEngine, model: DraftModel, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Serve over ``engine``; ``send`` puts one frame on the wire and may wait for the peer."""
        self._engine = engine
        self._model = model
        self._send = send
        self._sessions: dict[int, DrafterSession] = {}
        self._last_number = 0
        self._tasks: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._outbox: list[Message] = []
        self._wake = asyncio.Event()
        self._greeted = False

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
            for frame in frames(batch):
                await self._send(frame)

    async def close(self) -> None:
        """End all sessions and wait until their engine requests are gone."""
        for number in list(self._sessions):
            self._end(number)
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
                    self._do(number, session.committed(message))
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
        elif opened.max_nodes > model.max_nodes:
            raise RemoteProtocolError(f"session {number} wants {opened.max_nodes} nodes of {model.max_nodes}")
        else:
            session = DrafterSession(opened, vocab_size=model.vocab_size, max_context=model.max_context)
            self._sessions[number] = session
            self._do(number, session.start())

    def _do(self, number: int, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartBranch(branch=branch):
                    task = self._tasks[number, branch] = asyncio.create_task(self._run(number, action))
                    # Not in the task itself: one that is stopped before it has begun never runs at all.
                    task.add_done_callback(partial(self._forget, number, branch))
                case StopBranch(branch=branch):
                    if (number, branch) in self._tasks:
                        self._tasks[number, branch].cancel()
                case Reject():
                    self._sessions.pop(number, None)
                    self._post(action)
                case _:
                    self._post(action)

    async def _run(self, number: int, start: StartBranch) -> None:
        """Let the engine extend one branch, and tell the session."""
        try:
            async with aclosing(self._engine.draft(start.tokens, start.max_tokens)) as outputs:
                async for steps in outputs:
                    session = self._sessions.get(number)
                    if session is None:
                        return
                    self._do(number, session.drafted(start.branch, steps))
            session = self._sessions.get(number)
            if session is not None:
                self._do(number, session.ended(start.branch))
        except Exception as error:
            session = self._sessions.get(number)
            if session is not None and session.running == start.branch:
                logger.error("draft engine failed (%s: %s); session %d rejected", type(error).__name__, error, number)
                self._do(number, session.failed())

    def _forget(self, number: int, branch: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number, branch]

    def _end(self, number: int) -> None:
        session = self._sessions.pop(number, None)
        if session is not None:
            self._do(number, session.close())

    def _post(self, message: Message) -> None:
        """Queue a message for the writer."""
        self._outbox.append(message)
        self._wake.set()
