"""DraftPool with real drafters on sockets: drafts, failover, and what an overload or a bad peer costs."""

import statistics
import threading
import time

import pytest
from aiohttp import web
from pool_world import World
from pools import LIMIT, PROMPT, TOY, Target, peek, pool_of, served, up
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, draft_model, wait_until

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.link import DrafterLink
from vllm_wanspec.core.messages import Close, Nodes, Open, Reject, Welcome
from vllm_wanspec.core.policy.expansion import LOOKAHEAD_SLACK
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.wire import encode
from vllm_wanspec.errors import RemoteProtocolError

pytestmark = pytest.mark.usefixtures("short_waits")


def test_drafts_arrive_and_are_right() -> None:
    with served() as (pool, server):
        target = Target(pool, {"a": PROMPT, "b": [1, 2], "c": [5]})
        target.run_until_accepted(100)
        counters = pool.counters
        assert counters.opened_sessions == 3
        assert counters.hits > 0
        assert counters.misses > 0
        assert counters.offered_tokens >= target.accepted
        assert counters.steps >= counters.hits + counters.misses + counters.blind_steps - 3
        assert not any(link.faults for link in pool.links)
        wait_until(lambda: server.sessions == 3)


def test_sessions_open_when_the_request_arrives_and_close_when_it_ends() -> None:
    with served() as (pool, server):
        pool.begin([], [("a", PROMPT)])
        wait_until(lambda: len(peek(pool, "a")) == LIMIT)
        assert peek(pool, "a") == TOY.drafted(PROMPT, LIMIT)
        assert pool.length("a") == len(PROMPT)
        pool.begin(["a"], [])
        assert pool.length("a") is None
        wait_until(lambda: server.sessions == 0 and server.engine.running == 0)
        pool.step([("a", [1])])
        assert pool.draft(["a"], LIMIT) == [[]]


def test_an_id_can_return() -> None:
    with served() as (pool, server):
        pool.begin([], [("a", PROMPT)])
        wait_until(lambda: len(peek(pool, "a")) == LIMIT)
        pool.begin(["a"], [("a", [1, 2])])
        wait_until(lambda: len(peek(pool, "a")) == LIMIT)
        assert peek(pool, "a") == TOY.drafted([1, 2], LIMIT)
        pool.begin([], [("a", [3, 4])])  # not even announced as finished
        wait_until(lambda: len(peek(pool, "a")) == LIMIT)
        assert peek(pool, "a") == TOY.drafted([3, 4], LIMIT)
        wait_until(lambda: server.sessions == 1)
        assert pool.counters.opened_sessions == 3


def test_finished_requests_that_were_never_seen() -> None:
    with served() as (pool, _):
        pool.begin(["ghost"], [])
        assert pool.counters.opened_sessions == 0


def test_rows_without_tokens_or_without_a_session_get_nothing() -> None:
    with served() as (pool, _):
        pool.begin([], [("a", PROMPT)])
        wait_until(lambda: len(peek(pool, "a")) == LIMIT)
        pool.step([("a", []), ("ghost", [1])])
        assert pool.draft([None, "ghost"], LIMIT) == [[], []]


def test_drafts_are_counted_and_no_longer_than_asked_for() -> None:
    with served() as (pool, _):
        pool.begin([], [("a", PROMPT)])
        wait_until(lambda: len(peek(pool, "a")) == LIMIT)
        assert pool.draft(["a", None], 2) == [TOY.drafted(PROMPT, 2), []]
        assert pool.counters.offered_tokens == 2


def test_length_max_bounds_the_lookahead() -> None:
    with served(tree={"lookahead_tokens": 3}) as (pool, _):
        pool.begin([], [("a", PROMPT)])
        wait_until(lambda: len(peek(pool, "a", 50)) == 3)


@pytest.mark.parametrize(("rtt_s", "steps"), [(0.02, 1), (0.059, 2), (0.061, 3), (0.118, 4)])
def test_how_far_ahead_is_drafted_goes_by_the_link_s_round_trip(rtt_s: float, steps: int) -> None:
    """Steps of 30 ms yield at most 4 + 1 tokens each; the one after the round trip wants four drafts more."""
    world = World(names="a")
    world.step({"a": [3]}, step_s=0.03)
    world.link._rtt_s.add(rtt_s)
    world.pool.begin([], [("new", PROMPT)])
    opened = [message for message in world.link._outbox.take() if isinstance(message, Open)]
    assert opened[-1].limits.lookahead == steps * 5 + 4 + LOOKAHEAD_SLACK


