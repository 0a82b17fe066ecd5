"""A controller's end of a connection to a session host, without a transport between."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress

from toys import FINGERPRINT, draft_model, limits, toy

from vllm_wanspec.core.messages import Hello, Message, Nodes, Open
from vllm_wanspec.core.wire import decode, encode
from vllm_wanspec.drafter.engines import DraftEngine
from vllm_wanspec.drafter.host import DraftModel, StreamingHost
from vllm_wanspec.drafter.ports import LocalPort
from vllm_wanspec.sim.engine import Engine

TOY = toy(seed=5)
PROMPT = (1, 2, 3)


class Peer:
    """The controller's end of a connection."""

    def __init__(
        self, engine: DraftEngine | None = None, model: DraftModel | None = None, host: StreamingHost | None = None
    ) -> None:
        self.engine = engine or Engine(TOY)
        self.host = host or StreamingHost(self.engine, model or draft_model())
        self.received: list[Message] = []
        self.frames = 0
        self.reading = asyncio.Event()
        self.reading.set()
        self.port = LocalPort(self.host)
        self.connection = self.port.connection
        self.writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while True:
            for frame in await self.port.frames():
                await self._send(frame)

    async def _send(self, frame: bytes) -> None:
        await self.reading.wait()
        self.frames += 1
        self.received += decode(frame)

    async def say(self, *messages: Message) -> bool:
        goes_on = await self.port.receive(encode(messages))
        if not goes_on:
            for frame in self.port.leftovers():
                await self._send(frame)
        return goes_on

    async def greet(self) -> None:
        assert await self.say(Hello(1, FINGERPRINT, "test"))
        await self.until(lambda: self.received)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5.0):
            while not condition():
                await asyncio.sleep(0)

    async def settled(self) -> None:
        """Until nothing more comes: the engine rests and the outbox is empty."""
        await self.until(lambda: self.connection.running == 0 and not self.connection._outbox)
        for _ in range(5):
            await asyncio.sleep(0)

    def tokens(self, session: int) -> list[int]:
        return [n.token for m in self.received if isinstance(m, Nodes) and m.session == session for n in m.nodes]

    async def end(self) -> None:
        self.writer.cancel()
        with suppress(asyncio.CancelledError):
            await self.writer
        await self.port.close()


def with_peer(
    scenario: Callable[[Peer], Coroutine[None, None, None]],
    engine: DraftEngine | None = None,
    model: DraftModel | None = None,
) -> None:
    async def main() -> None:
        peer = Peer(engine, model)
        try:
            await scenario(peer)
        finally:
            await peer.end()
        assert peer.connection.running == 0
        assert peer.connection.sessions == 0
        assert getattr(peer.engine, "running", 0) == 0

    asyncio.run(main())


def opened(number: int, lookahead: int = 8, tokens: tuple[int, ...] = PROMPT, **more: object) -> Open:
    return Open(number, tokens, limits(lookahead, **({"max_nodes": 64} | more)))  # type: ignore[arg-type]
