"""Hosts: what the connections of one drafter share, and the way from their sessions to the draft engine.

One event loop, or the engine's own thread, owns a host with all of its connections and sessions; nothing here locks. A
host knows which branch is whose, in which order branches get the engine's places (`Turns`) and which sessions are taken
(`Admission`), and counts; what a session does with its branches is its connection's (`BranchOwner`).
"""

import asyncio
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vllm_wanspec.core.drafter import DraftStep, StartBranch
from vllm_wanspec.core.events import Sink
from vllm_wanspec.core.vocabulary import Token
from vllm_wanspec.drafter.admission import SESSIONS_PER_PLACE, Admission
from vllm_wanspec.drafter.engines import DraftEngine
from vllm_wanspec.drafter.kept import KeptContexts
from vllm_wanspec.drafter.owner import BranchOwner
from vllm_wanspec.drafter.stats import HostStats
from vllm_wanspec.drafter.turns import TURN_TOKENS, Turns
from vllm_wanspec.text import printable

logger = logging.getLogger("vllm.wanspec.drafter")

DEFAULT_RUNNING_BRANCHES = 64
MAX_LOAD = 65536
"""Percent: what a message can carry."""
TELL_AGAIN_S = 60.0
"""A cause of failing branches is told once in so long: it takes all sessions, which are opened again and again."""


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


