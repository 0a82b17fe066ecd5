"""Hosts: what the connections of one drafter share, and the way from their sessions to the draft engine.

One event loop, or the engine's own thread, owns a host with all of its connections and sessions; nothing here locks. A
host knows which branch is whose and counts; what a session does with its branches is its connection's (`BranchOwner`).
"""

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from vllm_wanspec.core.drafter import DraftStep, StartBranch
from vllm_wanspec.core.events import Sink
from vllm_wanspec.core.vocabulary import Token
from vllm_wanspec.drafter.engines import DraftEngine
from vllm_wanspec.drafter.kept import KeptContexts
from vllm_wanspec.text import printable

DEFAULT_RUNNING_BRANCHES = 64


@dataclass(frozen=True)
class DraftModel:
    """What a drafter says of itself; sizes as in `Welcome`. ``tokens``: those of its tokenizer by id, where known."""

    name: str
    fingerprint: str
    vocab_size: int
    max_context: int
    max_sessions: int = 256
    max_nodes: int = 4096
    tokens: Sequence[Token] = ()


class HostStats(NamedTuple):
    """A host's counts.

    Attributes:
        sessions: Open sessions.
        running: Branches that the engine is extending.
        drafted_tokens: Tokens that the engine gave for sessions.
        branches_started: Engine requests.
        branch_seconds: Time that branches have run, summed over them.
        first_tokens: Branches that have given a token.
        first_seconds: From their start to it, summed over them.
        gap_seconds: Between a branch's tokens, summed over all that are not its first.
    """

    sessions: int = 0
    running: int = 0
    drafted_tokens: int = 0
    branches_started: int = 0
    branch_seconds: float = 0.0
    first_tokens: int = 0
    first_seconds: float = 0.0
    gap_seconds: float = 0.0


class BranchOwner(Protocol):
    """Whoever has sessions at a host, and their branches: a connection. The host tells it what the engine does."""

    @property
    def sessions(self) -> int:
        """Open sessions."""

    def resize(self, width: int) -> None:
        """Let each session run ``width`` branches."""

    def drafted(self, number: int, branch: int, steps: Sequence[DraftStep]) -> None:
        """The engine gave tokens for a session's branch."""

    def ended(self, number: int, branch: int) -> None:
        """The engine has given all that a session's branch asked for."""

    def failed(self, number: int, branch: int, reason: str) -> None:
        """The engine cannot serve a session's branch."""

    def forget(self, number: int, branch: int) -> None:
        """The engine is through with a session's branch."""


@dataclass(slots=True)
class _Running:
    """Whose branch the engine extends, and when it began or gave its last token."""

    owner: BranchOwner
    number: int
    branch: int
    since_s: float
    fresh: bool = True


