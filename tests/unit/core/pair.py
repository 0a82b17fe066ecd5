"""Both real sessions and the real codec, joined by a virtual network over a toy engine, on one clock of ticks.

The `World` plays the pool and the target, `ToyDrafter` the drafter's host. Whatever happens to them, they check at
every call what must always hold; `pair_checks` has the rules.
"""

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pair_checks as rules
from pair_drafter import CachedToy, ToyDrafter
from toys import VOCAB_SIZE

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.events import Record, RecordedControllerSession, header
from vllm_wanspec.core.messages import Commit, Limits, Message, Nodes, Pong, Reject, decode, frames
from vllm_wanspec.core.states import ControllerState
from vllm_wanspec.core.turnaround import Turnaround
from vllm_wanspec.errors import RemoteProtocolError

PROMPTS = ((7, 7, 42), (1, 2, 3, 4, 5), (9,))
TICK_S = 0.005
LONGEST_STAY = 40
"""Ticks after which a frame has arrived for sure, whatever delay and jitter are drawn."""


@dataclass(frozen=True)
class Setup:
    """The initial conditions of a history; delay and jitter in ticks, burst in tokens per branch and tick."""

    limits: Limits
    seed: int = 3
    agreement: float = 0.8
    requests: int = 1
    max_context: int = 10**6
    max_branch_tokens: int = 20
    width: int = 16
    delay: int = 2
    jitter: int = 0
    burst: int = 1


@dataclass
class Logs:
    """Both event logs of a history that is recorded."""

    controller: list[Record] = field(default_factory=lambda: [header("controller", "toy", wall_s=0.0, at_s=0.0)])
    drafter: list[Record] = field(default_factory=lambda: [header("drafter", "toy", wall_s=0.0, at_s=0.0)])


class Wire:
    """One direction: frames arrive in order, ``delay`` to ``delay + jitter`` ticks after they were sent."""

    def __init__(self, delay: int, jitter: int, rng: random.Random) -> None:
        self.delay, self.jitter, self._rng = delay, jitter, rng
        self.in_flight: deque[tuple[int, bytes]] = deque()
        self.last = b""

    def send(self, now: int, messages: Sequence[Message]) -> None:
        for frame in frames(messages):
            due = now + self.delay + (self._rng.randint(0, self.jitter) if self.jitter else 0)
            if self.in_flight:
                due = max(due, self.in_flight[-1][0])
            assert due - now <= LONGEST_STAY
            self.in_flight.append((due, frame))
            self.last = frame

    def arrived(self, now: int) -> list[bytes]:
        found = []
        while self.in_flight and self.in_flight[0][0] <= now:
            found.append(self.in_flight.popleft()[1])
        return found


class Request:
    """A request of the target: its context, and its session as the pool keeps it."""

    def __init__(self, index: int, context: Sequence[int], session: ControllerSession) -> None:
        self.index = index
        self.context = list(context)
        self.prompt_length = len(context)
        self.session = session
        self.number: int | None = None
        self.opened = 0
        self.preempted = False
        self.accepted = 0


