"""Both real sessions and the real codec, joined by the virtual network, on one clock of ticks.

A `Pair` owns all there is of one target and one drafter: the requests with their sessions, two wires, and the drafter's
host with its connection and engine. It stands where the pool stands in a server, and nothing happens but in its calls.
Sessions change by the pair's calls alone, and tell each other of it by frames alone. Subclasses may put rules around
every call: see `Pair.called`, `Pair.drafted`, `Pair.post`, `Pair.rejected`, `Pair.broken` and `Pair.new_connection`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from random import Random

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.draft import NO_DRAFT, Draft
from vllm_wanspec.core.events import RecordedControllerSession, header
from vllm_wanspec.core.health import Bar
from vllm_wanspec.core.messages import PROTOCOL_VERSION, Hello, Message, Nodes, Pong, Reject
from vllm_wanspec.core.turnaround import Turnaround
from vllm_wanspec.core.wire import Sender, decode, encode, frames
from vllm_wanspec.drafter.connection import Connection
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.sim.engine import Engine
from vllm_wanspec.sim.history import Logs, Request, Setup
from vllm_wanspec.sim.host import MODEL_NAME, SteppedHost, draft_model
from vllm_wanspec.sim.models import Language
from vllm_wanspec.sim.network import Wire

__all__ = ["TICK_S", "Pair"]

TICK_S = 0.005
SETTLE_TICKS = 3000
BACKOFF_TICKS = 20
"""What may pass in one go while nothing is in flight and no branch runs: only the end of a back-off is near then."""
ONE_TOKEN_CHANCE = 0.85
"""Of a branch's token in a tick, where a tick gives one at most."""


