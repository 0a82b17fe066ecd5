"""The front end's side of `drafter.inside`: ports to a host in the engine process, over vLLM's utility calls."""

import asyncio
import itertools
import logging
import os
import secrets
from contextlib import suppress
from typing import Any

from vllm_wanspec.drafter.connection import MAX_OUTBOX
from vllm_wanspec.drafter.host import HostStats
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.text import printable

ANSWER_DEADLINE_S = 60.0
"""The engine answers between two steps."""
CLOSE_DEADLINE_S = 1.0
"""A server that shuts down has no engine any more."""

logger = logging.getLogger("vllm.wanspec.drafter")


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
        self.stats = HostStats()

    async def setup(self, settings: dict[str, Any]) -> None:
        """Have the engine host sessions.

        Args:
            settings: ``model``, the fields of a `DraftModel`; ``running_branches``; ``events``, the log's path or None;
                ``top_k``, the probable tokens known at each position.
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

    async def _poll(self) -> None:
        """Fetch frames for ever, and hand them to their ports."""
        try:
            while True:
                batches, stats = await self._call("wanspec_poll", self._name)
                self.stats = HostStats(*stats)
                for number, frames in batches:
                    port = self._ports.get(number)
                    if port is not None:
                        port.put(frames)
        except Exception as error:
            said = printable(str(error))
            logger.error("no more drafts: the engine is gone (%s: %s)", type(error).__name__, said)
            for port in list(self._ports.values()):
                port.put(None)


def _yield_to_the_engine() -> None:
    """Where front end and engine share a core, the engine's next step goes before what the last one gave to send.

    As a batch process (Linux) the front end does not take the core from an engine that is running; it has it while the
    engine waits for its device.
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class EnginePort:
    """A `Port` to the host in the engine process."""

    def __init__(self, gate: EngineGate, number: int, client: str) -> None:
        """Connect with the first frame."""
        self.client = client
        self._gate = gate
        self._number = number
        self._connected = False
        self._written: asyncio.Queue[list[bytes] | None] = asyncio.Queue()
        self._leftovers: list[bytes] = []

    def put(self, frames: list[bytes] | None) -> None:
        """Frames to send; None: the engine is gone."""
        self._written.put_nowait(frames)

    async def receive(self, frame: bytes) -> bool:
        """See `Port`.

        Raises:
            OSError: The engine is gone.
        """
        if self._written.qsize() >= MAX_OUTBOX:
            raise RemoteProtocolError(f"the controller does not read: {MAX_OUTBOX} frames wait for it")
        if not self._connected:
            self._connected = True
            await self._gate.call("connect", self._number)
        fault, goes_on, self._leftovers, stats = await self._gate.call("receive", self._number, frame)
        self._gate.stats = HostStats(*stats)
        if fault is not None:
            raise RemoteProtocolError(fault)
        return bool(goes_on)

    async def frames(self) -> list[bytes]:
        """See `Port`.

        Raises:
            OSError: The engine is gone.
        """
        frames = await self._written.get()
        if frames is None:
            raise OSError("the engine is gone")
        return frames

    def leftovers(self) -> list[bytes]:
        """See `Port`."""
        return self._leftovers

    async def close(self) -> None:
        """See `Port`."""
        self._gate.forget(self._number)
        if self._connected:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_DEADLINE_S):
                    self._gate.stats = HostStats(*await self._gate.call("close", self._number))
