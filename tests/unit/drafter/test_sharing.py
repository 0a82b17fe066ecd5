"""Places for running branches over sessions and connections, and what goes into one frame."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from host_peer import PROMPT, TOY, Peer, opened, with_peer
from hypothesis import given
from hypothesis import strategies as st
from toys import draft_model

from vllm_wanspec.core.messages import (
    MAX_NODES_PER_MESSAGE,
    Close,
    Commit,
    Message,
    Nodes,
    Pong,
    Reject,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.drafter.connection import Connection, gathered
from vllm_wanspec.drafter.host import StreamingHost
from vllm_wanspec.sim.engine import Engine

WIDE = {"lookahead": 24, "max_nodes": 512, "max_branches": 4, "running_branches": 64, "branch_depth": 4}


@asynccontextmanager
async def peers(host: StreamingHost, count: int) -> AsyncIterator[list[Peer]]:
    """Controllers that have said hello."""
    all_peers = [Peer(host=host) for _ in range(count)]
    for peer in all_peers:
        await peer.greet()
    try:
        yield all_peers
    finally:
        for peer in all_peers:
            await peer.end()
        assert (host.running, host.sessions, host.connections) == (0, 0, set())


def widths(connection: Connection) -> list[int]:
    return [session.width for session in connection._sessions.values()]


def running(connection: Connection) -> int:
    """Branches that are wanted; the host counts those being stopped too."""
    return sum(len(session.running) for session in connection._sessions.values())


def new_host(places: int) -> StreamingHost:
    engine = Engine(TOY)
    engine.held = True  # branches run, and give nothing
    return StreamingHost(engine, draft_model(), running_branches=places)


# Shares


@pytest.mark.parametrize(
    ("places", "sessions", "width"), [(64, 0, 64), (64, 1, 64), (64, 3, 21), (64, 64, 1), (64, 200, 1), (1, 1, 1)]
)
def test_a_session_s_share_is_never_none(places: int, sessions: int, width: int) -> None:
    host = StreamingHost(Engine(TOY), draft_model(), running_branches=places)
    host.connections = {type("C", (), {"sessions": sessions})()}  # type: ignore[assignment]
    assert host.width(sessions) == width


def test_connections_share_alike_and_so_do_the_sessions_of_each() -> None:
    async def main() -> None:
        host = new_host(12)
        async with peers(host, 2) as (one, other):
            await one.say(opened(1, **WIDE))
            assert widths(one.connection) == [12]
            await one.say(opened(2, **WIDE))
            assert widths(one.connection) == [6, 6]
            await other.say(opened(1, **WIDE))
            assert widths(one.connection) == [3, 3]
            assert widths(other.connection) == [6]
            await one.say(Close(1))
            assert [widths(peer.connection) for peer in (one, other)] == [[6], [6]]
            await one.end()
            assert widths(other.connection) == [12]

    asyncio.run(main())


def test_a_session_never_gets_more_than_it_asked_for() -> None:
    async def main() -> None:
        async with peers(new_host(12), 1) as [peer]:
            await peer.say(opened(1, **{**WIDE, "running_branches": 2}), opened(2, **WIDE))
            assert widths(peer.connection) == [2, 6]

    asyncio.run(main())


@pytest.mark.parametrize(
    "ending", [Commit(1, 99, (1,)), Commit(1, 3, (999,)), Close(1)], ids=["gap", "vocabulary", "close"]
)
def test_the_share_of_a_session_that_ends_goes_to_the_others(ending: Message) -> None:
    async def main() -> None:
        async with peers(new_host(12), 1) as [peer]:
            await peer.say(opened(1, **WIDE), opened(2, **WIDE))
            assert widths(peer.connection) == [6, 6]
            await peer.say(ending)
            assert widths(peer.connection) == [12]

    asyncio.run(main())


def test_so_does_that_of_one_whose_engine_request_fails() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        peer.engine.fault = RuntimeError("out of memory")  # type: ignore[attr-defined]
        await peer.say(opened(1, **WIDE))
        await peer.until(lambda: Reject(1, "engine") in peer.received)
        peer.engine.fault = None  # type: ignore[attr-defined]
        await peer.say(opened(2, **WIDE))
        assert widths(peer.connection) == [64]

    with_peer(scenario)


def test_branches_run_in_all_places_and_in_no_more() -> None:
    async def main() -> None:
        host = StreamingHost(Engine(TOY), draft_model(), running_branches=8)
        most = {1: 0, 2: 0}
        async with peers(host, 2) as both:
            for count, peer in enumerate(both, 1):
                await peer.say(opened(1, **WIDE))
                for _ in range(200):
                    await asyncio.sleep(0)
                    most[count] = max(most[count], sum(running(p.connection) for p in both))
                await peer.settled()
                assert host.running == sum(p.connection.running for p in both) == host.engine.running
        assert most == {1: 8, 2: 8 // 2}  # the second has its share while the first has drafted all it may

    asyncio.run(main())


def test_more_sessions_than_places_take_turns() -> None:
    async def main() -> None:
        host = StreamingHost(Engine(TOY), draft_model(), running_branches=2)
        async with peers(host, 1) as [peer]:
            await peer.say(*[opened(number, lookahead=200, max_nodes=400) for number in range(1, 9)])
            await peer.until(lambda: all(len(peer.tokens(number)) >= 64 for number in range(1, 9)))
            assert host.engine.running <= 2
            assert host.waiting + host.running <= 8 + 2  # of which two may be ending
            received = [len(peer.tokens(number)) for number in range(3, 9)]  # the first two began while nobody waited
            assert max(received) <= 2 * min(received)
            assert host.stats().waited_seconds > 0.0
            await peer.settled()
            for number in range(1, 9):
                assert peer.tokens(number) == TOY.drafted(PROMPT, 200)

    asyncio.run(main())


def test_branches_that_wait_are_bounded_by_places_and_sessions() -> None:
    async def main() -> None:
        host = new_host(8)
        async with peers(host, 3) as all_peers:
            for number in range(1, 30):
                for peer in all_peers:
                    await peer.say(opened(number, **WIDE))
            sessions = sum(peer.connection.sessions for peer in all_peers)
            assert sessions == 3 * 29
            assert host.engine.running <= 8
            assert host.waiting <= 8 + sessions

    asyncio.run(main())


def test_nothing_is_left_of_thousands_of_sessions() -> None:
    """Of 5,000 sessions that were opened, drafted for and closed, the host keeps none, nor their branches."""

    async def main() -> None:
        host = StreamingHost(Engine(TOY), draft_model(), running_branches=8)
        async with peers(host, 2) as both:
            number, sizes = 0, []
            for _ in range(10):
                for _ in range(10):
                    numbers = range(number + 1, number + 26)
                    number += 25
                    for peer in both:
                        await peer.say(*[opened(n, lookahead=2) for n in numbers])
                    for peer in both:
                        await peer.until(partial(peer.tokens, numbers[-1]))
                        await peer.say(*[Close(n) for n in numbers])
                        peer.received.clear()
                for peer in both:
                    await peer.settled()
                    peer.received.clear()
                sizes.append(sum(map(size_of, (host, *[peer.connection for peer in both]))))
            assert number * len(both) == 5000
            assert host.branches_started >= 2 * 250
            assert sizes[-1] == sizes[0]

    asyncio.run(main())


def size_of(thing: object, seen: set[int] | None = None) -> int:
    """How many items the containers of ours hold that hang on something."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, dict):
        return len(thing) + sum(size_of(one, seen) for pair in thing.items() for one in pair)
    if isinstance(thing, list | tuple | set | deque):
        return len(thing) + sum(size_of(one, seen) for one in thing)
    if not type(thing).__module__.startswith("vllm_wanspec.drafter"):
        return 0
    names = getattr(type(thing), "__slots__", ())
    slots = [getattr(thing, name) for name in names if hasattr(thing, name)]
    return size_of(getattr(thing, "__dict__", {}), seen) + sum(size_of(one, seen) for one in slots)


