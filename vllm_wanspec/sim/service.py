"""A drafter without a model on a device: the real host and a real WebSocket, over an engine that drafts by the clock.

It runs in a process of its own (``python -m vllm_wanspec.sim.service --port 8200``), so that what it costs is not seen
by whoever measures a controller. Besides the WebSocket it has ``/health``, ``/metrics`` as a real drafter does, and
``/stats``: how its engine kept the pace.

The event loop that `Service.on` runs in owns the host and all below it. From elsewhere one may set ``handler``, and
what the engine allows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from hmac import compare_digest

from aiohttp import WSMsgType, web
from prometheus_client import CollectorRegistry, generate_latest

from vllm_wanspec.core.messages import PATH, vocabulary_fingerprint
from vllm_wanspec.core.wire import MAX_CONTROLLERS_BYTES
from vllm_wanspec.drafter.host import DEFAULT_RUNNING_BRANCHES, DraftModel, StreamingHost
from vllm_wanspec.drafter.metrics import HostCollector
from vllm_wanspec.drafter.ports import LocalPort, serve
from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import RemoteProtocolError, WanspecError
from vllm_wanspec.sim.engine import Engine
from vllm_wanspec.sim.host import MAX_CONTEXT_TOKENS, draft_model
from vllm_wanspec.sim.models import Language, RandomTokens

__all__ = ["STATS_PATH", "Handler", "Service", "model_of"]

HEALTH_PATH = "/health"
METRICS_PATH = "/metrics"
STATS_PATH = "/stats"
DEFAULT_PACE = "5+0.02"
NO_PACE = "none"
SHUTDOWN_S = 0.2
RANDOM_CONTEXT_TOKENS = 1023
"""Of the drafter that claims a vocabulary of another model."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Service:
    """One drafter as a server.

    Attributes:
        host: What is served.
        engine: The host's.
        token: The bearer token that is asked for, if any.
        tls: Its certificate; None serves in clear.
        attempts: Requests for the WebSocket so far, served or not.
        handler: Serves them in place of the host, if set.
    """

    def __init__(
        self, host: StreamingHost, engine: Engine, *, token: str | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        """Serve ``host``, whose engine is ``engine``, to whoever has the ``token``; to all without one."""
        self.host = host
        self.engine = engine
        self.token = token
        self.tls = tls
        self.attempts = 0
        self.handler: Handler | None = None
        self._registry = CollectorRegistry()
        self._registry.register(HostCollector(host.stats))
        self._transports: set[asyncio.Transport] = set()

    @contextlib.asynccontextmanager
    async def on(self, port: int) -> AsyncIterator[int]:
        """Serve on a port of 127.0.0.1, or on any that is free where it is 0; gives the port.

        At the end connections are gone without a word, as after a kill.
        """
        app = web.Application()
        app.add_routes(
            [
                web.get(PATH, self._handle),
                web.get(HEALTH_PATH, self._health),
                web.get(METRICS_PATH, self._metrics),
                web.get(STATS_PATH, self._stats),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True, ssl_context=self.tls)
            await site.start()
            yield runner.addresses[0][1]
            await site.stop()
        finally:
            await _turn_the_loop()  # connections being accepted now are known to the runner afterwards
            for transport in self._transports:
                transport.abort()
            await runner.cleanup()
            await _turn_the_loop()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.attempts += 1
        if self.handler is not None:
            return await self.handler(request)
        header = request.headers.get("Authorization", "")
        if self.token and not compare_digest(header.encode(), f"Bearer {self.token}".encode()):
            return web.Response(status=401)
        return await self._serve(request)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        """One controller's connection, from handshake to end."""
        socket = web.WebSocketResponse(max_msg_size=MAX_CONTROLLERS_BYTES, compress=False)
        await socket.prepare(request)
        transport = request.transport
        if transport is None:
            return socket
        self._transports.add(transport)
        try:
            await serve(LocalPort(self.host), _frames(socket), socket.send_bytes)
        except RemoteProtocolError as error:
            print(f"the controller broke the protocol: {error}", flush=True)
        finally:
            self._transports.discard(transport)
            with contextlib.suppress(ConnectionError):
                await socket.close()
        return socket

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="ready")

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=generate_latest(self._registry).decode())

    async def _stats(self, request: web.Request) -> web.Response:
        return web.json_response(self.engine.stats())


def model_of(name: str) -> DraftModel:
    """What a drafter says of itself that has the vocabulary of the given model."""
    from transformers import AutoConfig, AutoTokenizer  # not needed to serve, and slow to import

    vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    size = min(max(vocabulary.values()) + 1, int(AutoConfig.from_pretrained(name).vocab_size))
    return DraftModel("random", vocabulary_fingerprint(vocabulary), size, RANDOM_CONTEXT_TOKENS)


async def _frames(socket: web.WebSocketResponse) -> AsyncGenerator[bytes, None]:
    async for message in socket:
        if message.type is not WSMsgType.BINARY:
            return
        yield message.data


async def _turn_the_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def _serve_for_ever(service: Service, port: int) -> None:
    async with service.on(port):
        await asyncio.Event().wait()


def main() -> None:
    """Serve until a signal ends the process."""
    arguments = _parser().parse_args()
    try:
        pace = None if arguments.pace == NO_PACE else Pacing.parse(arguments.pace, "--pace")
        if arguments.model is not None:
            model = model_of(arguments.model)
            engine = Engine(RandomTokens(model.vocab_size), pace)
        else:
            language = Language(vocab_size=arguments.vocab_size)
            model = draft_model(language, max_context=arguments.max_context, max_sessions=arguments.max_sessions)
            engine = Engine(language, pace)
    except (WanspecError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    host = StreamingHost(engine, model, running_branches=arguments.running_branches)
    asyncio.run(_serve_for_ever(Service(host, engine), arguments.port))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vllm_wanspec.sim.service", description=__doc__)
    add = parser.add_argument
    add("--port", type=int, required=True, help="port on 127.0.0.1")
    add("--running-branches", type=int, default=DEFAULT_RUNNING_BRANCHES, help="over all sessions")
    add("--pace", default=DEFAULT_PACE, help="duration of a step: ms + ms per branch, or none")
    add("--model", help="claim this model's vocabulary, and draft random tokens of it")
    add("--vocab-size", type=int, default=1 << 17, help="of the invented language")
    add("--max-sessions", type=int, default=DraftModel.max_sessions, help="per connection")
    add("--max-context", type=int, default=MAX_CONTEXT_TOKENS, help="tokens that its draft model takes")
    return parser


if __name__ == "__main__":
    main()