class Host(ABC):
    """What the connections of one drafter share: the way to the engine, its places for running branches, and counts.

    ``drafted_tokens`` and ``branches_started`` are as in `HostStats`.
    """

    def __init__(
        self,
        model: DraftModel,
        *,
        running_branches: int = DEFAULT_RUNNING_BRANCHES,
        sink: Sink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin without connections.

        Args:
            model: What the engine serves.
            running_branches: Engine requests at a time, over all sessions; each session may always have one.
            sink: Takes the event log's records.
            clock: Seconds, monotonic.
        """
        self.model = model
        self.sink = sink
        self.now = clock
        self.connections: set[BranchOwner] = set()
        self.kept = KeptContexts()
        self.drafted_tokens = 0
        self.branches_started = 0
        self._first_tokens = 0
        self._first_seconds = 0.0
        self._gap_seconds = 0.0
        self._places = running_branches
        self._handles = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self._branch_seconds = 0.0
        self._changed_s = clock()

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return sum(connection.sessions for connection in self.connections)

    @property
    def running(self) -> int:
        """Branches that the engine is extending."""
        return len(self._running)

    @property
    def branch_seconds(self) -> float:
        """Time that branches have run, summed over them: its growth per second is their mean number."""
        return self._branch_seconds + self.running * (self.now() - self._changed_s)

    def width(self) -> int:
        """Branches that one session may run now: an equal share of the places, at least one."""
        return max(1, self._places // max(1, self.sessions))

    def share(self) -> None:
        """Tell all sessions their share of the places."""
        width = self.width()
        for connection in self.connections:
            connection.resize(width)

    def stats(self) -> HostStats:
        """The counts now."""
        return HostStats(
            self.sessions,
            self.running,
            self.drafted_tokens,
            self.branches_started,
            self.branch_seconds,
            self._first_tokens,
            self._first_seconds,
            self._gap_seconds,
        )

    def start(self, owner: BranchOwner, number: int, start: StartBranch) -> int:
        """Let the engine extend a branch of a session of ``owner``'s; its handle."""
        self._add_up()
        handle = next(self._handles)
        self._running[handle] = _Running(owner, number, start.branch, self._changed_s)
        self.branches_started += 1
        self._extend(handle, start)
        return handle

    def stop(self, handle: int) -> None:
        """Let the engine drop a branch."""
        if handle in self._running:
            self._cease(handle)

    def drafted(self, handle: int, steps: Sequence[DraftStep]) -> None:
        """The engine gave tokens for a branch."""
        running = self._running.get(handle)
        if running is not None:
            self._time(running, len(steps))
            running.owner.drafted(running.number, running.branch, steps)

    def ended(self, handle: int) -> None:
        """The engine has given all that a branch asked for."""
        running = self._running.get(handle)
        if running is not None:
            running.owner.ended(running.number, running.branch)

    def failed(self, handle: int, reason: str) -> None:
        """The engine cannot serve a branch."""
        running = self._running.get(handle)
        if running is not None:
            running.owner.failed(running.number, running.branch, reason)

    def gone(self, handle: int) -> None:
        """The engine is through with a branch."""
        self._add_up()
        running = self._running.pop(handle)
        running.owner.forget(running.number, running.branch)

    def _add_up(self) -> None:
        """Add up the time that branches have run, before their number changes."""
        now = self.now()
        self._branch_seconds += self.running * (now - self._changed_s)
        self._changed_s = now

    def _time(self, running: _Running, tokens: int) -> None:
        """Count tokens of a branch, and how long it took to give them."""
        now = self.now()
        waited_s, running.since_s = now - running.since_s, now
        self.drafted_tokens += tokens
        if running.fresh and tokens:
            running.fresh = False
            self._first_tokens += 1
            self._first_seconds += waited_s
        elif tokens:
            self._gap_seconds += waited_s

    @abstractmethod
    def _extend(self, handle: int, start: StartBranch) -> None:
        """Have the engine begin."""

    @abstractmethod
    def _cease(self, handle: int) -> None:
        """Have the engine stop."""


class StreamingHost(Host):
    """A host over an engine that streams, each branch in a task of its own."""

    def __init__(self, engine: DraftEngine, model: DraftModel, **settings: Any) -> None:
        """Serve over ``engine``; settings as for `Host`."""
        super().__init__(model, **settings)
        self.engine = engine
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def settled(self, handles: Iterable[int]) -> None:
        """Wait until the engine is through with branches that were stopped."""
        tasks = [self._tasks[handle] for handle in handles if handle in self._tasks]
        await asyncio.gather(*tasks, return_exceptions=True)

    def _extend(self, handle: int, start: StartBranch) -> None:
        task = self._tasks[handle] = asyncio.create_task(self._run(handle, start))
        # Not in the task itself: one that is stopped before it has begun never runs at all.
        task.add_done_callback(partial(self._finished, handle))

    def _cease(self, handle: int) -> None:
        self._tasks[handle].cancel()

    async def _run(self, handle: int, start: StartBranch) -> None:
        try:
            async with aclosing(self.engine.draft(start.tokens, start.max_tokens)) as outputs:
                async for steps in outputs:
                    self.drafted(handle, steps)
            self.ended(handle)
        except Exception as error:
            self.failed(handle, printable(f"{type(error).__name__}: {error}"))

    def _finished(self, handle: int, task: asyncio.Task[None]) -> None:
        del self._tasks[handle]
        self.gone(handle)
