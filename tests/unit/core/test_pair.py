"""Both real sessions and the real codec, joined by a virtual network over a toy engine: generated histories."""

from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import VOCAB_SIZE, Toy

from vllm_wanspec.core.controller import ControllerSession, Counters
from vllm_wanspec.core.drafter import Action, DrafterSession, StartBranch, StopBranch
from vllm_wanspec.core.messages import Close, Commit, Message, Nodes, Open, Reject, decode, frames
from vllm_wanspec.core.tree import DraftTree, Node

PROMPT = (7, 7, 42)
SPECULATION_LENGTH = 4
TICK_S = 0.005


@dataclass
class Wire:
    """One direction: frames arrive in order, ``delay`` ticks after they were sent."""

    delay: int
    in_flight: deque[tuple[int, bytes]] = field(default_factory=deque)

    def send(self, now: int, messages: list[Message]) -> None:
        for frame in frames(messages):
            earliest = self.in_flight[-1][0] if self.in_flight else 0
            self.in_flight.append((max(earliest, now + self.delay), frame))

    def arrived(self, now: int) -> list[Message]:
        messages: list[Message] = []
        while self.in_flight and self.in_flight[0][0] <= now:
            messages += decode(self.in_flight.popleft()[1])
        return messages


class ToyDrafter:
    """Sessions of one connection, and an engine that gives each running branch ``burst`` tokens per tick."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.sessions: dict[int, DrafterSession] = {}
        self.branches: dict[tuple[int, int], tuple[list[int], int]] = {}

    def take(self, message: Message) -> None:
        match message:
            case Open(session=number):
                assert number not in self.sessions
                session = DrafterSession(
                    message, vocab_size=VOCAB_SIZE, max_context=self.world.max_context, max_branch_tokens=20
                )
                self.sessions[number] = session
                self.do(number, session.start())
            case Commit(session=number):
                if number in self.sessions:
                    self.do(number, self.sessions[number].committed(message))
            case Close(session=number):
                session = self.sessions.pop(number, None)
                self.do(number, session.close() if session else [])
            case _:
                raise AssertionError(f"unexpected {message}")

    def do(self, number: int, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartBranch(branch, tokens, count):
                    assert count >= 1
                    self.branches[number, branch] = (list(tokens), count)
                case StopBranch(branch):
                    del self.branches[number, branch]
                case _:
                    if isinstance(action, Reject):
                        del self.sessions[number]
                    self.world.down.send(self.world.now, [action])

    def tick(self, burst: int) -> None:
        for key in list(self.branches):
            number, branch = key
            context, left = self.branches[key]
            steps = []
            for _ in range(min(burst, left)):
                steps.append(self.world.toy.step(context))
                context.append(steps[-1].token)
            self.branches[key] = (context, left - len(steps))
            self.do(number, self.sessions[number].drafted(branch, steps))
            if key in self.branches and self.branches[key][1] == 0:
                del self.branches[key]
                self.do(number, self.sessions[number].ended(branch))
        assert len(self.branches) <= len(self.sessions)

    def fail_engine(self) -> None:
        for number, branch in list(self.branches):
            del self.branches[number, branch]
            self.do(number, self.sessions[number].failed())

    def check(self) -> None:
        for session in self.sessions.values():
            check_bounds(session.tree, self.world.max_nodes)
            line = session.tree.best_path(10**6)
            assert len(line) <= self.world.lookahead


class World:
    """The target's side, the network and the drafter, on one clock of ticks."""

    def __init__(
        self, *, toy: Toy, delay: int, lookahead: int, max_nodes: int, alternatives: int, max_context: int
    ) -> None:
        self.toy, self.lookahead, self.max_nodes, self.max_context = toy, lookahead, max_nodes, max_context
        self.now = 0
        self.counters = Counters()
        self.seen: Counter[str] = Counter()
        self.context = list(PROMPT)
        self.session = ControllerSession(PROMPT, self.counters, max_nodes=max_nodes, alternatives=alternatives)
        self.up, self.down = Wire(delay), Wire(delay)
        self.drafter: ToyDrafter | None = ToyDrafter(self)
        self.number = 0
        self.burst = 1
        self.next_open()

    def next_open(self) -> None:
        """What the pool does: open where a link is there and the session wants it."""
        if self.drafter is None or not self.session.wants_link(self.now * TICK_S):
            return
        if len(self.context) > self.max_context:
            return
        self.number += 1
        self.seen["re-opened"] += self.number > 1
        opened = self.session.open(
            self.number, vocab_size=VOCAB_SIZE, max_nodes=self.max_nodes, lookahead=self.lookahead
        )
        self.up.send(self.now, [opened])

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1
            if self.drafter is not None:
                for message in self.up.arrived(self.now):
                    self.drafter.take(message)
                self.drafter.tick(self.burst)
                self.drafter.check()
                self.deliver()
            self.next_open()

    def deliver(self) -> None:
        for message in self.down.arrived(self.now):
            assert isinstance(message, Nodes | Reject)
            assert message.session == self.number
            tree = self.session.tree
            pending = len(tree.pending) if tree else 0
            self.session.receive(message, self.now * TICK_S)
            if self.session.tree is not None and tree is self.session.tree:
                confirmed = pending - len(tree.pending)
                echoes = sum(node.is_echo for node in message.nodes) if isinstance(message, Nodes) else 0
                self.seen["confirmed pending"] += confirmed
                self.seen["confirmed by a draft"] += max(0, confirmed - echoes)
            self.check()

    def step(self) -> None:
        """One verification step of the target."""
        draft = self.session.draft(SPECULATION_LENGTH)
        assert len(draft) <= SPECULATION_LENGTH
        assert all(0 <= token < VOCAB_SIZE for token in draft)
        # Exactly what the draft model says after the committed context: nothing of an older context slips through.
        assert draft == self.toy.drafted(self.context, len(draft))
        tokens = self.toy.verify(self.context, draft)
        self.seen["drafted"] += len(draft)
        self.seen["accepted"] += len(tokens) - 1
        self.context += tokens
        message = self.session.commit(tokens)
        assert self.session.length == len(self.context)
        if message is not None:
            self.up.send(self.now, [message])
        self.check()

    def disconnect(self) -> None:
        """Both directions are cut, and what was in them is lost; so are the drafter's sessions."""
        self.up.in_flight.clear()
        self.down.in_flight.clear()
        self.drafter = None
        self.session.link_lost()

    def connect(self) -> None:
        if self.drafter is None:
            self.drafter = ToyDrafter(self)

    def check(self) -> None:
        if self.session.tree is not None:
            check_bounds(self.session.tree, self.max_nodes)
            assert self.session.tree.committed_length == len(self.context)

    def settle(self) -> None:
        """Let everything in flight arrive, with no more commits."""
        self.connect()
        for _ in range(2000):
            self.tick()
            busy = self.up.in_flight or self.down.in_flight or (self.drafter and self.drafter.branches)
            if not busy and (self.session.tree is not None or len(self.context) > self.max_context):
                return
        raise AssertionError("the pair does not come to rest")