class Pair:
    """One target and one drafter.

    Attributes:
        now: In ticks.
        burst: As in `Setup`; it may be changed.
        up: The wire to the drafter.
        down: The wire from it.
        connection: The drafter's end of the link; None while there is no link.
        seen: What has happened, by name.
    """

    def __init__(
        self, language: Language, setup: Setup, prompts: Iterable[Sequence[int]], logs: Logs | None = None
    ) -> None:
        """Begin connected, with a request for each prompt; ``logs`` take what all sessions are told and do."""
        self.language, self.setup, self.logs = language, setup, logs
        self.now = 0
        self.burst = setup.burst
        self.seen: Counter[str] = Counter()
        self.shared = Shared()
        self.requests: list[Request] = []
        self.by_number: dict[int, Request] = {}
        self.next_number = 1
        self.connection: Connection | None = None
        self._rng = Random(setup.seed)
        self.up, self.down = (Wire(setup.delay, setup.jitter, self._rng) for _ in range(2))
        self._turnaround = Turnaround()
        self._links = self._restarts = 0
        self._places = setup.places
        self._counted_before: Counter[str] = Counter()
        self.host = self._new_host()
        for index, prompt in enumerate(prompts):
            self.requests.append(Request(index, prompt, self._new_session(index, prompt)))
        self.connect()

    @property
    def now_s(self) -> float:
        """The time in seconds, as sessions are told it."""
        return self.now * TICK_S

    # What subclasses may hold against their rules

    def called(self, session: ControllerSession) -> AbstractContextManager[object]:
        """Entered around every call that may change a controller's session."""
        return nullcontext()

    def drafted(self, request: Request, draft: list[int], limit: int, expected: float) -> None:
        """Asked for up to ``limit`` tokens, a session gave a draft, and said how many it expects to be accepted."""

    def rejected(self, request: Request, message: Reject) -> None:
        """The drafter has ended a request's session, which knows it by now."""

    def post(self, request: Request, message: Message) -> None:
        """Send to the drafter what a request's session has to say."""
        self.up.send(self.now, frames([message]))

    def broken(self, error: RemoteProtocolError) -> None:
        """One side broke the protocol, as the pair's own sessions never do."""
        raise error

    def new_connection(self) -> Connection:
        """The drafter's end of a new link."""
        return Connection(self.host)

    # Time

    def tick(self, count: int = 1) -> None:
        """Let time pass: frames arrive, and the engine gives every branch some tokens."""
        for _ in range(count):
            self.now += 1
            try:
                self.exchange()
            except RemoteProtocolError as error:
                self.broken(error)

    def exchange(self) -> None:
        """What happens in a tick."""
        if self.connection is not None:
            for frame in self.up.arrived(self.now):
                self.connection.receive(frame)
            for handle in self.host.handles:
                self.host.step(handle, self._burst())
            self.down.send(self.now, self.connection.frames())
        for frame in self.down.arrived(self.now):
            self.deliver(frame)
        self._open_all()

    def settle(self) -> None:
        """Let everything in flight arrive, with no more commits.

        Raises:
            RuntimeError: The pair does not come to rest.
        """
        self.connect()
        for _ in range(SETTLE_TICKS):
            self.tick()
            if self.up.in_flight or self.down.in_flight or self.host.running:
                continue
            if all(request.session.tree is not None or self.is_over(request) for request in self.requests):
                return
            self.now += BACKOFF_TICKS
        raise RuntimeError(f"the pair does not come to rest in {SETTLE_TICKS} ticks")

    def deliver(self, frame: bytes) -> None:
        """Take a frame from the drafter.

        Raises:
            RemoteProtocolError: No correct drafter sends that.
        """
        for message in decode(frame, Sender.DRAFTER):
            if isinstance(message, Pong):
                continue
            if not isinstance(message, Nodes | Reject) or message.session >= self.next_number:
                raise RemoteProtocolError(f"unexpected {type(message).__name__.lower()} message")
            request = self.by_number.get(message.session)
            if request is None:
                continue
            with self.called(request.session):
                request.session.receive(message, self.now_s)
            if isinstance(message, Nodes):
                request.bar = Bar()
            else:
                del self.by_number[message.session]
                request.number = None
                request.bar.rejected(message.code, self.now_s)
                self.seen[f"reject {message.code}"] += 1
                self.rejected(request, message)

    # The target

    def step(self, limit: int = 4, least: float = 0.0, *, withhold: bool = False) -> None:
        """One verification step of all requests that run, with up to ``limit`` drafted tokens each.

        Args:
            limit: Most drafted tokens of a request.
            least: See `ControllerSession.draft`.
            withhold: The drafts are asked for, and not used.
        """
        for request in self.requests:
            if request.preempted:
                continue
            made = request.session.draft(limit, least, self.now_s)
            draft, expected = made.tokens, made.expected
            self.drafted(request, draft, limit, expected)
            tokens = self.language.verify(request.context, [] if withhold else draft)
            request.accepted += len(tokens) - 1
            self.seen["drafted"] += 0 if withhold else len(draft)
            self.seen["accepted"] += len(tokens) - 1
            self.commit(request, tokens, made)

    def commit(self, request: Request, tokens: list[int], draft: Draft = NO_DRAFT) -> None:
        """The target has verified tokens of a request, whether a draft, the last one made, had them or not."""
        request.context += tokens
        with self.called(request.session):
            message = request.session.commit(tokens, self.now_s, draft)
        if message is not None:
            self.post(request, message)
        else:
            self._open(request)

    def preempt(self, request: Request) -> None:
        """The target stops running a request."""
        self.seen["preemption"] += not request.preempted
        request.preempted = True

    def resume(self, request: Request, *, jump: int = 0, anew: bool = False) -> None:
        """A preempted request runs again.

        Args:
            request: Which one.
            jump: So many tokens it has got meanwhile.
            anew: The lengths do not fit, and it begins again.
        """
        request.preempted = False
        if jump:
            self.commit(request, self.language.continuation(request.context, jump))
        if anew:
            self.begin_again(request)

    def begin_again(self, request: Request) -> None:
        """The same request as a new one, with its full context; on the same link under a new number."""
        with self.called(request.session):
            message = request.session.close(self.now_s)
        if message is not None and request.number is not None:
            del self.by_number[request.number]
            self.post(request, message)
        request.number, request.bar = None, Bar()
        request.session = self._new_session(request.index, request.context)
        self._open(request)

    def is_over(self, request: Request) -> bool:
        """Whether no drafter can serve a request any more."""
        if request.bar.lasts:
            return True
        return request.session.tree is None and len(request.context) > self.setup.max_context

    def counts(self) -> Counter[str]:
        """What the controller has counted, over all its restarts."""
        return self._counted_before + Counter({name: int(value) for name, value in self.shared.counters.items()})

    # The link, and both processes

    def disconnect(self) -> None:
        """Both directions are cut, and what was in them is lost; so are the drafter's sessions."""
        self._cut()
        if self.connection is not None:
            self.connection.end()
        self.connection = None

    def connect(self) -> None:
        """Have a link, if there is none; its handshake takes no time."""
        if self.connection is not None:
            return
        self._links += 1
        self.next_number = 1
        self.connection = self.new_connection()
        self.connection.receive(encode([Hello(PROTOCOL_VERSION, self.language.fingerprint, f"link{self._links}")]))
        self.connection.frames()  # the welcome
        self._open_all()

    def restart_drafter(self) -> None:
        """Its sessions vanish without a word, and the link with them."""
        self._cut()
        self.connection = None
        self.host = self._new_host()
        self.connect()

    def restart_controller(self) -> None:
        """A new process: nothing learnt, no link, the same requests with all that they have got so far."""
        self.disconnect()
        self._restarts += 1
        if self.logs is not None:
            self.logs.controller.append(header("controller", MODEL_NAME, wall_s=0.0, at_s=self.now_s))
        self._counted_before = self.counts()
        self.shared = Shared()
        for request in self.requests:
            request.bar = Bar()
            request.session = self._new_session(request.index, request.context)
        self.connect()

    def resize(self, places: int) -> None:
        """The drafter has other places for running branches."""
        self._places = places
        self.host.resize(places)

    def _burst(self) -> int:
        chance = self._rng.random()
        return int(chance * (self.burst + 1)) if self.burst > 1 else int(chance < ONE_TOKEN_CHANCE)

    def _cut(self) -> None:
        self.up.cut()
        self.down.cut()
        self.by_number.clear()
        for request in self.requests:
            with self.called(request.session):
                request.session.link_lost(self.now_s)
            request.number = None

    def _new_host(self) -> SteppedHost:
        return SteppedHost(
            Engine(self.language),
            draft_model(self.language, max_context=self.setup.max_context),
            clock=lambda: self.now_s,
            running_branches=self._places,
            sink=None if self.logs is None else self.logs.drafter.append,
        )

    def _new_session(self, index: int, context: Sequence[int]) -> ControllerSession:
        if self.logs is None:
            return ControllerSession(context, self.shared)
        key = f"request{index}.{self._restarts}"
        return RecordedControllerSession(
            context, self.shared, key=key, sink=self.logs.controller.append, now=self.now_s
        )

    def _open_all(self) -> None:
        for request in self.requests:
            if request.number is None:
                self._open(request)

    def _open(self, request: Request) -> None:
        """Open a session where a link is there and the request wants one."""
        session = request.session
        if self.connection is None or not session.wants_link or request.bar.holds(self.now_s):
            return
        if session.length > self.setup.max_context:
            return
        number = request.number = self.next_number
        self.next_number += 1
        with self.called(session):
            opened = session.open(
                number,
                self.setup.limits,
                self.now_s,
                vocab_size=self.language.vocab_size,
                turnaround=self._turnaround,
            )
        self.by_number[number] = request
        request.opened += 1
        self.seen["re-open"] += request.opened > 1
        self.post(request, opened)
