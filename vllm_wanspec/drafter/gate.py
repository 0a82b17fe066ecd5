"""The front end's side of `drafter.inside`: ports to a host in the engine process, over vLLM's utility calls."""

import asyncio
import itertools
import logging
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm_wanspec.core.wire import MAX_CONTROLLERS_BYTES
from vllm_wanspec.drafter.connection import MAX_OUTBOX
from vllm_wanspec.drafter.stats import HostStats
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.text import printable

ANSWER_DEADLINE_S = 60.0
"""The engine answers between two steps."""
CLOSE_DEADLINE_S = 1.0
"""A server that shuts down has no engine any more."""
MAX_FLYING_FRAMES = 64
"""Of one controller on their way to the engine: what its requests send in some steps; beyond that its socket waits."""
MAX_FLYING_BYTES = 16 * MAX_CONTROLLERS_BYTES
"""Two megabytes."""

logger = logging.getLogger("vllm.wanspec.drafter")


@dataclass(frozen=True)
class End:
    """A port gives nothing more, by an error or because the controller was refused."""

    error: Exception | None = None


class EngineGate:
    """Ports to the host in a vLLM engine.

    Attributes:
        stats: The host's counts as it last told them, which it does with every frame, either way.
    """

    def __init__(self, engine_client: Any) -> None:
        """Reach the engine by vLLM's engine client."""
        self._call = engine_client.engine_core.call_utility_async
        self._name = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        self._ports: dict[int, EnginePort] = {}
        self._polling: asyncio.Task[None] | None = None
        self._draining = False
        self.stats = HostStats()

    async def setup(self, settings: dict[str, Any]) -> None:
        """Have the engine host sessions.

        Args:
            settings: ``model``, the fields of a `DraftModel`; ``running_branches`` and ``capacity_tokens`` as for
                `Host`; ``events``, the log's path or None; ``top_k``, the probable tokens known at each position.
        """
        await self._call("wanspec_setup", settings)
        _yield_to_the_engine()
        self._polling = asyncio.create_task(self._poll())

    def port(self, client: str = "") -> "EnginePort":
        """A new controller's port; ``client`` names the token by which it came in."""
        number = next(self._numbers)
        port = self._ports[number] = EnginePort(self, number, client)
        return port

    async def call(self, name: str, number: int, *arguments: Any) -> Any:
        """Make a utility call for a port.

        Raises:
            OSError: The engine is gone.
        """
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):  # vLLM does not answer for an engine that has ended
                return await self._call(f"wanspec_{name}", self._name, number, *arguments)
        except Exception as error:
            raise OSError(f"the engine is gone ({type(error).__name__})") from error

    def forget(self, number: int) -> None:
        """A port is closed."""
        self._ports.pop(number, None)

    async def drain(self, last: bool) -> int:
        """Have the host take no new sessions, and with ``last`` end those that there are; how many are left.

        An engine that is gone has none.
        """
        self._draining = True
        try:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                self.stats = HostStats(*await self._call("wanspec_drain", last))
        except Exception as error:
            logger.info("no more drafts: the engine is gone before its sessions (%s)", type(error).__name__)
            return 0
        return self.stats.sessions

    async def _poll(self) -> None:
        """Fetch frames for ever, and hand them to their ports."""
        try:
            while True:
                batches, stats = await self._call("wanspec_poll", self._name)
                self.stats = HostStats(*stats)
                for number, frames, end in batches:
                    port = self._ports.get(number)
                    if port is not None:
                        port.put(frames)
                        if end is not None:
                            port.put(End(RemoteProtocolError(end) if end else None))
        except Exception as error:
            say = logger.info if self._draining else logger.error
            say("no more drafts: the engine is gone (%s: %s)", type(error).__name__, printable(str(error)))
            for port in list(self._ports.values()):
                port.put(End(OSError(f"the engine is gone ({type(error).__name__})")))


def _yield_to_the_engine() -> None:
    """Where front end and engine share a core, the engine's next step goes before what the last one gave to send.

    As a batch process (Linux) the front end does not take the core from an engine that is running; it has it while the
    engine waits for its device.
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class EnginePort:
    """A `Port` to the host in the engine process.

    Frames are handed over as they come, so many and so large ones at a time: an engine answers between two steps, and
    whoever waited for each answer would hand over one frame per step. What is wrong with one comes with what is to be
    sent.
    """

    def __init__(self, gate: EngineGate, number: int, client: str) -> None:
        """Connect with the first frame."""
        self.client = client
        self._gate = gate
        self._number = number
        self._connected = False
        self._written: asyncio.Queue[list[bytes] | End] = asyncio.Queue()
        self._flying: dict[asyncio.Task[None], int] = {}
        self._flying_bytes = 0
        self._landed = asyncio.Event()

    def put(self, frames: "list[bytes] | End") -> None:
        """Frames to send, or that there will be no more."""
        self._written.put_nowait(frames)

    async def receive(self, frame: bytes) -> bool:
        """See `Port`; waits only while too much is on its way to the engine."""
        if self._written.qsize() >= MAX_OUTBOX:
            raise RemoteProtocolError(f"the controller does not read: {MAX_OUTBOX} frames wait for it")
        while self._flying and (
            len(self._flying) >= MAX_FLYING_FRAMES or self._flying_bytes + len(frame) > MAX_FLYING_BYTES
        ):
            self._landed.clear()
            await self._landed.wait()
        if not self._connected:
            self._connected = True
            self._hand_over(0, "connect", self.client)
        self._hand_over(len(frame), "receive", frame)
        return True

    async def frames(self) -> list[bytes] | None:
        """See `Port`.

        Raises:
            OSError: The engine is gone.
        """
        frames = await self._written.get()
        if isinstance(frames, End):
            if frames.error is not None:
                raise frames.error
            return None
        return frames

    def leftovers(self) -> list[bytes]:
        """See `Port`: none, they come with `frames`."""
        return []

    async def close(self) -> None:
        """See `Port`."""
        self._gate.forget(self._number)
        if self._connected:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_DEADLINE_S):
                    self._gate.stats = HostStats(*await self._gate.call("close", self._number))
        for task in list(self._flying):
            task.cancel()

    def _hand_over(self, size: int, name: str, *arguments: Any) -> None:
        """Make a call without waiting for it; tasks reach the engine in the order in which they are made."""
        task = asyncio.create_task(self._call(name, *arguments))
        self._flying[task] = size
        self._flying_bytes += size
        task.add_done_callback(self._has_landed)

    def _has_landed(self, task: asyncio.Task[None]) -> None:
        self._flying_bytes -= self._flying.pop(task)
        self._landed.set()

    async def _call(self, name: str, *arguments: Any) -> None:
        try:
            counts = await self._gate.call(name, self._number, *arguments)
        except OSError as error:
            self.put(End(error))
        else:
            if counts is not None:
                self._gate.stats = HostStats(*counts)