def check_bounds(tree: DraftTree, max_nodes: int) -> None:
    assert tree.size <= max_nodes
    assert len(tree._nodes) == tree.size + 1


def shape(node: Node) -> tuple[int, int, int, list]:
    children = sorted(node.children.values(), key=lambda child: child.id)
    return (node.id, node.token, node.position, [shape(child) for child in children])


def ids(node: Node) -> list[int]:
    found, todo = [], [node]
    while todo:
        top = todo.pop()
        found.append(top.id)
        todo.extend(top.children.values())
    return sorted(found)


events = st.one_of(
    st.tuples(st.just("run"), st.integers(1, 12), st.integers(1, 6)),
    st.tuples(st.just("run"), st.integers(5, 12), st.integers(1, 6)),
    st.tuples(st.just("delay"), st.integers(0, 12), st.integers(0, 12)),
    st.tuples(st.just("burst"), st.integers(1, 4), st.just(0)),
    st.tuples(st.just("disconnect"), st.integers(0, 8), st.just(0)),
    st.tuples(st.just("engine failure"), st.just(0), st.just(0)),
    st.tuples(st.just("engine failure"), st.just(0), st.just(0)),
    st.tuples(st.just("reject"), st.sampled_from(["overloaded", "unknown"]), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 40), st.just(0)),
)


def play(world: World, script: list[tuple]) -> None:
    for name, first, second in script:
        if name == "run":
            for _ in range(first):
                world.tick(second)
                world.step()
        elif name == "delay":
            world.up.delay, world.down.delay = first, second
        elif name == "burst":
            world.burst = first
        elif name == "disconnect":
            world.disconnect()
            for _ in range(first):
                world.tick()
                world.step()
            world.connect()
        elif name == "engine failure" and world.drafter is not None:
            world.drafter.fail_engine()
        elif name == "reject" and world.drafter is not None:
            for number, session in list(world.drafter.sessions.items()):
                world.drafter.do(number, [*session.close(), Reject(number, first)])
        elif name == "wait":
            world.tick(first)


