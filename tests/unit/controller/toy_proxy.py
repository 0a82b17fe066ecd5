"""An HTTP proxy on 127.0.0.1, in a thread of its own; every name that it is asked for lies on 127.0.0.1."""

import asyncio
import threading
from contextlib import suppress
from urllib.parse import urlsplit

HEAD_END = b"\r\n\r\n"


class ToyProxy:
    """Tunnels (CONNECT) and forwards (absolute form), and remembers what it was asked.

    Attributes:
        asked: The first line of each request.
        credentials: The Proxy-Authorization of each request, None where it had none.
        answer: What it says instead of doing anything, a whole HTTP response.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.credentials: list[str | None] = []
        self.answer: bytes | None = None
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run()), daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> "ToyProxy":
        self._thread.start()
        assert self._ready.wait(5.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(5.0)
        self._loop.close()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for _ in range(10):
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._one(reader, writer)
        finally:
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(HEAD_END)).decode("latin-1")
        first, *lines = head.split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self.asked.append(first)
        self.credentials.append(headers.get("proxy-authorization"))
        if self.answer is not None:
            writer.write(self.answer)
            await writer.drain()
            return
        method, target, version = first.split(" ")
        parts = urlsplit(target if "//" in target else f"//{target}")
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", parts.port)
        try:
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established" + HEAD_END)
            else:
                rest = "\r\n".join(line for line in lines if not line.lower().startswith("proxy-"))
                far_writer.write(f"{method} {parts.path} {version}\r\n{rest}".encode("latin-1"))
            await _first_of(_pump(reader, far_writer), _pump(far_reader, writer))
        finally:
            far_writer.transport.abort()


async def _first_of(*ways: "asyncio.Future[None] | object") -> None:
    tasks = [asyncio.ensure_future(way) for way in ways]  # type: ignore[arg-type]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