def test_a_request_s_own_settings_reach_the_drafter() -> None:
    with served(tree={"max_branches": 3, "entropy_threshold_nats": "adaptive"}) as (pool, server):
        own = TreeSettings(lookahead_tokens=5, max_branches=1, entropy_threshold_nats=0.25, max_nodes=64)
        pool.begin([], [("own", PROMPT), ("usual", PROMPT)], [own, None])
        wait_until(lambda: server.sessions == 2)
        [connection] = server.host.connections
        first, second = (session.limits for _, session in sorted(connection._sessions.items()))
        assert (first.lookahead, first.max_branches, first.max_nodes) == (5, 1, 64)
        assert first.entropy_threshold_nats == 0.25
        assert (second.max_branches, second.entropy_threshold_nats) == (3, None)
        assert pool.tree("own") is own
        assert pool.tree("ghost") is None


def test_each_connection_has_a_name_of_its_own_and_is_measured_anew() -> None:
    with served() as (pool, server):
        [link] = pool.links
        target = Target(pool, {"a": PROMPT})
        for accepted in range(10, 400, 10):  # until a commit has left the tree and been answered
            target.run_until_accepted(accepted)
            if link.turnaround.answer_s.get(-1.0) >= 0.0:
                break
        first, turnaround = link.client, link.turnaround
        sent, received = link.sent_bytes, link.received_bytes
        assert sent > 0
        assert received > 0
        assert turnaround.answer_s.get(-1.0) >= 0.0
        [connection] = server.host.connections
        assert connection._client == first  # by which the drafter's event log names the session
        server.stop()
        wait_until(lambda: up(pool) == 0)
        server.start()
        wait_until(lambda: up(pool) == 1)
        target.run_until_accepted(5)
        assert link.client != first
        assert link.turnaround is not turnaround
        assert link.sent_bytes > sent
        assert link.received_bytes > received


def test_without_a_drafter_everything_goes_on() -> None:
    with pool_of("http://127.0.0.1:9") as pool:
        target = Target(pool, {"a": PROMPT})
        for _ in range(50):
            target.step()
        target.check()
        assert target.accepted == 0
        assert pool.counters.steps == 49


def test_requests_that_came_before_the_drafter_are_served_once_it_is_there() -> None:
    with DrafterServer(TOY) as server:
        server.stop()
        with pool_of(server.url) as pool:
            target = Target(pool, {"a": PROMPT, "b": [1]})
            for _ in range(5):
                target.step()
            assert target.accepted == 0
            server.start()
            wait_until(lambda: up(pool))
            target.run_until_accepted(30)
        assert pool.counters.opened_sessions == 2


def test_a_killed_drafter_and_its_return() -> None:
    with served() as (pool, server):
        target = Target(pool, {"a": PROMPT, "b": [3, 3]})
        for round_number in range(3):
            target.run_until_accepted(30)
            server.stop()
            wait_until(lambda: up(pool) == 0)
            for _ in range(5):
                target.step()
            server.start()
            wait_until(lambda: up(pool) == 1)
            assert pool.counters.opened_sessions == 2 * (round_number + 2)
        target.run_until_accepted(30)


def test_failover_between_two_drafters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DrafterLink, "rtt_s", property(lambda link: 0.01))
    with DrafterServer(TOY) as first, DrafterServer(TOY) as second:
        with pool_of(first.url, second.url) as pool:
            wait_until(lambda: up(pool) == 2)
            target = Target(pool, {name: [index, 1] for index, name in enumerate("abcdefgh")})
            target.run_until_accepted(50)
            wait_until(lambda: first.sessions == second.sessions == 4)  # at equal distance the load decides
            first.stop()
            wait_until(lambda: second.sessions == 8)
            target.run_until_accepted(50)
            first.start()
            wait_until(lambda: up(pool) == 2)
            second.stop()
            wait_until(lambda: first.sessions == 8)
            target.run_until_accepted(50)


def test_rejected_sessions_come_back_later() -> None:
    with DrafterServer(TOY, model=draft_model(max_sessions=2)) as server, pool_of(server.url) as pool:
        wait_until(lambda: up(pool))
        target = Target(pool, {"a": [1], "b": [2], "c": [3]})
        target.run_until_accepted(20)
        assert pool.counters.opened_sessions == 2  # its limit is known, so that no third is tried
        server.engine.fault = RuntimeError("gone")
        wait_until(lambda: target.step() or pool.counters.rejected_sessions >= 2)
        server.engine.fault = None
        target.run_until_accepted(20)
        assert pool.counters.opened_sessions >= 3


