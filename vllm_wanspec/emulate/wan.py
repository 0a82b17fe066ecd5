"""A TCP proxy in user space that emulates a WAN: delay, jitter, losses, bandwidth, outages.

For machines whose kernel has no netem.  Needs neither privileges nor vLLM.  What it models, per TCP connection:

- Each direction holds every chunk back by half the round trip plus jitter, in order, as TCP delivers it.  The jitter is
  drawn for each chunk and direction, uniform from 0 to ``jitter_ms``: half of that in the mean, and so the mean round
  trip is ``rtt_ms + jitter_ms``, or a little more where chunks follow so closely that one waits for another.
- A lost segment is repeated after a round trip or a time-out, and what follows waits: :mod:`.wan_loss` has the model.
- Setting up a connection costs one round trip (the client's first byte arrives after one and a half).
- Each direction has a bandwidth, shared by all connections, with a queue of at most :data:`QUEUE_S`.
- In an outage nothing enters or leaves; connections are accepted and stall.  Nothing is lost for good.
- End of stream and reset take as long as data.  A receiver that does not read stops the sender, as a full window would.

It does not model slow start or congestion control: what is seen is a link that is never the bottleneck of a fresh
connection.  asyncio's usual selector rounds timers up to a millisecond; :func:`precise_loop` does not.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import socket
import struct
from contextlib import suppress
from random import Random
from typing import Any, Self

from vllm_wanspec.emulate.wan_loss import LossyPath, Transit
from vllm_wanspec.emulate.wan_settings import Address, WanSettings
from vllm_wanspec.errors import ConfigError

# Default bound of what one direction of one connection holds back; with the delay it bounds the throughput.
MAX_IN_FLIGHT_BYTES = 4 * 1024 * 1024
QUEUE_S = 0.05  # how far ahead of a limited bandwidth data is accepted, like the buffer of a router

_CHUNK_BYTES = 16 * 1024  # the most that is read, and delayed as one piece, at a time
_OUTAGE_POLL_S = 0.05  # so that an update can end an outage early
_CONNECT_LIMIT_S = 10.0
_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_log = logging.getLogger(__name__)


def precise_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop whose timers are exact to well below a millisecond; for a few hundred sockets at most."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class _Lane:
    """One direction of the link, shared by all connections."""

    def __init__(self) -> None:
        self.bytes = 0  # delivered
        self.segments_lost = 0
        self.free_at_s = 0.0  # when what was accepted so far has been serialised; loop time

    def send(self, size: int, now_s: float, bandwidth_mbit: float | None) -> float:
        """Put ``size`` bytes on the link and return when the last of them has left."""
        if bandwidth_mbit is None:
            return now_s
        self.free_at_s = max(now_s, self.free_at_s) + size * 8 / (bandwidth_mbit * 1e6)
        return self.free_at_s


class WanProxy:
    """Forward TCP connections to ``target`` as a WAN with these settings would.

    ``target``: (host, port) to forward to.  ``listen``: (host, port) to accept on; port 0 picks a free one, see
    :attr:`address`.  ``rng``: source of the jitter and the losses.  ``max_in_flight_bytes``: bound per direction and
    connection.  An unreachable target drops the connection and is logged.  Use it with ``async with``, or start() and
    close().  :attr:`settings`: those in force, for :meth:`update` to change.  :attr:`in_flight_bytes`: held back at
    present, over all connections and both directions.
    """

    def __init__(
        self,
        target: tuple[str, int],
        settings: WanSettings | None = None,
        *,
        rng: Random,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
    ) -> None:
        self.target = Address(*target)
        self.connections_total = 0
        self.connections_failed = 0
        self.max_in_flight_bytes = max_in_flight_bytes
        self._listen = Address(*listen)
        self.settings = settings or WanSettings()
        self._rng = rng
        self._up, self._down = _Lane(), _Lane()
        self.in_flight_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._started_s = 0.0

    @property
    def address(self) -> Address:
        """Where it listens; only once started."""
        if self._server is None:
            raise RuntimeError("the proxy is not running")
        return Address(*self._server.sockets[0].getsockname()[:2])

    @property
    def bytes_up(self) -> int:
        """Bytes delivered to the target since the start."""
        return self._up.bytes

    @property
    def bytes_down(self) -> int:
        """Bytes delivered to clients since the start."""
        return self._down.bytes

    @property
    def segments_lost(self) -> int:
        """Segments lost since the start, in both directions; one that is lost again counts again."""
        return self._up.segments_lost + self._down.segments_lost

    @property
    def connections_open(self) -> int:
        """Connections at present, stalled ones included."""
        return len(self._tasks)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start: the clock of the outages."""
        return asyncio.get_running_loop().time() - self._started_s

    def update(self, /, **fields: Any) -> WanSettings:
        """Change fields of the settings and return the new ones; data read from now on obeys them, in order.

        :class:`ConfigError`: as for :meth:`WanSettings.changed`; nothing is changed then.
        """
        self.settings = self.settings.changed(**fields)
        return self.settings

    def drop_connections(self) -> None:
        """Reset all connections and go on listening: whoever connects anew measures the round trip anew."""
        for task in self._tasks:
            task.cancel()

    async def start(self) -> None:
        """Listen.  :class:`ConfigError`: the address cannot be listened on."""
        self._started_s = asyncio.get_running_loop().time()
        try:
            self._server = await asyncio.start_server(self._accept, *self._listen, limit=_CHUNK_BYTES)
        except OSError as error:
            raise ConfigError(f"cannot listen on {self._listen}: {error.strerror or error}") from error

    async def close(self) -> None:
        """Stop listening and reset all connections."""
        if self._server is None:
            return
        self._server.close()
        self.drop_connections()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections_total += 1
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # by close(); the task ends here anyway, and Python 3.11 complains about cancelled ones
        finally:
            self._tasks.discard(task)
            _abort(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        set_up_s = self.settings.rtt_ms / 1e3
        await self._wait_until(self._now_s())
        await self._wait_until(self._now_s() + set_up_s)
        try:
            async with asyncio.timeout(_CONNECT_LIMIT_S):
                target_reader, target_writer = await asyncio.open_connection(*self.target, limit=_CHUNK_BYTES)
        except (OSError, TimeoutError) as error:
            self.connections_failed += 1
            reason = error or type(error).__name__
            _log.warning("wan proxy: connection dropped, cannot reach %s: %s", self.target, reason)
            return
        try:
            await self._relay((reader, writer), (target_reader, target_writer))
        finally:
            _abort(target_writer)

    async def _relay(self, client: _Streams, target: _Streams) -> None:
        for _, writer in (client, target):
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_Pipe(self, self._up, client[0], target[1]).run())
                group.create_task(_Pipe(self, self._down, target[0], client[1]).run())
            for _, writer in (client, target):
                writer.close()
                await writer.wait_closed()
        except* OSError:
            pass  # a reset, which the callers pass on to both ends

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _one_way_s(self) -> float:
        return self.settings.one_way_s(self._rng)

    async def _wait_until(self, due_s: float) -> None:
        """Wait until this loop time, and then for the end of an outage if there is one."""
        while True:
            now_s = self._now_s()
            wait_s = due_s - now_s
            if wait_s <= 0:
                outage_end_s = self.settings.outage_end_s(now_s - self._started_s)
                if outage_end_s is None:
                    return
                wait_s = min(_OUTAGE_POLL_S, outage_end_s + self._started_s - now_s)
            await asyncio.sleep(wait_s)


