"""Ports: a controller's way to a host, and the loop that carries its frames whatever the transport is."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Protocol

from vllm_wanspec.drafter.connection import Connection
from vllm_wanspec.drafter.host import StreamingHost
from vllm_wanspec.errors import RemoteProtocolError

SEND_DEADLINE_S = 15.0
"""For one frame to get away: a controller that hears nothing for so long has given the drafter up."""
IDLE_S = 60.0
"""A controller pings once a second; one that says nothing for so long is gone, whatever its socket says."""


class Port(Protocol):
    """One controller's way to a host; `receive` and `frames` may be awaited side by side.

    Where the controller breaks the protocol one of the two raises `RemoteProtocolError`, and not always `receive`.

    Attributes:
        client: The name of the token by which it came in; empty where nobody is asked for one.
    """

    client: str

    async def receive(self, frame: bytes) -> bool:
        """Hand in a frame; see `Connection.receive`."""
        ...

    async def frames(self) -> list[bytes] | None:
        """Wait for something to send; None: the controller was refused, and has been told."""
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
        self.connection = Connection(host, self._written.set, client)

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
        RemoteProtocolError: No correct controller does that: it breaks the protocol, takes no frame for
            `SEND_DEADLINE_S`, or says nothing for `IDLE_S`. What ``incoming`` and ``send`` raise comes out too.
    """

    async def read() -> None:
        async for frame in _heard(incoming):
            if not await port.receive(frame):
                for last in port.leftovers():
                    await _sent(send, last)
                return
            await asyncio.sleep(0)  # others have their turn: a frame with a long context takes milliseconds

    async def write() -> None:
        while (frames := await port.frames()) is not None:
            for frame in frames:
                await _sent(send, frame)

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


async def _heard(incoming: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The controller's frames, each within `IDLE_S` of the one before."""
    frames = aiter(incoming)
    while True:
        try:
            async with asyncio.timeout(IDLE_S) as deadline:
                frame = await anext(frames)
        except StopAsyncIteration:
            return
        except TimeoutError:
            if not deadline.expired():
                raise
            raise RemoteProtocolError(f"it has said nothing for {IDLE_S:g} s") from None
        yield frame


async def _sent(send: Callable[[bytes], Awaitable[None]], frame: bytes) -> None:
    """Put a frame on the wire within `SEND_DEADLINE_S`."""
    try:
        async with asyncio.timeout(SEND_DEADLINE_S) as deadline:
            await send(frame)
    except TimeoutError:
        if not deadline.expired():
            raise
        raise RemoteProtocolError(f"it has taken no frame for {SEND_DEADLINE_S:g} s") from None
