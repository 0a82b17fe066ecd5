"""Generated histories of the pair: both real sessions on a virtual network, disturbed in every way that there is."""

import math
import random
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from pair import Setup, World
from pair_finish import finish
from toys import VOCAB_SIZE

from vllm_wanspec.core.messages import (
    MAX_TOKEN,
    REJECT_CODES,
    Close,
    Commit,
    Limits,
    Message,
    Nodes,
    Open,
    Ping,
    Reject,
    Welcome,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.wire import encode

HISTORIES = 2_000
STEPS = 16
ENOUGH = (
    "late_hits",
    "promoted branch",
    "drafts right after a re-root",
    "stale_nodes",
    "re-open",
    "budget stop",
    "preemption",
    "hits",
    "branch_hits",
    "misses",
    "blind_steps",
    "late_drafts",
    "rejected_sessions",
    "accepted",
    "accepted_branch",
    "garbage refused",
    "garbage accepted",
    "repeated commits",
)
"""What all histories together must have seen at least 100 times each."""

limits = st.builds(
    Limits,
    lookahead=st.one_of(st.integers(1, 40), st.integers(8, 40)),
    max_nodes=st.one_of(st.integers(8, 64), st.integers(64, 512)),
    max_branches=st.sampled_from((1, 2, 3, 4, 6)),
    running_branches=st.sampled_from((1, 2, 4, 8, 12)),
    branch_depth=st.integers(1, 8),
    entropy_threshold_nats=st.sampled_from((0.0, 0.0, 0.5, 1.0, math.inf, None)),
    min_probability=st.sampled_from((0.0, 0.0, 0.05, 0.2)),
)
setups = st.builds(
    Setup,
    limits,
    seed=st.integers(0, 19),
    agreement=st.sampled_from((0.5, 0.8, 0.8, 0.95)),
    requests=st.sampled_from((1, 1, 2, 3)),
    max_context=st.sampled_from((10**6, 10**6, 10**6, 200, 60)),
    max_branch_tokens=st.sampled_from((2, 20, 256)),
    places=st.sampled_from((1, 4, 16, 48)),
    delay=st.one_of(st.integers(0, 3), st.integers(0, 10)),
    jitter=st.sampled_from((0, 0, 2, 6)),
    burst=st.integers(1, 4),
)
cycles = st.integers(0, 4)
gaps = st.integers(1, 5)
which = st.integers(0, 2)
seeds = st.integers(0, 2**32 - 1)
totals: Counter[str] = Counter()


class PairMachine(RuleBasedStateMachine):
    """One history: rules disturb, and most let some verification steps pass."""

    @initialize(setup=setups)
    def begin(self, setup: Setup) -> None:
        self.world = World(setup)

    def run_on(self, count: int, gap: int, **how: object) -> None:
        for _ in range(count):
            self.world.tick(gap)
            self.world.step(**how)  # type: ignore[arg-type]

    def request(self, index: int):
        return self.world.requests[index % len(self.world.requests)]

    @rule(count=st.integers(1, 6), gap=gaps)
    def run(self, count: int, gap: int) -> None:
        self.run_on(count, gap)

    @rule(
        count=st.integers(1, 3),
        gap=gaps,
        limit=st.integers(0, 8),
        least=st.sampled_from((0.0, 0.05, 0.4, 1.0)),
        withhold=st.booleans(),
    )
    def run_with_less(self, count: int, gap: int, limit: int, least: float, withhold: bool) -> None:
        self.run_on(count, gap, limit=limit, least=least, withhold=withhold)

    @rule(ticks=st.integers(1, 40))
    def wait(self, ticks: int) -> None:
        self.world.tick(ticks)

    @rule(up=st.integers(0, 12), down=st.integers(0, 12), jitter=st.sampled_from((0, 0, 3, 8)), count=cycles)
    def change_network(self, up: int, down: int, jitter: int, count: int) -> None:
        self.world.up.delay, self.world.down.delay = up, down
        self.world.up.jitter = self.world.down.jitter = jitter
        self.run_on(count, 2)

    @rule(burst=st.integers(1, 6))
    def change_engine(self, burst: int) -> None:
        self.world.burst = burst

    @rule(width=st.integers(1, 16), count=cycles)
    def resize(self, width: int, count: int) -> None:
        self.world.resize_each(width)
        self.run_on(count, 2)

    @rule(count=cycles, gap=gaps)
    def disconnect(self, count: int, gap: int) -> None:
        self.world.disconnect()
        self.run_on(count, gap)
        self.world.connect()
        self.run_on(1, gap)

    @rule(count=cycles, gap=gaps)
    def restart_drafter(self, count: int, gap: int) -> None:
        self.world.restart_drafter()
        self.run_on(count, gap)

    @rule(whole=st.booleans(), index=which, count=cycles, gap=gaps)
    def begin_again(self, whole: bool, index: int, count: int, gap: int) -> None:
        if whole:
            self.world.restart_controller()
        else:
            self.world.begin_again(self.request(index))
        self.run_on(count, gap)

    @rule(count=cycles)
    def fail_engine(self, count: int) -> None:
        self.world.host.fail("out of memory")
        self.run_on(count, 3)

    @rule(index=which, code=st.sampled_from(sorted(REJECT_CODES)), count=cycles)
    def reject(self, index: int, code: str, count: int) -> None:
        number = self.request(index).number
        if self.world.connection is not None and number is not None:
            self.world.connection.reject(number, code)
        self.run_on(count, 3)

    @rule(index=which, count=st.integers(1, 9), gap=gaps)
    def repeat_commit(self, index: int, count: int, gap: int) -> None:
        self.world.commit_again(self.request(index), count)
        self.run_on(1, gap)

    @rule(index=which, count=st.integers(1, 4), gap=gaps, jump=st.sampled_from((0, 0, 1, 30)), anew=st.booleans())
    def preempt(self, index: int, count: int, gap: int, jump: int, anew: bool) -> None:
        request = self.request(index)
        self.world.preempt(request)
        self.run_on(count, gap)
        self.world.resume(request, jump=jump, anew=anew)
        self.run_on(1, gap)

    @rule(seed=seeds, to_drafter=st.booleans(), damage=st.booleans(), linger=st.integers(0, 3))
    def garbage(self, seed: int, to_drafter: bool, damage: bool, linger: int) -> None:
        """A frame that no correct peer sends. Where it is not refused, the peer may go on for a while."""
        rng = random.Random(seed)
        world = self.world
        frame = damaged(rng, world.up.last if to_drafter else world.down.last)
        if not damage:
            frame = encode([wrong_message(rng, world, self.request(seed), to_drafter)])
        refused = world.feed_drafter(frame) if to_drafter else world.feed_controller(frame)
        world.check()
        if not refused:
            self.run_on(linger, 2)
            world.check()
        world.disconnect()
        world.connect()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            finish(self.world)
            totals.update(self.world.totals())
            totals["histories"] += 1


def damaged(rng: random.Random, frame: bytes) -> bytes:
    data = bytearray(frame or b"\x90")
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        match rng.randrange(6):
            case 0 | 1 | 2:
                data[place] ^= 1 << rng.randrange(8)
            case 3:
                data[place] = rng.randrange(256)
            case 4:
                data.insert(place, rng.randrange(256))
            case _ if len(data) > 1:
                del data[place]
    return bytes(data)


def wrong_message(rng: random.Random, world: World, request, to_drafter: bool) -> Message:
    """A valid message whose session, position, ids, parents or tokens are wrong, or perhaps right by chance."""
    number = max(0, (request.number or world.next_number) + rng.choice((-1, 0, 0, 0, 0, 0, 0, 1, 50)))
    length = max(0, len(request.context) + rng.choice((-400, -3, -1, 0, 0, 0, 0, 0, 1, 2, 400)))
    tokens = tuple(rng.randrange(VOCAB_SIZE + (rng.random() < 0.2) * 9) for _ in range(rng.randint(1, 6)))
    if rng.random() < 0.1:
        welcome = Welcome(1, "m", VOCAB_SIZE, "f", 9, 9, 9)
        return rng.choice([Ping(5), Close(number), welcome, Reject(number, "unknown")])
    if to_drafter:
        if rng.random() < 0.4:
            wild = [rng.choice((1, 3, 40, 5000, MAX_TOKEN)) for _ in range(4)]
            wanted = Limits(wild[0], wild[1], min(wild[2], 64), min(wild[3], 1024), rng.randint(1, 4096))
            return Open(number, tokens, wanted)
        return Commit(number, length, tokens)
    return Nodes(number, length, tuple(wrong_nodes(rng, request, length)))


def wrong_nodes(rng: random.Random, request, seen: int) -> list[NodeRecord]:
    tree = request.session.tree
    last = tree.last_id if tree is not None else 0
    if tree is not None and tree.pending:
        last += max(0, seen - tree.position)  # what is pending takes ids
    last = max(0, last + (0 if rng.random() < 0.9 else rng.choice((1, 98, -1, -50))))
    known = list(tree._index) if tree is not None else [0]
    records = []
    strange = (rng.random() < 0.15) * 9
    for _ in range(rng.choice((0, 1, 1, 3, 8, 700))):
        last += 1
        parent = min(last - 1, rng.choice((rng.choice(known), last - 1, rng.randrange(last))))
        if tree is not None and tree.pending and rng.random() < 0.7:
            token = tree.pending[0]
        else:
            token = rng.randrange(VOCAB_SIZE + strange)
        entropy = rng.choice((0.0, 0.7, 0.7, 1.5e38))
        records.append(NodeRecord(last, parent, token, rng.choice((0.0, -0.0, -0.7, -0.9, -99.0, -1.5e38)), entropy))
        known.append(last)
    return records


@pytest.mark.timeout(900)
def test_generated_histories() -> None:
    totals.clear()
    began_s = time.perf_counter()
    run_state_machine_as_test(
        PairMachine,
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{totals['histories']} histories in {time.perf_counter() - began_s:.0f} s")
    print(", ".join(f"{name} {count}" for name, count in sorted(totals.items())))
    assert totals["histories"] >= HISTORIES
    for name in ENOUGH:
        assert totals[name] >= 100, (name, totals[name])
    assert {f"reject {code}" for code in REJECT_CODES} <= set(totals)
    assert totals["accepted_main_line"] + totals["accepted_branch"] == totals["accepted"]
