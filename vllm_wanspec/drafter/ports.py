"""Ports: a controller's way to a host, and the loop that carries its frames whatever the transport is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from vllm_wanspec.drafter.connection import Connection
from vllm_wanspec.drafter.host import StreamingHost


class Port(Protocol):
    """One controller's way to a host; `receive` and `frames` may be awaited side by side.

    Attributes:
        client: The name of the token by which it came in; empty where nobody is asked for one.
    """

    client: str

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

    def __init__(self, host: StreamingHost, client: str = "") -> None:
        """Connect a client to ``host``."""
        self.client = client
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