def test_contexts_that_are_too_long_go_to_a_drafter_that_takes_them() -> None:
    with DrafterServer(TOY, model=draft_model(max_context=8)) as small, DrafterServer(TOY) as large:
        with pool_of(small.url, large.url) as pool:
            wait_until(lambda: up(pool) == 2)
            pool.begin([], [(str(number), [number] * 20) for number in range(4)])
            wait_until(lambda: large.sessions == 4)
            assert small.sessions == 0
        with pool_of(small.url) as pool:
            wait_until(lambda: up(pool) == 1)
            pool.begin([], [("a", [1] * 20), ("b", [1] * 4)])
            wait_until(lambda: len(peek(pool, "b")) == LIMIT)
            assert peek(pool, "a") == []


def test_a_smaller_vocabulary_of_the_drafter_bounds_its_tokens() -> None:
    with served() as (pool, _):
        pool.begin([], [("a", PROMPT)])
        link = pool.links[0]
        number = pool._sessions["a"].number
        last = pool._sessions["a"].core.tree
        assert last is not None
        bad = Nodes(number, 3, (NodeRecord(last.last_id + 1, last.cursor_id, VOCAB_SIZE, -0.1, 1.0),))
        with pytest.raises(RemoteProtocolError, match="outside"):
            pool.link_received(link, [bad])


@pytest.mark.parametrize(
    "message",
    [Nodes(10**6, 0, ()), Reject(10**6, "engine"), Close(1), Welcome(1, "m", 1, "f", 1, 1, 1)],
    ids=lambda message: type(message).__name__,
)
def test_messages_that_no_correct_drafter_sends(message: object) -> None:
    with served() as (pool, _):
        pool.begin([], [("a", PROMPT)])
        with pytest.raises(RemoteProtocolError, match="unexpected"):
            pool.link_received(pool.links[0], [message])  # type: ignore[list-item]


def test_messages_for_sessions_that_were_closed_are_ignored() -> None:
    with served() as (pool, _):
        pool.begin([], [("a", PROMPT), ("b", PROMPT)])
        number = pool._sessions["a"].number
        pool.begin(["a"], [])
        pool.link_received(pool.links[0], [Nodes(number, 0, ()), Reject(number, "unknown")])
        assert pool.counters.rejected_sessions == 0


def test_a_hostile_drafter_is_dropped_and_another_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DrafterLink, "rtt_s", property(lambda link: {"d0": 0.001, "d1": 1.0}[link.name]))

    async def hostile(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([Welcome(1, "bad", VOCAB_SIZE, FINGERPRINT, 99, 4096, 4096)]))
        async for _ in socket:
            lies = tuple(NodeRecord(n, 0, n, -0.1, 1.0) for n in range(1, VOCAB_SIZE + 10))
            await socket.send_bytes(encode([Nodes(n, 0, lies) for n in range(1, 9)]))
        return socket

    with DrafterServer(TOY) as bad, DrafterServer(TOY) as good:
        bad.handler = hostile
        with pool_of(bad.url, good.url) as pool:
            wait_until(lambda: up(pool) == 2)
            target = Target(pool, {"a": PROMPT})
            assert pool._sessions["a"].link is pool.links[0] or pool.links[0].faults
            wait_until(lambda: pool.links[0].faults)
            target.run_until_accepted(30)


def test_sixty_four_sessions_are_handled_in_little_time() -> None:
    with served(late={"policy": "none"}) as (pool, _):
        target = Target(pool, {f"r{index}": [index % VOCAB_SIZE, 1, 2] for index in range(64)})
        times_ms: list[float] = []
        pause, end = threading.Event(), time.monotonic() + 20.0
        while len(times_ms) < 40 or (target.accepted <= 100 and time.monotonic() < end):
            drafts = target.drafts
            rows = []
            for name, context in target.contexts.items():
                tokens = TOY.verify(context, drafts[name])
                target.accepted += len(tokens) - 1
                context += tokens
                rows.append((name, tokens))
            began_s = time.perf_counter()
            pool.step(rows)
            lists = pool.draft([name for name, _ in rows], LIMIT)
            times_ms.append((time.perf_counter() - began_s) * 1000)
            target.drafts = dict(zip(target.contexts, lists, strict=True))
            pause.wait(0.01)
        target.check()
        assert target.accepted > 100
        assert statistics.median(times_ms) < 50.0  # sanity on a busy machine, not a benchmark
