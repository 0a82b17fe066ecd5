"""Peers of a controller that run in the test process: a relay that listens in, and drafters that are no good."""

import asyncio
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from vllm_wanspec.core.messages import PATH, PROTOCOL_VERSION, Close, Hello, Open, Welcome, vocabulary_fingerprint
from vllm_wanspec.core.wire import decode, encode
from vllm_wanspec.drafter.host import DraftModel, StreamingHost
from vllm_wanspec.drafter.ports import LocalPort, serve
from vllm_wanspec.lab.harness.servers import HOST, free_ports
from vllm_wanspec.sim.engine import Engine
from vllm_wanspec.sim.models import Language

READY_S = 20.0


@dataclass
class Relay:
    """Passes a controller's frames on to the real drafter, and back, and notes which sessions it opens and closes."""

    upstream: str
    opened: list[Open] = field(default_factory=list)
    closed: set[int] = field(default_factory=set)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        headers = {"Authorization": request.headers.get("Authorization", "")}
        async with aiohttp.ClientSession() as http:
            try:
                drafter = await http.ws_connect(self.upstream + PATH, headers=headers)
            except aiohttp.ClientError as error:
                return web.Response(status=502, text=str(error))
            controller = web.WebSocketResponse(max_msg_size=0)
            await controller.prepare(request)
            tasks = [asyncio.create_task(self._up(controller, drafter)), asyncio.create_task(down(drafter, controller))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await drafter.close()
        return controller

    async def _up(self, controller: web.WebSocketResponse, drafter: aiohttp.ClientWebSocketResponse) -> None:
        async for frame in controller:
            for message in decode(frame.data):
                if isinstance(message, Open):
                    self.opened.append(message)
                elif isinstance(message, Close):
                    self.closed.add(message.session)
            await drafter.send_bytes(frame.data)

    def open_now(self) -> list[Open]:
        return [message for message in self.opened if message.session not in self.closed]

    def opened_for(self, prompt: tuple[int, ...]) -> list[Open]:
        """Sessions that were opened when a request with this prompt arrived."""
        return [message for message in self.opened if message.tokens == prompt]


async def down(drafter: aiohttp.ClientWebSocketResponse, controller: web.WebSocketResponse) -> None:
    async for frame in drafter:
        await controller.send_bytes(frame.data)


@dataclass
class BadDrafter(ABC):
    """Counts connections; what it does with them is up to `serve`."""

    connections: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.connections += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await self.serve(socket)
        await socket.close()
        return socket

    @abstractmethod
    async def serve(self, socket: web.WebSocketResponse) -> None: ...


class OtherVocabulary(BadDrafter):
    """A correct drafter of a model with another tokenizer."""

    async def serve(self, socket: web.WebSocketResponse) -> None:
        model = DraftModel("toy", vocabulary_fingerprint({"a": 0, "b": 1}), vocab_size=2, max_context=64)
        port = LocalPort(StreamingHost(Engine(Language()), model))
        await serve(port, (frame.data async for frame in socket), socket.send_bytes)


class GarbledGreeting(BadDrafter):
    """Answers hello with noise."""

    async def serve(self, socket: web.WebSocketResponse) -> None:
        await socket.receive(READY_S)
        await socket.send_bytes(random.Random(7).randbytes(200))
        async for _ in socket:
            pass


class Turncoat(BadDrafter):
    """Welcomes the controller, and answers the first session that it opens with noise."""

    async def serve(self, socket: web.WebSocketResponse) -> None:
        async for frame in socket:
            for message in decode(frame.data):
                if isinstance(message, Hello):
                    welcome = Welcome(PROTOCOL_VERSION, "turncoat", 4096, message.fingerprint, 256, 4096, 1023)
                    await socket.send_bytes(encode([welcome]))
                elif isinstance(message, Open):
                    await socket.send_bytes(random.Random(8).randbytes(200))


@dataclass
class Peers:
    """All of them, with their base URLs."""

    relay: Relay
    other_vocabulary: OtherVocabulary = field(default_factory=OtherVocabulary)
    garbled: GarbledGreeting = field(default_factory=GarbledGreeting)
    turncoat: Turncoat = field(default_factory=Turncoat)
    urls: dict[str, str] = field(default_factory=dict)

    async def run(self, stop: asyncio.Event, ready: threading.Event) -> None:
        handlers = {
            "relay": self.relay.handle,
            "other-vocabulary": self.other_vocabulary.handle,
            "garbled": self.garbled.handle,
            "turncoat": self.turncoat.handle,
        }
        runners = []
        try:
            for name, port in zip(handlers, free_ports(len(handlers)), strict=True):
                app = web.Application()
                app.add_routes([web.get(PATH, handlers[name])])
                runners.append(web.AppRunner(app, access_log=None, shutdown_timeout=1.0))
                await runners[-1].setup()
                await web.TCPSite(runners[-1], HOST, port).start()
                self.urls[name] = f"http://{HOST}:{port}"
            ready.set()
            await stop.wait()
        finally:
            for runner in runners:
                await runner.cleanup()


@contextmanager
def serve_peers(drafter_url: str) -> Iterator[Peers]:
    """Serve them from an event loop in a thread of its own."""
    peers = Peers(Relay(drafter_url))
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    thread = threading.Thread(target=run_loop, args=(loop, peers.run(stop, ready)), name="peers", daemon=True)
    thread.start()
    try:
        assert ready.wait(READY_S), "the peers did not start"
        yield peers
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(READY_S)


def run_loop(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, None]) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
