"""Section 5, as the drafter sees it: bounds, fairness and admission of its sessions, and the end of its connections."""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import get_args

import aiohttp
import pytest
from conftest import LogLines
from finding import finding
from host_peer import PROMPT, TOY, opened, with_peer
from host_peer import Peer as HostPeer
from played_loop import now_s, played
from test_routes import drafter, hello
from toys import FINGERPRINT, VOCAB_SIZE, draft_model, limits

from vllm_wanspec.config import TOKEN_ENV
from vllm_wanspec.core import messages
from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.messages import Commit, Hello, Message, Nodes, Ping, Pong, Reject
from vllm_wanspec.core.turnaround import Turnaround
from vllm_wanspec.core.wire import decode, encode, frames
from vllm_wanspec.drafter.host import StreamingHost
from vllm_wanspec.drafter.ports import LocalPort, serve
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.sim.engine import Engine

HELLO = Hello(1, FINGERPRINT, "test")


class SilentEngine:
    """Takes every request and gives nothing."""

    async def draft(self, tokens: Sequence[int], max_tokens: int) -> AsyncGenerator[list[DraftStep], None]:
        await asyncio.Event().wait()
        yield []


async def greeted(host: StreamingHost) -> LocalPort:
    port = LocalPort(host)
    assert await port.receive(encode([HELLO]))
    await port.frames()
    return port


def test_commits_cannot_make_a_context_longer_than_the_draft_model_takes() -> None:
    async def scenario(peer: HostPeer) -> None:
        await peer.greet()
        await peer.say(opened(1))
        longest = peer.host.model.max_context
        flood = [Commit(1, 3 + 4096 * index, (1,) * 4096) for index in range(8)]
        try:
            await peer.say(*flood)
        except RemoteProtocolError:
            return
        kept = [len(session._context) for session in peer.connection._sessions.values()]
        assert max(kept, default=0) <= longest

    with_peer(scenario)


@finding("5.3", "permessage-deflate lets half a MiB travel as 1,131 bytes")
def test_frames_do_not_travel_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)

    async def scenario() -> None:
        async with drafter() as (url, _), aiohttp.ClientSession() as http:
            try:
                async with http.ws_connect(url, compress=15) as peer:
                    await hello(peer)
                    negotiated = peer.compress
            except aiohttp.WSServerHandshakeError:
                return
            assert not negotiated

    asyncio.run(scenario())


def test_a_peer_that_reads_nothing_for_a_minute_is_dropped() -> None:
    async def deaf(frame: bytes) -> None:
        await asyncio.Event().wait()

    async def talking() -> AsyncIterator[bytes]:
        yield encode([HELLO])
        yield encode([opened(number) for number in range(1, 65)])
        while True:
            await asyncio.sleep(1.0)
            yield encode([Ping(1)])

    async def scenario() -> None:
        host = StreamingHost(Engine(TOY), draft_model(), clock=now_s)
        serving = asyncio.create_task(serve(LocalPort(host), talking(), deaf))
        await asyncio.sleep(60.0)
        sessions = host.sessions
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert sessions == 0

    played(scenario())


class FirstComeFirstServed:
    """An engine of some slots: a token per running request and step; what does not fit waits in order."""

    def __init__(self, slots: int, step_s: float) -> None:
        self._slots, self._step_s = slots, step_s
        self._waiting: deque[asyncio.Queue[None]] = deque()
        self._running: list[asyncio.Queue[None]] = []

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            while self._waiting and len(self._running) < self._slots:
                self._running.append(self._waiting.popleft())
            for queue in self._running:
                queue.put_nowait(None)

    async def draft(self, tokens: Sequence[int], max_tokens: int) -> AsyncGenerator[list[DraftStep], None]:
        queue: asyncio.Queue[None] = asyncio.Queue()
        self._waiting.append(queue)
        context = list(tokens)
        try:
            for _ in range(max_tokens):
                await queue.get()
                step = TOY.step(context)
                context.append(step.token)
                yield [step]
        finally:
            (self._running if queue in self._running else self._waiting).remove(queue)


