"""DrafterLink with drafters that work, draft nothing, die or come back."""

import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from conftest import LogLines
from links import TOY, WELCOME, User, running
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, draft_model, limits, wait_until
from wan_ends import far_away

from vllm_wanspec.config import DraftEndpoint
from vllm_wanspec.controller import link as link_module
from vllm_wanspec.controller.link import DrafterLink, LinkThread
from vllm_wanspec.core.messages import Close, Commit, Message, Nodes, Open, Ping, Pong, Welcome
from vllm_wanspec.core.wire import decode, encode
from vllm_wanspec.emulate.wan_settings import WanSettings
from vllm_wanspec.sim.service import Handler

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(TOY) as server:
        yield server


def test_it_connects_and_messages_go_both_ways(server: DrafterServer, log: LogLines) -> None:
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        assert link.welcome == Welcome(1, "invented", VOCAB_SIZE, FINGERPRINT, 256, 4096, 4096)
        for message in (Open(1, (1, 2), limits(8, 64)), Commit(1, 2, (3,)), Close(1), Open(2, (1, 2), limits(8, 64))):
            link.send(message)
        link.flush()
        wait_until(lambda: sum(len(m.nodes) for m in user.messages if isinstance(m, Nodes) and m.session == 2) == 8)
        assert not link.faults
        assert any(re.match(r"drafter eu: connected, model invented, R = [\d.]+ ms", line) for line in log.lines())
        assert not log.warnings()


def test_the_round_trip_is_measured(server: DrafterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 0.001)
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        first = link.rtt_s
        wait_until(lambda: link.rtt_s not in (first, 0.0))
        assert 0.0 < link.rtt_s < 2.0


def test_what_waits_behind_a_busy_drafter_is_not_the_path_s(server: DrafterServer) -> None:
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        for trip_s in (0.030, 0.032, 0.031, 0.400, 0.390, 0.029, 0.033):
            link._took(trip_s)
        assert 0.028 < link.median_rtt_s < 0.034
        assert link.rtt_s > 0.04


def test_the_round_trip_is_that_of_the_way(
    server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 0.02)
    firsts_ms: list[float] = []
    pong_bytes = len(encode([Pong(2**52)]))

    class Noting(User):
        def link_ready(self, link: DrafterLink) -> None:
            firsts_ms.append(1e3 * link.rtt_s)
            super().link_ready(link)

    user = Noting()
    with far_away(server.port, WanSettings(rtt_ms=200.0)) as port:
        link = DrafterLink(
            DraftEndpoint(name="eu", url=f"http://127.0.0.1:{port}"), FINGERPRINT, user, random.Random(1)
        )
        thread = LinkThread([link])
        thread.start()
        try:
            wait_until(lambda: user.ready)
            greeted_bytes = link.received_bytes
            wait_until(lambda: link.received_bytes >= greeted_bytes + 40 * pong_bytes)  # 0.5 % of the first is left
            wait_until(lambda: 1e3 * link.rtt_s < 300.0)
            assert 1e3 * link.rtt_s >= 199.0
        finally:
            thread.stop()
    assert 199.0 <= firsts_ms[0] < 350.0
    assert f"drafter eu: connected, model invented, R = {firsts_ms[0]:.1f} ms" in log.lines()


def test_nothing_is_sent_before_flush_and_order_is_kept(server: DrafterServer) -> None:
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        for number in range(1, 201):
            link.send(Open(number, (number % VOCAB_SIZE, 2), limits(2, 64)))
        link.flush()
        wait_until(lambda: len({m.session for m in user.messages if isinstance(m, Nodes)}) == 200)


