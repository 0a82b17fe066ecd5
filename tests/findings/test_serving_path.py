"""The serving path and the link: what peers, long contexts, many rows and our own faults may cost the target.

Costs are counted, in bytes allocated or in Python calls, rather than timed: a count is the same on any machine.
"""

import asyncio
import contextlib
import math
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from socket import SO_RCVBUF, SOL_SOCKET
from types import FrameType

import pytest
from aiohttp import web
from finding import finding
from pools import pool_of, up
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, limits, toy, wait_until
from worlds import Costs, World, unconnected_pool

from vllm_wanspec.controller import link as link_module
from vllm_wanspec.controller.metrics import PoolCollector
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.draft import NO_DRAFT
from vllm_wanspec.core.drafter import DrafterSession
from vllm_wanspec.core.messages import Commit, Message, Nodes, Open, Pong, Welcome, decode, encode
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.sim.service import Handler

MIB = 2**20
LONG_CONTEXT = 128 * 1024
STEP = Costs(8e-3, 2e-5, 1e-5)


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-offs in hundredths of a second, and a limit of silence of one."""
    monkeypatch.setattr(link_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(link_module, "MAX_BACKOFF_S", 0.04)
    monkeypatch.setattr(link_module, "REFUSED_BACKOFF_S", 0.03)
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(link_module, "SILENCE_LIMIT_S", 1.0)


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(toy(seed=4)) as server:
        yield server


def allocated(action: Callable[[], object]) -> int:
    """The most bytes that ``action`` had allocated at a time."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        action()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def calls(action: Callable[[], object]) -> int:
    """How many Python functions ``action`` calls, its own included."""
    count = 0

    def counted(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


# Peers that do not read


def deaf(server: DrafterServer, word: Callable[[], list[Message]]) -> Handler:
    """A drafter that welcomes, reads nothing any more, and says ``word`` now and then."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([Welcome(1, "toy", VOCAB_SIZE, FINGERPRINT, 256, 4096, 10**6)]))
        transport = request.transport
        assert transport is not None
        server._transports.add(transport)  # ended with the server
        transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_RCVBUF, 65_536)
        transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(ConnectionError):
            while True:
                await asyncio.sleep(0.1)
                await socket.send_bytes(encode(word()))
        return socket

    return handler


@contextlib.contextmanager
def served_by_deaf(server: DrafterServer, word: Callable[[], list[Message]]) -> Iterator[DraftPool]:
    server.handler = deaf(server, word)
    with pool_of(server.url) as pool:
        wait_until(lambda: up(pool))
        try:
            yield pool
        finally:
            server.stop()  # first: nothing else ends a connection that has something to send


NOTHING: Callable[[], list[Message]] = list
PONG: Callable[[], list[Message]] = lambda: [Pong(int(time.monotonic() * 1e6))]  # noqa: E731


@finding("2.1", "a write has no deadline: whoever says a word now and then is never dropped")
@pytest.mark.usefixtures("short_times")
def test_a_peer_that_does_not_read_is_dropped_whatever_it_says(server: DrafterServer) -> None:
    with DrafterServer(toy(seed=4)) as other, contextlib.ExitStack() as stack:
        pools = [stack.enter_context(served_by_deaf(*peer)) for peer in ((server, NOTHING), (other, PONG))]
        names = [f"r{index}" for index in range(16)]
        for pool in pools * 5:  # more than the sockets' buffers take
            pool.begin(names, [(name, [70_000] * 32_000) for name in names])
        wait_until(lambda: min(server.attempts, other.attempts) > 1, timeout_s=4.0)


@finding("2.1", "the outbox has no bound")
def test_the_outbox_of_a_peer_that_does_not_read_stays_bounded() -> None:
    pool = unconnected_pool(lambda: 100.0)
    names = [f"r{index}" for index in range(64)]
    for _ in range(40):  # requests come and go
        pool.begin(names, [(name, [70_000] * 1000) for name in names])
    assert sum(len(message.tokens) for message in pool.links[0]._outbox if isinstance(message, Open)) < 1_000_000


# Hostile frames


def lists(count: int) -> bytes:
    """A msgpack array of so many empty arrays."""
    return b"\xdd" + count.to_bytes(4, "big") + b"\x90" * count


@finding("2.2", "a frame is built whole before any of it is checked")
@pytest.mark.parametrize("before", [b"", b"\x91\x94\x06\x01\x01"], ids=["for messages", "for nodes"])
def test_a_hostile_frame_is_refused_for_next_to_nothing(before: bytes) -> None:
    frame = before + lists(MIB)

    def refused() -> None:
        with pytest.raises(RemoteProtocolError):
            decode(frame)

    assert allocated(refused) < MIB


@finding("2.2", "a controller takes frames of 8 MiB, where no drafter has 3 MiB to send")
@pytest.mark.usefixtures("short_times")
def test_a_controller_takes_no_frame_larger_than_a_drafter_sends(server: DrafterServer) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([Welcome(1, "toy", VOCAB_SIZE, FINGERPRINT, 256, 4096, 10**6)]))
        if server.attempts == 1:
            with contextlib.suppress(ConnectionError):
                await socket.send_bytes(bytes(6 * MIB))
        async for _ in socket:
            pass
        return socket

    server.handler = handler
    with pool_of(server.url) as pool:
        wait_until(lambda: server.attempts > 1)
        assert pool.links[0].received_bytes < 3 * MIB


# What a row and a node cost


def step_calls(world: World, costs: Costs) -> int:
    """Python calls that `pool.step` and `pool.draft` make in one step: the least of some steps of ``world``."""
    counted: list[int] = []
    step, draft = world.pool.step, world.pool.draft
    given: list[list[list[int]]] = []

    def counting_step(batch: list[tuple[str, list[int]]]) -> None:
        counted.append(calls(lambda: step(batch)))

    def counting_draft(names: list[str | None], limit: int) -> list[list[int]]:
        counted[-1] += calls(lambda: given.append(draft(names, limit)))
        return given.pop()

    world.pool.step, world.pool.draft = counting_step, counting_draft  # type: ignore[method-assign, assignment]
    world.run(8, costs)
    return min(counted)


def useful(rows: int) -> World:
    """A world in which all rows have drafts."""
    world = World(rows, speculation=8, agreement=0.8, seed=1)
    world.run(8, STEP)
    return world


def test_a_row_costs_the_serving_path_next_to_nothing() -> None:
    assert (step_calls(useful(128), STEP) - step_calls(useful(64), STEP)) / 64 <= 3.0


def test_where_drafts_do_not_pay_they_cost_the_serving_path_little() -> None:
    dear = STEP._replace(draft_s=1e-4)
    world = World(64, speculation=8, agreement=0.02, seed=1)
    world.run(150, dear)
    before = world.pool.counters.offered_tokens
    withheld = step_calls(world, dear)
    assert world.pool.counters.offered_tokens - before < 4 * 64 * 8
    assert withheld / 64 <= 2.5  # what was verified is committed all the same; nothing is drafted


def test_a_node_costs_the_links_side_next_to_nothing() -> None:
    pool = unconnected_pool(lambda: 100.0)
    names = [f"r{index}" for index in range(16)]
    pool.begin([], [(name, [1, 2, 3]) for name in names])
    line = tuple(NodeRecord(index + 1, index, index, math.log(0.8), 0.5) for index in range(64))
    frame = encode([Nodes(pool._sessions[name].number, 3, line) for name in names])
    made = calls(lambda: pool.link_received(pool.links[0], decode(frame)))
    assert pool.counters.added_nodes == 16 * 64
    assert made / (16 * 64) <= 0.5


def test_no_draft_has_ids_that_the_vocabulary_lacks() -> None:
    now = 100.0
    pool = unconnected_pool(lambda: now, vocab_size=100, fallback=["ngram"])
    pool.begin([], [("r", [7, 8, 150, 9, 7])])  # vLLM lets prompts have ids that the tokenizer's own stop short of
    pool.step_begins(1, 0)
    now += 0.030
    pool.step([("r", [8])])
    [draft] = pool.draft(["r"], 4)
    assert [token for token in draft if token >= 100] == []


# Long contexts


@finding("2.5", "a session's context is copied twice, at 8 bytes a token, when it opens")
def test_opening_a_long_context_copies_it_once_at_most() -> None:
    pool = unconnected_pool(lambda: 100.0)
    prompt = list(range(LONG_CONTEXT))
    assert allocated(lambda: pool.begin([], [("a", prompt)])) <= 6 * LONG_CONTEXT


def test_reopening_all_sessions_does_not_copy_all_contexts_at_once() -> None:
    pool = unconnected_pool(lambda: 100.0)
    [link] = pool.links
    welcome, link.welcome = link.welcome, None
    pool.begin([], [(f"r{index}", list(range(8192))) for index in range(64)])
    link.welcome = welcome
    assert allocated(lambda: pool.link_ready(link)) < 64 * 8192 * 2


@finding("2.5", "the first lookup copies all of the context, of which it searches the last 2,048 tokens")
def test_the_first_lookup_in_a_long_context_copies_what_it_searches() -> None:
    session = ControllerSession(list(range(LONG_CONTEXT)), Shared())
    assert allocated(lambda: session.fall_back(NO_DRAFT, 8, 0.0, 100.0)) < LONG_CONTEXT


@finding("2.5", "the start of a branch copies the whole context")
def test_a_branch_start_does_not_copy_the_context() -> None:
    opened = Open(1, tuple(range(LONG_CONTEXT)), limits(24, 512))
    session = DrafterSession(opened, vocab_size=LONG_CONTEXT, max_context=2 * LONG_CONTEXT)
    session.start(0.0)
    session.committed(Commit(1, LONG_CONTEXT, (5,)), 0.0)
    started: list[object] = []
    copied = allocated(lambda: started.extend(session.committed(Commit(1, LONG_CONTEXT + 1, (6,)), 0.0)))
    assert started
    assert copied < LONG_CONTEXT


# Faults of our own


def faulty_once(action: Callable[..., list[list[int]]]) -> Callable[..., list[list[int]]]:
    """``action``, which raises when it is called first."""
    left = [KeyError("a bug")]

    def call(*args: object) -> list[list[int]]:
        if left:
            raise left.pop()
        return action(*args)

    return call


def world_with_a_fault(monkeypatch: pytest.MonkeyPatch) -> World:
    """A world that has run well, and in whose next step a call of `pool.draft` raises."""
    world = World(2, speculation=4, agreement=1.0, seed=1)
    world.run(10, STEP)
    monkeypatch.setattr(world.pool, "draft", faulty_once(world.pool.draft))
    world.may_fail = True
    return world


@finding("2.6", "one exception ends drafting until the engine is started again")
def test_drafts_come_back_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_with_a_fault(monkeypatch)
    offered = world.pool.counters.offered_tokens
    world.run(300, STEP._replace(base_s=0.2))
    assert world.pool.counters.offered_tokens > offered


@finding("2.6", "after a fault new requests go on opening sessions that are never told of a commit")
def test_after_a_fault_no_session_is_open_that_is_not_told_of_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_with_a_fault(monkeypatch)
    world.step(STEP)
    world.resize(4)
    world.run(300, STEP._replace(base_s=0.2))
    told = {name: live.core.length for name, live in world.pool._sessions.items() if live.link is not None}
    assert told == {name: world.length[name] for name in told}


def metrics(pool: DraftPool) -> dict[tuple[str, str], float]:
    """All samples, by name and labels."""
    samples = [sample for family in PoolCollector(pool).collect() for sample in family.samples]
    return {(sample.name, str(sample.labels)): sample.value for sample in samples}


@finding("2.6", "no metric tells that drafting has stopped by a fault of its own")
def test_a_fault_shows_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_with_a_fault(monkeypatch)
    before = metrics(world.pool)
    world.step(STEP)
    after = metrics(world.pool)
    assert [key for key, value in after.items() if "fault" in key[0] and value > before.get(key, 0.0)]


@pytest.fixture
def lost_by_a_bug(monkeypatch: pytest.MonkeyPatch) -> Iterator[DraftPool]:
    """A pool with two drafters whose `link_lost` raised when the first was lost, and that drafter back again."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # what a thread dies of is not what is tested
    with DrafterServer(toy(seed=4)) as one, DrafterServer(toy(seed=4)) as other, pool_of(one.url, other.url) as pool:
        wait_until(lambda: up(pool) == 2)
        lost, left = pool.link_lost, [KeyError("a bug")]

        def link_lost(link: link_module.DrafterLink) -> None:
            if left:
                raise left.pop()
            lost(link)

        monkeypatch.setattr(pool, "link_lost", link_lost)
        one.stop()
        wait_until(lambda: not left)
        one.start()
        yield pool


@finding("2.7", "an exception in `link_lost` ends the thread that runs all links")
@pytest.mark.usefixtures("short_times")
def test_a_fault_when_a_link_is_lost_does_not_end_the_links(
    lost_by_a_bug: DraftPool,
) -> None:
    pool = lost_by_a_bug
    wait_until(lambda: up(pool) == 2, timeout_s=2.0)
    pool.begin([], [("a", [1, 2, 3]), ("b", [1, 2, 3])])
    wait_until(lambda: pool.counters.received_nodes, timeout_s=2.0)


@finding("2.7", "once the links' thread has ended, each flush raises")
@pytest.mark.usefixtures("short_times")
def test_flushing_does_not_raise_though_the_links_have_ended(
    lost_by_a_bug: DraftPool,
) -> None:
    pool = lost_by_a_bug
    wait_until(lambda: up(pool) == 2 or not pool._thread._thread.is_alive())
    raised = []
    try:
        pool.begin([], [("a", [1, 2, 3]), ("b", [1, 2, 3])])
        pool.step([("a", [1]), ("b", [1])])
    except Exception as error:
        raised.append(error)
    assert raised == []