@dataclass(slots=True)
class _Waiting:
    """Whose branch waits for a place, and what the engine is to do then."""

    owner: BranchOwner
    number: int
    start: StartBranch


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

    ``drafted_tokens``, ``branches_started`` and ``expired`` are as in `HostStats`; ``rejects`` and ``used`` too, for
    connections to count in.
    """

    def __init__(
        self,
        model: DraftModel,
        *,
        running_branches: int = DEFAULT_RUNNING_BRANCHES,
        capacity_tokens: int | None = None,
        sink: Sink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin without connections.

        Args:
            model: What the engine serves.
            running_branches: Engine requests at a time, over all sessions: no more than it runs at a time, so that
                nothing waits in a queue of its own.
            capacity_tokens: What the engine's KV cache holds; None where that is not known.
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
        self.expired = 0
        self.rejects: Counter[str] = Counter()
        self.used: Counter[str] = Counter()
        self._dismissed = 0
        self._drafted: Counter[str] = Counter()
        self._first_tokens = 0
        self._first_seconds = 0.0
        self._gap_seconds = 0.0
        self._turns = Turns(running_branches)
        self._admission = Admission(sessions=SESSIONS_PER_PLACE * running_branches, capacity_tokens=capacity_tokens)
        self._handles = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._running: dict[int, _Running] = {}
        self._branch_seconds = 0.0
        self._changed_s = clock()
        self._told_s: dict[str, float] = {}

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return sum(connection.sessions for connection in self.connections)

    @property
    def running(self) -> int:
        """Branches that the engine is extending."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Branches that wait for one of the engine's places."""
        return len(self._waiting)

    @property
    def load(self) -> int:
        """Sessions in percent of the places: each wants one at least; side branches take what is left."""
        return min(MAX_LOAD, 100 * self.sessions // max(1, self._turns.places))

    @property
    def draining(self) -> bool:
        """Whether no new sessions are taken."""
        return self._admission.draining

    @property
    def branch_seconds(self) -> float:
        """Time that branches have run, summed over them: its growth per second is their mean number."""
        return self._branch_seconds + self.running * (self.now() - self._changed_s)

    def width(self, sessions: int = 1) -> int:
        """Branches that each session of a connection with so many may ask for now.

        Connections with sessions share the places equally, and the sessions of each its share; at least one.
        """
        return self._width(sessions, self._sharing())

    def share(self) -> None:
        """Tell all sessions their share of the places."""
        sharing = self._sharing()
        for connection in list(self.connections):
            connection.resize(self._width(connection.sessions, sharing))

    def _sharing(self) -> int:
        """Connections that have sessions."""
        return sum(connection.sessions > 0 for connection in self.connections)

    def _width(self, sessions: int, sharing: int) -> int:
        return max(1, self._turns.places // max(1, sharing) // max(1, sessions))

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
            self.waiting,
            self._turns.waited_s,
            self._admission.context_tokens,
            int(self.draining),
            self.expired,
            self._dismissed,
            dict(self.rejects),
            dict(self._drafted),
            dict(self.used),
        )

    # Sessions

    def refusal(self, tokens: int) -> str | None:
        """Why a session with a context of so many tokens is not taken now; None: it is (see `Admission`)."""
        return self._admission.refusal(tokens, self.now())

    def opened(self, owner: BranchOwner, number: int, tokens: int) -> None:
        """A session of ``owner``'s was taken, with a context of so many tokens."""
        self._admission.opened((owner, number), tokens)

    def grew(self, owner: BranchOwner, number: int, tokens: int) -> None:
        """A session's context has so many tokens more."""
        self._admission.grew((owner, number), tokens)

    def closed(self, owner: BranchOwner, number: int) -> None:
        """A session is over, and all its branches were stopped."""
        self._admission.closed((owner, number))
        self._turns.leave(owner, number)
        self.share()

    def left(self, owner: BranchOwner) -> None:
        """A connection is over, and so are all its sessions; it is none of `connections` any more."""
        self._turns.leave_all(owner)
        self.share()

    def drain(self) -> None:
        """Take no new sessions from now on, and tell all controllers; those that are open go on."""
        if not self.draining:
            self._admission.draining = True
            for connection in list(self.connections):
                connection.drain()

    def dismiss(self) -> None:
        """End all sessions, and tell their controllers; none begins anything meanwhile."""
        places, self._turns.places = self._turns.places, 0
        try:
            for connection in list(self.connections):
                self._dismissed += connection.dismiss()
        finally:
            self._turns.places = places

    def complain(self, reason: str) -> None:
        """Say why branches fail, once per cause in a while; a drafter that stops has said so already."""
        cause, now = reason.partition(":")[0], self.now()
        told_s = self._told_s.get(cause)
        if told_s is not None and now - told_s < TELL_AGAIN_S:
            return
        self._told_s[cause] = now
        say = logger.info if self.draining else logger.error
        say("draft engine failed (%s); the sessions that it fails are rejected, told once a minute", reason)

    # Branches

    def start(self, owner: BranchOwner, number: int, start: StartBranch, *, main: bool = True) -> int:
        """Let the engine extend a branch of a session of ``owner``'s as soon as it is its turn; its handle.

        Args:
            owner: Whose session it is.
            number: The session's.
            start: What the engine is to do.
            main: Whether the branch extends the session's most probable continuation.
        """
        handle, now = next(self._handles), self.now()
        self._waiting[handle] = _Waiting(owner, number, start)
        self._turns.ask(handle, owner, number, main=main, now=now)
        self._admission.asked((owner, number), now)
        self._fill()
        return handle

    def lead(self, handle: int) -> None:
        """A branch is its session's main line now."""
        self._turns.lead(handle)

    def stop(self, handle: int) -> None:
        """Let the engine drop a branch."""
        if handle in self._running:
            self._cease(handle)
        elif handle in self._waiting:
            waiting = self._waiting.pop(handle)
            self._turns.done(handle, self.now())
            waiting.owner.forget(waiting.number, waiting.start.branch)

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
        self._turns.done(handle, self._changed_s)
        running.owner.forget(running.number, running.branch)
        self._fill()

    def _fill(self) -> None:
        """Have branches begin while the engine has places; shorter ones where others wait."""
        while (handle := self._turns.next(self.now())) is not None:
            waiting = self._waiting.pop(handle)
            start = waiting.start
            if self._waiting and start.max_tokens > TURN_TOKENS:
                start = replace(start, max_tokens=TURN_TOKENS)
            self._add_up()
            self._running[handle] = _Running(waiting.owner, waiting.number, start.branch, self._changed_s)
            self.branches_started += 1
            self._extend(handle, start)

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
        self._drafted[running.owner.client_name] += tokens
        if running.fresh and tokens:
            running.fresh = False
            self._admission.answered((running.owner, running.number), now)
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

    async def let_go(self, last: bool) -> int:
        """Take no new sessions, and with ``last`` end those that there are; how many are left."""
        self.drain()
        if last:
            self.dismiss()
        return self.sessions

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