def silent(frames: list[list[Message]], answering: bool) -> Handler:
    """A drafter that welcomes, keeps what it is sent, and drafts nothing; it may say so."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([WELCOME]))
        async for frame in socket:
            frames.append(decode(frame.data))
            for message in frames[-1]:
                if isinstance(message, Ping):
                    await socket.send_bytes(encode([Pong(message.number)]))
                if isinstance(message, Commit) and answering:
                    await socket.send_bytes(encode([Nodes(1, message.position + 1, ())]))
        return socket

    return handler


def commits(frame: list[Message]) -> list[int]:
    return [message.position for message in frame if isinstance(message, Commit)]


@pytest.mark.parametrize("answering", [False, True])
def test_a_drafter_that_drafts_nothing_is_told_of_commits_now_and_then(
    server: DrafterServer, monkeypatch: pytest.MonkeyPatch, answering: bool
) -> None:
    monkeypatch.setattr(link_module, "IDLE_AFTER_S", 0.2)
    monkeypatch.setattr(link_module, "IDLE_FLUSH_INTERVAL_S", 60.0)
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 0.5)
    frames: list[list[Message]] = []
    server.handler = silent(frames, answering)

    def commit_each_step(link: DrafterLink, positions: range) -> None:
        for position in positions:
            link.send(Commit(1, position, (3,)))
            link.flush()
            time.sleep(0.01)

    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        link.send(Open(1, (1, 2), limits(8, 64)))
        link.flush()
        commit_each_step(link, range(2, 7))
        wait_until(lambda: sum(map(len, map(commits, frames))) == 5)
        assert sum(bool(commits(frame)) for frame in frames) >= 3  # a new session is told at once
        idle_s = link_module.IDLE_AFTER_S + 2.0 * link.rtt_s
        time.sleep(idle_s)
        known = len(frames)
        commit_each_step(link, range(7, 47))
        wait_until(lambda: sum(map(len, map(commits, frames))) == 45)  # none stays behind for ever
        assert sum(bool(commits(frame)) for frame in frames[known:]) <= 4  # by pings alone
        assert [position for frame in frames for position in commits(frame)] == [*range(2, 47)]
        wait_until(lambda: len(user.messages) == (45 if answering else 0))


def test_a_drafter_that_drafts_again_is_told_at_once(server: DrafterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "IDLE_AFTER_S", -60.0)  # idle until it answers
    monkeypatch.setattr(link_module, "IDLE_FLUSH_INTERVAL_S", 60.0)
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 60.0)
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        for number in (1, 2):  # opening is never put off
            link.send(Open(number, (1, 2), limits(2, 64)))
            link.flush()
        wait_until(lambda: len({m.session for m in user.messages if isinstance(m, Nodes)}) == 2)
        known = len(user.messages)
        link.send(Commit(1, 2, tuple(TOY.drafted((1, 2), 2))))
        link.flush()
        wait_until(lambda: len(user.messages) > known)


def test_pongs_keep_a_quiet_connection_alive(
    server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "SILENCE_LIMIT_S", 1.0)
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 0.02)
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        end = time.monotonic() + 1.3
        wait_until(lambda: time.monotonic() > end)
        assert user.lost == 0
        assert link.welcome is not None


def ponging(answers: Callable[[int, list[int]], list[int]]) -> Handler:
    """A drafter that welcomes, and answers each ping by what ``answers`` says of it and all before."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([WELCOME]))
        asked: list[int] = []
        async for frame in socket:
            for message in decode(frame.data):
                if isinstance(message, Ping):
                    asked.append(message.number)
                    await socket.send_bytes(encode([Pong(number) for number in answers(message.number, asked)]))
        return socket

    return handler


@pytest.mark.parametrize(
    "answers",
    [
        lambda number, asked: [number, number],
        lambda number, asked: [asked[0]],
        lambda number, asked: [number + 1],
        lambda number, asked: [0],
    ],
    ids=["twice", "an old one again", "the next", "none"],
)
def test_a_pong_answers_one_ping_of_ours(
    server: DrafterServer, log: LogLines, answers: Callable[[int, list[int]], list[int]]
) -> None:
    server.handler = ponging(answers)
    with running(server.url) as (link, user):
        wait_until(lambda: user.lost)
        assert link.faults == 1
    assert "a pong answers no ping" in log.warnings()[0]


def test_pings_that_are_unanswered_are_told(server: DrafterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 0.01)
    monkeypatch.setattr(link_module, "MAX_PINGS_UNANSWERED", 5)
    asked: list[int] = []

    def late(number: int, all_asked: list[int]) -> list[int]:
        asked.append(number)
        return []

    server.handler = ponging(late)
    with running(server.url) as (_, user):
        wait_until(lambda: user.unanswered and user.unanswered[-1] == 5)
        known = len(user.unanswered)
        wait_until(lambda: len(user.unanswered) > known + 3)
        assert user.unanswered[-1] == 5  # no more are sent while so many are out
        assert len(asked) == 5
        assert user.lost == 0