def check_quiet(world: World) -> None:
    """After quiescence both trees are the same, and drafts are there, unless the context is over."""
    world.settle()
    tree = world.session.tree
    if tree is None:
        return
    assert world.drafter is not None
    own = world.drafter.sessions[world.number].tree
    assert not tree.pending
    assert not own.pending
    assert shape(tree.cursor) == shape(own.cursor)
    assert tree.committed_length == own.committed_length == len(world.context)
    full = own.size >= world.max_nodes
    world.seen["budget stop"] += full
    room = min(world.lookahead, world.max_context - len(world.context))
    ahead = len(world.session.draft(world.lookahead))
    if room > 0:
        assert ahead >= 1
        assert full or ahead >= min(room, world.lookahead - 4)
    assert ahead <= max(0, room)


def test_generated_histories() -> None:
    totals: Counter[str] = Counter()

    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(
        script=st.lists(events, min_size=1, max_size=14),
        seed=st.integers(0, 10**6),
        delay=st.integers(0, 10),
        lookahead=st.sampled_from([1, 2, 5, 16, 40]),
        max_nodes=st.sampled_from([8, 20, 64, 512]),
        alternatives=st.sampled_from([1, 2, 4, 7]),
        max_context=st.sampled_from([10**6, 10**6, 120]),
    )
    def history(
        script: list[tuple],
        seed: int,
        delay: int,
        lookahead: int,
        max_nodes: int,
        alternatives: int,
        max_context: int,
    ) -> None:
        world = World(
            toy=Toy(seed),
            delay=delay,
            lookahead=lookahead,
            max_nodes=max_nodes,
            alternatives=alternatives,
            max_context=max_context,
        )
        play(world, script)
        check_quiet(world)
        # Progress after all that: the run goes on, with drafts, and is the target's own sequence.
        accepted = world.seen["accepted"]
        for _ in range(12):
            world.tick(3)
            world.step()
        check_quiet(world)
        count = len(world.context) - len(PROMPT)
        assert world.context[len(PROMPT) :] == world.toy.continuation(PROMPT, count)
        if len(world.context) < max_context and lookahead > 1 and max(world.up.delay, world.down.delay) <= 1:
            assert world.seen["accepted"] > accepted
        totals.update(world.seen)
        totals.update(dict(world.counters.items()))
        totals["histories"] += 1

    history()
    assert totals["histories"] >= 600, totals
    for name in (
        "hits",
        "misses",
        "blind_steps",
        "added_nodes",
        "late_drafts",
        "stale_nodes",
        "rejected_sessions",
        "confirmed pending",
        "confirmed by a draft",
        "re-opened",
        "budget stop",
        "accepted",
    ):
        assert totals[name] >= 100, (name, totals[name])
    assert totals["local_draft_passes"] == 0


def make_world(**changes: int) -> World:
    values = {"delay": 2, "lookahead": 24, "max_nodes": 256, "alternatives": 4, "max_context": 10**6, **changes}
    return World(toy=Toy(3), **values)


def test_far_enough_ahead_most_steps_are_served() -> None:
    world = make_world()
    for _ in range(100):
        world.tick(6)
        world.step()
    assert (len(world.context) - len(PROMPT)) / 100 > 2.0
    assert world.counters.hits >= 40


def test_without_a_drafter_generation_goes_on() -> None:
    world = make_world()
    world.disconnect()
    for _ in range(50):
        world.tick()
        world.step()
    assert world.context[len(PROMPT) :] == world.toy.continuation(PROMPT, 50)
    assert world.seen["drafted"] == 0


@pytest.mark.parametrize("rounds", [2000])
def test_memory_and_ids_over_a_long_session(rounds: int) -> None:
    world = make_world(max_nodes=64)
    for _ in range(rounds):
        world.tick(4)
        world.step()
        assert len(world.up.in_flight) + len(world.down.in_flight) < 50
    assert world.counters.opened_sessions == 1
    assert world.session.tree is not None
    assert world.session.tree.last_id > 2 * rounds
    check_quiet(world)


def test_a_commit_that_arrives_twice_changes_nothing() -> None:
    world = make_world(delay=0)
    for _ in range(30):
        world.tick(2)
        world.step()
        assert world.drafter is not None
        world.tick()
        session = world.drafter.sessions[world.number]
        before = ids(session.tree.cursor)
        again = Commit(world.number, len(world.context) - 1, (world.context[-1],))
        assert session.committed(again) == []
        assert ids(session.tree.cursor) == before