def test_drafts_of_several_branches_arrive_in_order() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1, **WIDE))
        await peer.settled()
        nodes = [node for message in peer.received if isinstance(message, Nodes) for node in message.nodes]
        assert [node.id for node in nodes] == list(range(1, len(nodes) + 1))
        assert len(nodes) > 50
        line, parent = [], 0
        while children := [node for node in nodes if node.parent == parent]:
            best = max(children, key=lambda node: node.logprob)
            line.append(best.token)
            parent = best.id
        assert line == TOY.drafted(PROMPT, WIDE["lookahead"])

    with_peer(scenario)


# What goes into one frame


def node(number: int) -> NodeRecord:
    return NodeRecord(number, number - 1, 1, -0.5, 1.0)


def nodes(session: int, seen: int, *ids: int) -> Nodes:
    return Nodes(session, seen, tuple(map(node, ids)))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], []),
        ([nodes(1, 3, 1), nodes(1, 3, 2), nodes(1, 3, 3, 4)], [nodes(1, 3, 1, 2, 3, 4)]),
        ([nodes(1, 3, 1), nodes(2, 3, 1), nodes(1, 3, 2)], [nodes(1, 3, 1, 2), nodes(2, 3, 1)]),
        ([nodes(1, 3, 1), nodes(1, 4, 2), nodes(1, 4, 3)], [nodes(1, 3, 1), nodes(1, 4, 2, 3)]),
        ([nodes(1, 3, 1), Pong(1), nodes(1, 3, 2)], [nodes(1, 3, 1, 2), Pong(1)]),
        ([nodes(1, 3, 1), Reject(1, "gap")], [nodes(1, 3, 1), Reject(1, "gap")]),
    ],
)
def test_a_session_s_successive_nodes_become_one_message(messages: list[Message], expected: list[Message]) -> None:
    assert gathered(messages) == expected


def test_no_message_gets_more_nodes_than_the_peer_accepts() -> None:
    half = MAX_NODES_PER_MESSAGE // 2
    parts = [nodes(1, 3, *range(1 + n * half, 1 + (n + 1) * half)) for n in range(3)] + [nodes(1, 3, 10**6)]
    assert [len(message.nodes) for message in gathered(parts)] == [2 * half, half + 1]  # type: ignore[union-attr]


scripts = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 3), st.booleans()), max_size=30)


@given(scripts)
def test_gathering_keeps_every_node_and_each_session_s_order(
    script: list[tuple[int, int, int, bool]],
) -> None:
    sent: list[Message] = []
    last, seen = dict.fromkeys((1, 2, 3), 0), dict.fromkeys((1, 2, 3), 0)
    for session, more, count, other in script:
        seen[session] += more
        sent.append(nodes(session, seen[session], *range(last[session] + 1, last[session] + count + 1)))
        last[session] += count
        if other:
            sent.append(Pong(len(sent)))
    result = gathered(sent)
    assert [m for m in result if isinstance(m, Pong)] == [m for m in sent if isinstance(m, Pong)]
    for session in (1, 2, 3):
        of_session = [m for m in result if isinstance(m, Nodes) and m.session == session]
        assert [n.id for m in of_session for n in m.nodes] == list(range(1, last[session] + 1))
        assert len({m.seen for m in of_session}) == len(of_session)
