"""What stands at both ends of the WAN proxy in tests: servers, clients, and the round trip that they see."""

import asyncio
import random
import statistics
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic

from vllm_wanspec.emulate.wan import WanProxy, precise_loop
from vllm_wanspec.emulate.wan_settings import WanSettings

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def target(handler: Handler) -> AsyncIterator[tuple[str, int]]:
    """A TCP server whose connections are closed when their handler ends."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()


@asynccontextmanager
async def connection(proxy: WanProxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*proxy.address)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def round_trip_ms(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    started_s = monotonic()
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    return (monotonic() - started_s) * 1e3


async def median_round_trip_ms(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int = 5) -> float:
    return statistics.median([await round_trip_ms(reader, writer) for _ in range(count)])


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until this holds; the limit is that of run()."""
    while not condition():
        await asyncio.sleep(0)


def run(main: Awaitable[None]) -> None:
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(asyncio.wait_for(main, 30.0))


@contextmanager
def far_away(port: int, settings: WanSettings) -> Iterator[int]:
    """The port of a WAN proxy to ``port``, in a thread of its own."""
    started, loop = threading.Event(), precise_loop()
    ended = asyncio.Event()
    ports: list[int] = []

    async def serve() -> None:
        async with WanProxy(("127.0.0.1", port), settings, rng=random.Random(1)) as proxy:
            ports.append(proxy.address.port)
            started.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="wan", daemon=True)
    thread.start()
    try:
        assert started.wait(5.0)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(5.0)
        loop.close()