class Batch:
    """A controller's requests over one port; each target step verifies what has arrived."""

    def __init__(self, port: LocalPort, requests: int) -> None:
        self._port = port
        shared = Shared()
        self._contexts = {number: [number % VOCAB_SIZE, 2, 3] for number in range(1, requests + 1)}
        self._sessions = {number: ControllerSession(tokens, shared) for number, tokens in self._contexts.items()}
        self.drafted_steps = Counter(dict.fromkeys(self._sessions, 0))

    async def open(self) -> None:
        for number, session in self._sessions.items():
            message = session.open(number, limits(24, 256), 0.0, vocab_size=VOCAB_SIZE, turnaround=Turnaround())
            await self._port.receive(encode([message]))

    async def read(self) -> None:
        while True:
            for frame in await self._port.frames():
                for message in decode(frame):
                    if isinstance(message, Nodes | Reject):
                        self._sessions[message.session].receive(message, 0.0)

    async def step(self) -> None:
        commits: list[Message] = []
        for number, session in self._sessions.items():
            draft = session.draft(4, 0.0, 0.0).tokens
            self.drafted_steps[number] += bool(draft)
            tokens = TOY.verify(self._contexts[number], draft)
            self._contexts[number] += tokens
            commit = session.commit(tokens, 0.0)
            if commit is not None:
                commits.append(commit)
        await self._port.receive(encode(commits))


def test_more_sessions_than_slots_share_the_engine() -> None:
    steps = 100

    async def scenario() -> None:
        engine = FirstComeFirstServed(slots=16, step_s=0.008)
        host = StreamingHost(engine, draft_model(), running_branches=16, clock=now_s)
        port = await greeted(host)
        batch = Batch(port, 24)
        await batch.open()
        tasks = [asyncio.create_task(engine.run()), asyncio.create_task(batch.read())]
        for _ in range(steps):
            await asyncio.sleep(0.04)
            await batch.step()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await port.close()
        assert min(batch.drafted_steps.values()) >= 0.1 * steps, sorted(batch.drafted_steps.values())

    played(scenario())


def test_a_controller_with_many_sessions_does_not_take_the_places_of_another() -> None:
    async def scenario() -> None:
        host = StreamingHost(SilentEngine(), draft_model())
        many, few = await greeted(host), await greeted(host)
        await many.receive(encode([opened(number) for number in range(1, 257)]))
        await few.receive(encode([opened(1, lookahead=24, max_branches=4, running_branches=16, max_nodes=512)]))
        [session] = few.connection._sessions.values()
        width = session.width
        await many.close()
        await few.close()
        assert width >= 8  # its controller's half of the 64 places is more than the 16 that it asks for

    asyncio.run(scenario())


def test_a_drafter_does_not_take_hundreds_of_sessions_for_each_place() -> None:
    async def scenario() -> None:
        host = StreamingHost(SilentEngine(), draft_model(), running_branches=4)
        ports = [await greeted(host) for _ in range(5)]
        rejected = 0
        for port in ports:
            await port.receive(encode([opened(number) for number in range(1, 257)]))
            sent = [message for message in port.connection._outbox if isinstance(message, Reject)]
            rejected += sum(message.code == "overloaded" for message in sent)
        for port in ports:
            await port.close()
        assert rejected > 0

    asyncio.run(scenario())


def test_a_ping_is_answered_while_many_contexts_are_opened() -> None:
    controllers, contexts = 8, 32

    async def scenario() -> None:
        host = StreamingHost(SilentEngine(), draft_model())
        taken: list[int] = []
        pinged = asyncio.Event()

        async def reopening() -> AsyncIterator[bytes]:
            for frame in frames([HELLO, *[opened(n, tokens=PROMPT * 100) for n in range(1, contexts + 1)]]):
                yield frame
            await asyncio.Event().wait()

        async def pinging() -> AsyncIterator[bytes]:
            yield encode([HELLO])
            yield encode([Ping(7)])
            await pinged.wait()

        async def unread(frame: bytes) -> None:
            pass

        async def answered(frame: bytes) -> None:
            if Pong(7) in decode(frame):
                taken.append(host.sessions)
                pinged.set()

        tasks = [asyncio.create_task(serve(LocalPort(host), reopening(), unread)) for _ in range(controllers)]
        tasks.append(asyncio.create_task(serve(LocalPort(host), pinging(), answered)))
        async with asyncio.timeout(20.0):
            await pinged.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert taken[0] <= controllers * contexts // 2

    asyncio.run(scenario())


def test_an_engine_that_ends_is_told_in_one_line() -> None:
    log = LogLines()
    logger = logging.getLogger("vllm.wanspec")

    async def scenario(peer: HostPeer) -> None:
        await peer.greet()
        peer.engine.fault = RuntimeError("EngineDeadError")  # type: ignore[attr-defined]
        await peer.say(*[opened(number) for number in range(1, 9)])
        await peer.until(lambda: peer.host.sessions == 0 and peer.connection.running == 0)

    logger.addHandler(log)
    try:
        with_peer(scenario)
    finally:
        logger.removeHandler(log)
    assert len(log.lines(logging.ERROR)) == 1


def test_the_protocol_has_a_word_for_a_drafter_that_goes() -> None:
    assert "drain" in {kind.__name__.lower() for kind in get_args(messages.Message)}