class World:
    """The target's side, the network and the drafter."""

    def __init__(self, setup: Setup, logs: Logs | None = None) -> None:
        self.setup, self.logs = setup, logs
        self.toy = CachedToy.of(setup.seed, setup.agreement)
        self.rng = random.Random(setup.seed)
        self.limits = setup.limits
        self.now = 0
        self.burst = setup.burst
        self.width = setup.width
        self.seen: Counter[str] = Counter()
        self.shared = Shared()
        self.poisoned = False
        self.connections = 0
        self.restarts = 0
        self.next_number = 1
        self.by_number: dict[int, Request] = {}
        self.up, self.down = (Wire(setup.delay, setup.jitter, self.rng) for _ in range(2))
        self.drafter: ToyDrafter | None = None
        self.turnaround = Turnaround()
        self.requests: list[Request] = []
        for index in range(setup.requests):
            self.requests.append(Request(index, PROMPTS[index], self._new_session(index, PROMPTS[index])))
        self.connect()

    @property
    def now_s(self) -> float:
        return self.now * TICK_S

    # Time

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1
            try:
                self._exchange()
            except RemoteProtocolError:
                if not self.poisoned:
                    raise
                self.seen["poison refused"] += 1
                self.disconnect()
                self.connect()

    def _exchange(self) -> None:
        if self.drafter is not None:
            for frame in self.up.arrived(self.now):
                self.drafter.receive(frame)
            self.drafter.tick(self.burst)
            self.drafter.flush()
        for frame in self.down.arrived(self.now):
            self.deliver(frame)
        self._open_all()

    def deliver(self, frame: bytes) -> None:
        """What the pool does with a frame."""
        for message in decode(frame):
            if isinstance(message, Pong):
                continue
            if not isinstance(message, Nodes | Reject) or message.session >= self.next_number:
                raise RemoteProtocolError(f"unexpected {type(message).__name__.lower()} message")
            request = self.by_number.get(message.session)
            if request is None:
                continue
            with rules.controller_call(request.session):
                request.session.receive(message, self.now_s)
            if isinstance(message, Reject):
                del self.by_number[message.session]
                request.number = None
                self.seen[f"reject {message.code}"] += 1
                for_good = message.code in ("too_long", "vocabulary")
                expected = ControllerState.BARRED if for_good else ControllerState.BACKING_OFF
                assert request.session.state is expected

    # The target

    def step(self, limit: int = 4, least: float = 0.0, *, withhold: bool = False) -> None:
        """One verification step of all requests that run."""
        for request in self.requests:
            if not request.preempted:
                self._step(request, limit, least, withhold)

    def _step(self, request: Request, limit: int, least: float, withhold: bool) -> None:
        draft, expected = request.session.draft(limit, least, self.now_s)[:2]
        assert len(draft) <= limit
        assert 0.0 <= expected <= len(draft)
        if self.poisoned:
            assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in draft)
        else:
            # Exactly what the draft model says after the committed context: nothing of an older one slips through.
            assert draft == self.toy.drafted(request.context, len(draft))
        if withhold:
            draft = []
        tokens = self.toy.verify(request.context, draft)
        request.accepted += len(tokens) - 1
        self.seen["drafted"] += len(draft)
        self.seen["accepted"] += len(tokens) - 1
        self.commit(request, tokens)

    def commit(self, request: Request, tokens: list[int]) -> None:
        counters = self.shared.counters
        hits_in_branches = counters.branch_hits
        request.context += tokens
        with rules.controller_call(request.session):
            message = request.session.commit(tokens, self.now_s)
        assert request.session.length == len(request.context)
        if counters.branch_hits > hits_in_branches and request.session.tree is not None:
            self.seen["drafts right after a re-root"] += bool(request.session.tree.best_path(1))
        assert (message is not None) == (request.number is not None)
        if message is not None:
            assert message == Commit(message.session, len(request.context) - len(tokens), tuple(tokens))
            self.up.send(self.now, [message])
        else:
            self._open(request)

    def commit_again(self, request: Request, count: int) -> None:
        """The last tokens once more: a commit may repeat, as a whole or in part, what is known."""
        if request.number is not None and count:
            self.seen["repeated commits"] += 1
            position = max(request.session.tree.committed_length - count, 0) if request.session.tree else 0
            self.up.send(self.now, [Commit(request.number, position, tuple(request.context[position:]))])

    def preempt(self, request: Request) -> None:
        self.seen["preemption"] += not request.preempted
        request.preempted = True

    def resume(self, request: Request, *, jump: int = 0, anew: bool = False) -> None:
        """A preempted request runs again; the scheduler may have gone on meanwhile, or the lengths do not fit."""
        request.preempted = False
        if jump:
            self.commit(request, self.toy.continuation(request.context, jump))
        if anew:
            self.begin_again(request)

    # Disturbances

    def begin_again(self, request: Request) -> None:
        """The same request as a new one, with its full context; on the same link under a new number."""
        with rules.controller_call(request.session):
            message = request.session.close(self.now_s)
        if message is not None and request.number is not None:
            del self.by_number[request.number]
            self.up.send(self.now, [message])
        request.number = None
        assert request.session.state is ControllerState.CLOSED
        request.session = self._new_session(request.index, request.context)
        self._open(request)

    def disconnect(self) -> None:
        """Both directions are cut, and what was in them is lost; so are the drafter's sessions."""
        self._cut()
        if self.drafter is not None:
            self.drafter.close()
        self.drafter = None

    def connect(self) -> None:
        if self.drafter is None:
            self.connections += 1
            self.next_number = 1
            self.drafter = ToyDrafter(self, name=f"link{self.connections}")
            self._open_all()

    def restart_drafter(self) -> None:
        """Its sessions vanish without a word, and the link with them."""
        self._cut()
        self.drafter = None
        self.connect()

    def restart_controller(self) -> None:
        """A new process: nothing learnt, no link, the same requests with all that they have got so far."""
        self.disconnect()
        self.restarts += 1
        if self.logs is not None:
            self.logs.controller.append(header("controller", "toy", wall_s=0.0, at_s=self.now_s))
        self._add_up()
        self.shared = Shared()
        for request in self.requests:
            request.session = self._new_session(request.index, request.context)
        self.connect()

    def resize(self, width: int) -> None:
        self.width = width
        if self.drafter is not None:
            self.drafter.resize()

    def feed_drafter(self, frame: bytes) -> bool:
        """A frame that no correct controller sends; whether it was refused."""
        return self._feed(frame, self.drafter.receive if self.drafter is not None else self.deliver)

    def feed_controller(self, frame: bytes) -> bool:
        """A frame that no correct drafter sends; whether it was refused."""
        return self._feed(frame, self.deliver)

    def _feed(self, frame: bytes, receive: Any) -> bool:
        self.poisoned = True
        try:
            receive(frame)
        except RemoteProtocolError:
            self.seen["garbage refused"] += 1
            return True
        self.seen["garbage accepted"] += 1
        return False

    def _cut(self) -> None:
        self.up.in_flight.clear()
        self.down.in_flight.clear()
        self.by_number.clear()
        for request in self.requests:
            with rules.controller_call(request.session):
                request.session.link_lost(self.now_s)
            request.number = None
        self.poisoned = False

    # What must hold, and what counts

    def check(self) -> None:
        """Everything that holds at any moment."""
        for request in self.requests:
            rules.check_controller(request.session, self.limits.max_nodes, len(request.context))
            linked = request.session.state in (ControllerState.SERVED, ControllerState.BLIND)
            assert (request.number is not None) == linked
        if self.drafter is not None:
            self.drafter.check()

    def is_over(self, request: Request) -> bool:
        """Whether no drafter can serve a request any more."""
        if request.session.state is ControllerState.BARRED:
            return True
        return request.session.tree is None and len(request.context) > self.setup.max_context

    def settle(self) -> None:
        """Let everything in flight arrive, with no more commits."""
        self.connect()
        for _ in range(3000):
            self.tick()
            busy = self.up.in_flight or self.down.in_flight or (self.drafter and self.drafter.branches)
            if busy:
                continue
            if all(request.session.tree is not None or self.is_over(request) for request in self.requests):
                return
            self.now += 20  # nothing happens until a back-off ends
        raise AssertionError("the pair does not come to rest")

    def totals(self) -> Counter[str]:
        """What this history has seen; ends it."""
        self._add_up()
        self.shared = Shared()
        return self.seen

    def _add_up(self) -> None:
        self.seen.update({name: int(value) for name, value in self.shared.counters.items()})

    def _new_session(self, index: int, context: Sequence[int]) -> ControllerSession:
        if self.logs is None:
            return ControllerSession(context, self.shared)
        key = f"request{index}.{self.restarts}"
        return RecordedControllerSession(
            context, self.shared, key=key, sink=self.logs.controller.append, now=self.now_s
        )

    def _open_all(self) -> None:
        for request in self.requests:
            if request.number is None:
                self._open(request)

    def _open(self, request: Request) -> None:
        """What the pool does: open where a link is there and the session wants it."""
        session = request.session
        if self.drafter is None or not session.wants_link(self.now_s) or session.length > self.setup.max_context:
            return
        number = request.number = self.next_number
        self.next_number += 1
        with rules.controller_call(session):
            opened = session.open(number, self.limits, self.now_s, vocab_size=VOCAB_SIZE, turnaround=self.turnaround)
        assert opened.tokens == tuple(request.context)
        self.by_number[number] = request
        request.opened += 1
        self.seen["re-open"] += request.opened > 1
        self.up.send(self.now, [opened])
