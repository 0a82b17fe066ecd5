"""A toy language with a target and a draft model, an engine, and a drafter on a real socket."""

import asyncio
import contextlib
import math
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from aiohttp import web

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.events import Sink
from vllm_wanspec.core.messages import MAX_FRAME_BYTES, PATH, Limits, vocabulary_fingerprint
from vllm_wanspec.core.policy.expansion import entropy_nats
from vllm_wanspec.drafter.host import DEFAULT_RUNNING_BRANCHES, DraftModel, StreamingHost
from vllm_wanspec.drafter.ports import LocalPort, serve

VOCABULARY = {f"t{index}": index for index in range(50)}
FINGERPRINT = vocabulary_fingerprint(VOCABULARY)
VOCAB_SIZE = len(VOCABULARY)
ALTERNATIVES = 6


class Toy:
    """Two deterministic models of one language; the draft's best token is the target's with probability ~0.8."""

    def __init__(self, seed: int = 0, vocab_size: int = VOCAB_SIZE, agreement: float = 0.8) -> None:
        self.vocab_size = vocab_size
        self._seed = seed
        self._agreement = agreement

    def target(self, context: Sequence[int]) -> int:
        return self._hash(context, 1) % self.vocab_size

    def draft(self, context: Sequence[int]) -> int:
        return self.step(context).token

    def step(self, context: Sequence[int]) -> DraftStep:
        """What the draft model says after ``context``: its best token, and others, often with the target's."""
        right = self.target(context)
        chance = self._hash(context, 2)
        agrees = chance % 1000 < 1000 * self._agreement
        best = right if agrees else (right + 1 + chance % (self.vocab_size - 1)) % self.vocab_size
        others = [(best + 1 + index) % self.vocab_size for index in range(ALTERNATIVES)]
        if not agrees and chance % 3 and right not in others:
            others[chance % 2] = right
        p = 0.45 + 0.5 * (chance % 97) / 97
        ranked = [(token, math.log((1 - p) * 0.5 ** (index + 1))) for index, token in enumerate(others)]
        return DraftStep(best, math.log(p), entropy_nats([math.log(p), *(q for _, q in ranked)]), tuple(ranked))

    def continuation(self, context: Sequence[int], count: int) -> list[int]:
        """The target's own greedy tokens after ``context``."""
        return self._extend(self.target, context, count)

    def drafted(self, context: Sequence[int], count: int) -> list[int]:
        """The draft model's own greedy tokens after ``context``."""
        return self._extend(self.draft, context, count)

    def verify(self, context: Sequence[int], draft: Sequence[int]) -> list[int]:
        """What one greedy verification step yields: the accepted part of the draft and the target's next token."""
        tokens: list[int] = []
        for guess in draft:
            right = self.target([*context, *tokens])
            tokens.append(right)
            if guess != right:
                return tokens
        return [*tokens, self.target([*context, *tokens])]

    def _extend(self, model: Callable[[Sequence[int]], int], context: Sequence[int], count: int) -> list[int]:
        tokens = list(context)
        for _ in range(count):
            tokens.append(model(tokens))
        return tokens[len(context) :]

    def _hash(self, context: Sequence[int], salt: int) -> int:
        value = self._seed * 40503 + salt * 97 + len(context)
        for token in context[-3:]:
            value = (value * 31 + token + 7) * 2654435761 % 2**32
            value ^= value >> 15
        return value >> 3


class ToyEngine:
    """The draft model as an engine; ``gate`` holds it back while it is not set, ``fault`` makes it fail."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.started = 0
        self.running = 0
        self.fault: Exception | None = None
        self.open = threading.Event()
        self.open.set()

    async def draft(self, tokens: tuple[int, ...], max_tokens: int) -> AsyncGenerator[list[DraftStep], None]:
        self.started += 1
        self.running += 1
        try:
            context = list(tokens)
            for _ in range(max_tokens):
                await asyncio.sleep(0)
                while not self.open.is_set():
                    await asyncio.sleep(0.001)
                if self.fault is not None:
                    raise self.fault
                step = self.toy.step(context)
                context.append(step.token)
                yield [step]
        finally:
            self.running -= 1


def limits(lookahead: int = 16, max_nodes: int = 512, **more: object) -> Limits:
    """What a session may do; the main line alone unless told otherwise."""
    return Limits(lookahead, max_nodes, **more)  # type: ignore[arg-type]


def draft_model(**changes: object) -> DraftModel:
    """What the toy drafter says of itself."""
    values: dict[str, object] = {
        "name": "toy",
        "fingerprint": FINGERPRINT,
        "vocab_size": VOCAB_SIZE,
        "max_context": 4096,
        **changes,
    }
    return DraftModel(**values)  # type: ignore[arg-type]


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Poll until ``condition`` holds; fails when it does not in time."""
    end = time.monotonic() + timeout_s
    idle = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {condition}"
        idle.wait(0.002)


async def _turn_the_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class DrafterServer:
    """A drafter on 127.0.0.1, in a thread of its own; it can be stopped and started again on the same port."""

    def __init__(
        self,
        toy: Toy,
        *,
        model: DraftModel | None = None,
        token: str | None = None,
        running_branches: int = DEFAULT_RUNNING_BRANCHES,
        sink: Sink | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.engine = ToyEngine(toy)
        self.host = StreamingHost(self.engine, model or draft_model(), running_branches=running_branches, sink=sink)
        self.token = token
        self.tls = tls
        self.handler: Handler | None = None
        self.attempts = 0
        self.port = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._end: asyncio.Event | None = None
        self._transports: set[asyncio.BaseTransport] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def sessions(self) -> int:
        return self.host.sessions

    def start(self) -> "DrafterServer":
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), name="toy-drafter", daemon=True)
        self._thread.start()
        assert ready.wait(5.0), "the toy drafter did not start"
        return self

    def stop(self) -> None:
        """Gone as after a kill: connections end without a word."""
        if self._thread is not None and self._loop is not None and self._end is not None:
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(5.0)
            assert not self._thread.is_alive()
            self._thread = None

    def __enter__(self) -> "DrafterServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _run(self, ready: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_get(PATH, self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.2)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=self.tls)
        await site.start()
        self.port = runner.addresses[0][1]
        ready.set()
        await self._end.wait()
        await site.stop()
        await _turn_the_loop()  # connections being accepted now are known to the runner afterwards
        for transport in self._transports:
            transport.abort()  # type: ignore[attr-defined]
        await runner.cleanup()
        await _turn_the_loop()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.attempts += 1
        if self.handler is not None:
            return await self.handler(request)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        return await self._serve(request)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_FRAME_BYTES)
        await socket.prepare(request)
        transport = request.transport
        assert transport is not None
        self._transports.add(transport)
        try:
            await serve(LocalPort(self.host), (message.data async for message in socket), socket.send_bytes)
        finally:
            self._transports.discard(transport)
            with contextlib.suppress(ConnectionError):
                await socket.close()
        return socket