class _Pipe:
    """One direction of one connection."""

    def __init__(self, proxy: WanProxy, lane: _Lane, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._lane = lane
        self._source = source
        self._sink = sink
        self._path = LossyPath(proxy._rng)
        self._queue: asyncio.Queue[tuple[Transit, bytes | None]] = asyncio.Queue()  # (…, chunk; b"" end, None reset)
        self._followed = asyncio.Event()
        self._held_bytes = 0
        self._room = asyncio.Event()

    async def run(self) -> None:
        """Forward until the end of the stream; OSErrors (in a group) mean that both ends must be reset."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                await self._write()
        finally:
            self._hold(-self._held_bytes)

    async def _read(self) -> None:
        """Read chunks, put each on its way to the other end, and queue it until it is due there."""
        proxy, chunk = self._proxy, None
        while chunk != b"":
            await self._wait_for_room()
            try:
                chunk = await self._source.read(_CHUNK_BYTES)
            except OSError:
                chunk = None
            self._hold(len(chunk or b""))
            await proxy._wait_until(0.0)
            sent_s = self._lane.send(len(chunk or b""), proxy._now_s(), proxy.settings.bandwidth_mbit)
            transit = self._path.send(len(chunk or b""), sent_s, proxy.settings)
            self._lane.segments_lost += transit.lost
            self._queue.put_nowait((transit, chunk))
            self._followed.set()
            if chunk is None:
                return

    async def _write(self) -> None:
        while True:
            transit, chunk = await self._queue.get()
            await self._wait_for(transit)
            if chunk is None:
                raise ConnectionResetError("the other end reset the connection")
            if not chunk:
                self._sink.write_eof()
                return
            try:
                self._sink.write(chunk)
                await self._sink.drain()
            except OSError:
                # The news of it travels back; what the sink's side had sent before arrives meanwhile.
                await self._proxy._wait_until(self._proxy._now_s() + self._proxy._one_way_s())
                raise
            self._lane.bytes += len(chunk)
            self._hold(-len(chunk))

    async def _wait_for(self, transit: Transit) -> None:
        """Wait until it is due, which may become earlier while it waits."""
        while transit.waits and (wait_s := transit.due_s - self._proxy._now_s()) > 0.0:
            self._followed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._followed.wait()
        await self._proxy._wait_until(transit.due_s)

    async def _wait_for_room(self) -> None:
        while self._held_bytes >= self._proxy.max_in_flight_bytes:
            self._room.clear()
            await self._room.wait()
        while self._proxy.settings.bandwidth_mbit is not None:
            ahead_s = self._lane.free_at_s - self._proxy._now_s() - QUEUE_S
            if ahead_s <= 0:
                return
            await asyncio.sleep(ahead_s)

    def _hold(self, size: int) -> None:
        self._held_bytes += size
        self._proxy.in_flight_bytes += size
        self._room.set()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Reset the connection; nothing happens if it is closed already."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
