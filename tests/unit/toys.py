"""Toys: the invented pair of models with a small vocabulary, and a drafter of it on a real socket."""

import asyncio
import ssl
import sys
import threading
import time
from collections.abc import Callable

from vllm_wanspec.core.events import Sink
from vllm_wanspec.core.messages import Limits
from vllm_wanspec.drafter.host import DEFAULT_RUNNING_BRANCHES, DraftModel, StreamingHost
from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.sim import host as sim_host
from vllm_wanspec.sim.engine import Engine
from vllm_wanspec.sim.models import Language, Profile
from vllm_wanspec.sim.service import Service

VOCAB_SIZE = 64


def toy(seed: int = 0, agreement: float = 0.8) -> Language:
    """A language of 64 tokens; the draft model's best one is the target's with this probability."""
    return Language(seed, VOCAB_SIZE, Profile.agreeing(agreement))


VOCABULARY = toy().vocabulary
FINGERPRINT = toy().fingerprint


def limits(lookahead: int = 16, max_nodes: int = 512, **more: object) -> Limits:
    """What a session may do; the main line alone unless told otherwise."""
    return Limits(lookahead, max_nodes, **more)  # type: ignore[arg-type]


def draft_model(**changes: object) -> DraftModel:
    """What the toy drafter says of itself."""
    return sim_host.draft_model(toy(), **changes)


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Poll until ``condition`` holds; fails when it does not in time."""
    end = time.monotonic() + timeout_s
    idle = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {condition}"
        idle.wait(0.002)


def drafter_argv(port: int, places: int, max_context: int = 1023) -> list[str]:
    """The command line of a toy drafter in a process of its own, whose steps take a millisecond."""
    options = {"port": port, "running-branches": places, "vocab-size": VOCAB_SIZE, "max-context": max_context}
    named = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "vllm_wanspec.sim.service", "--pace", "1", *named]


class DrafterServer(Service):
    """A drafter on 127.0.0.1, in a thread of its own; it can be stopped and started again on the same port."""

    def __init__(
        self,
        language: Language,
        *,
        model: DraftModel | None = None,
        token: str | None = None,
        running_branches: int = DEFAULT_RUNNING_BRANCHES,
        sink: Sink | None = None,
        pace: Pacing | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        engine = Engine(language, pace)
        host = StreamingHost(engine, model or draft_model(), running_branches=running_branches, sink=sink)
        super().__init__(host, engine, token=token, tls=tls)
        self.port = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._end: asyncio.Event | None = None

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
        async with self.on(self.port) as self.port:
            ready.set()
            await self._end.wait()