def test_pings_that_are_answered_are_told(server: DrafterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 0.1)
    with running(server.url) as (_, user):
        wait_until(lambda: len(user.unanswered) >= 3)
        assert min(user.unanswered) == 0


def test_a_name_is_resolved_again_at_each_attempt(server: DrafterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that has moved is found at its new address with the next attempt."""
    lookups: list[str] = []
    resolve = socket.getaddrinfo

    def moved(host: str | bytes | None, *args: Any, **more: Any) -> Any:
        if host not in ("drafter.test", b"drafter.test"):
            return resolve(host, *args, **more)
        lookups.append("drafter.test")
        return resolve("127.0.0.1" if len(lookups) > 3 else "127.0.0.2", *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", moved)
    monkeypatch.setattr(aiohttp.connector, "DefaultResolver", aiohttp.ThreadedResolver)
    with running(f"http://drafter.test:{server.port}") as (_, user):
        wait_until(lambda: user.ready, timeout_s=5.0)
    assert len(lookups) == 4


def test_killed_and_back(server: DrafterServer, log: LogLines) -> None:
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready == 1)
        server.stop()
        wait_until(lambda: user.lost == 1)
        assert link.welcome is None
        link.send(Commit(77, 1, (1,)))  # would be a fault on the next connection
        server.start()
        wait_until(lambda: user.ready == 2)
        link.send(Open(1, (1, 2), limits(4, 64)))
        link.flush()
        wait_until(lambda: user.messages)
    # What is said first depends on how the connection ended; then it is unreachable, and nothing is repeated.
    warnings = log.warnings()
    assert 1 <= len(warnings) <= 3
    assert len(set(warnings)) == len(warnings)


def test_a_user_that_finds_a_fault_drops_the_connection(server: DrafterServer, log: LogLines) -> None:
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        user.complaint = "node 3 has token 99"
        link.send(Open(1, (1, 2), limits(4, 64)))
        link.flush()
        wait_until(lambda: user.lost)
        assert link.faults == 1
        user.complaint = ""
        wait_until(lambda: user.ready == 2)
    assert "broke the protocol (node 3 has token 99); connection dropped" in log.warnings()[0]


def test_one_bad_link_does_not_hurt_another(server: DrafterServer) -> None:
    good, bad = User(), User()
    rng = random.Random(1)
    links = [
        DrafterLink(DraftEndpoint(name="bad", url="http://127.0.0.1:9"), FINGERPRINT, bad, rng),
        DrafterLink(DraftEndpoint(name="good", url=server.url), FINGERPRINT, good, rng),
    ]
    thread = LinkThread(links)
    thread.start()
    try:
        wait_until(lambda: good.ready)
    finally:
        thread.stop()


def test_a_fault_of_ours_costs_the_connection_and_no_more(server: DrafterServer, log: LogLines) -> None:
    class Faulty(User):
        def link_received(self, link: DrafterLink, messages: list[Message]) -> None:
            if self.lost == 0:
                raise KeyError("a bug")
            super().link_received(link, messages)

    user = Faulty()
    link = DrafterLink(DraftEndpoint(name="eu", url=server.url), FINGERPRINT, user, random.Random(1))
    thread = LinkThread([link])
    thread.start()
    try:
        wait_until(lambda: user.ready == 2)
        link.send(Open(1, (1, 2), limits(8, 64)))
        link.flush()
        wait_until(lambda: user.messages)
    finally:
        thread.stop()
    assert user.lost == 1
    assert any("connection lost by a fault of ours" in line for line in log.lines())


def test_stopping_a_thread_that_never_started_or_twice() -> None:
    link = DrafterLink(DraftEndpoint(name="a", url="http://127.0.0.1:9"), FINGERPRINT, User(), random.Random(1))
    thread = LinkThread([link])
    thread.stop()
    thread.start()
    thread.stop()
    thread.stop()


def test_what_a_drafter_says_of_itself_reaches_the_user(log: LogLines) -> None:
    with DrafterServer(TOY, model=draft_model(name="other", max_sessions=3)) as server:
        with running(server.url) as (link, user):
            wait_until(lambda: user.ready)
            assert link.welcome is not None
            assert (link.welcome.model, link.welcome.max_sessions) == ("other", 3)
