"""DrafterLink against real servers: good, gone, wrong, silent and hostile ones."""

import asyncio
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from aiohttp import WSMsgType, web
from conftest import LogLines
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, Handler, Toy, draft_model, limits, wait_until

from vllm_wanspec.config import DraftEndpoint
from vllm_wanspec.controller import link as link_module
from vllm_wanspec.controller.link import DrafterLink, LinkThread
from vllm_wanspec.core.messages import (
    Close,
    Commit,
    Message,
    Nodes,
    Open,
    Ping,
    Pong,
    Refuse,
    Welcome,
    decode,
    encode,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.errors import RemoteProtocolError

pytestmark = pytest.mark.usefixtures("short_waits")
TOY = Toy(seed=2)


class User:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.ready = self.lost = 0
        self.messages: list[Message] = []
        self.complaint = ""

    def link_ready(self, link: DrafterLink) -> None:
        self.ready += 1

    def link_lost(self, link: DrafterLink) -> None:
        assert link.welcome is None
        self.lost += 1

    def link_received(self, link: DrafterLink, messages: list[Message]) -> None:
        if self.complaint:
            raise RemoteProtocolError(self.complaint)
        self.messages += messages


@contextmanager
def running(url: str, *, fingerprint: str = FINGERPRINT, token_env: str | None = None) -> Iterator[tuple]:
    user = User()
    link = DrafterLink(DraftEndpoint(name="eu", url=url, token_env=token_env), fingerprint, user, random.Random(1))
    thread = LinkThread([link])
    thread.start()
    try:
        yield link, user
    finally:
        thread.stop()
        assert not thread._thread.is_alive()


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(TOY) as server:
        yield server


def only_warning(log: LogLines, *fragments: str) -> str:
    """The one line that is said, however often it is tried."""
    [line] = log.warnings()
    assert line.startswith("drafter eu (http://127.0.0.1:")
    for fragment in fragments:
        assert fragment in line
    return line


def test_it_connects_and_messages_go_both_ways(server: DrafterServer, log: LogLines) -> None:
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        assert link.welcome == Welcome(1, "toy", VOCAB_SIZE, FINGERPRINT, 256, 4096, 4096)
        for message in (Open(1, (1, 2), limits(8, 64)), Commit(1, 2, (3,)), Close(1), Open(2, (1, 2), limits(8, 64))):
            link.send(message)
        link.flush()
        wait_until(lambda: sum(len(m.nodes) for m in user.messages if isinstance(m, Nodes) and m.session == 2) == 8)
        assert not link.faults
        assert any(re.match(r"drafter eu: connected, model toy, R = [\d.]+ ms", line) for line in log.lines())
        assert not log.warnings()


def test_the_round_trip_is_measured(server: DrafterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 0.001)
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        first = link.rtt_s
        wait_until(lambda: link.rtt_s not in (first, 0.0))
        assert 0.0 < link.rtt_s < 2.0


def test_nothing_is_sent_before_flush_and_order_is_kept(server: DrafterServer) -> None:
    with running(server.url) as (link, user):
        wait_until(lambda: user.ready)
        for number in range(1, 201):
            link.send(Open(number, (number % VOCAB_SIZE, 2), limits(2, 64)))
        link.flush()
        wait_until(lambda: len({m.session for m in user.messages if isinstance(m, Nodes)}) == 200)


def silent(frames: list[list[Message]], echoing: bool) -> Handler:
    """A drafter that welcomes, keeps what it is sent, and drafts nothing; it may repeat what was committed."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([WELCOME]))
        async for frame in socket:
            frames.append(decode(frame.data))
            for message in frames[-1]:
                if isinstance(message, Ping):
                    await socket.send_bytes(encode([Pong(message.sent_us)]))
                if isinstance(message, Commit) and echoing:
                    known, (token,) = message.position - 2, message.tokens
                    await socket.send_bytes(
                        encode([Nodes(1, message.position + 1, (NodeRecord(known + 1, known, token, 0.0, 0.0),))])
                    )
        return socket

    return handler


def commits(frame: list[Message]) -> list[int]:
    return [message.position for message in frame if isinstance(message, Commit)]


@pytest.mark.parametrize("echoing", [False, True])
def test_a_drafter_that_drafts_nothing_is_told_of_commits_now_and_then(
    server: DrafterServer, monkeypatch: pytest.MonkeyPatch, echoing: bool
) -> None:
    monkeypatch.setattr(link_module, "IDLE_AFTER_S", 0.2)
    monkeypatch.setattr(link_module, "IDLE_FLUSH_INTERVAL_S", 60.0)
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 0.5)
    frames: list[list[Message]] = []
    server.handler = silent(frames, echoing)

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
        wait_until(lambda: len(user.messages) == (45 if echoing else 0))


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


def test_nobody_there(log: LogLines) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        with running(f"http://127.0.0.1:{taken.getsockname()[1]}") as (link, user):
            wait_until(log.warnings)
            wait_until(lambda: link._rng.getstate() != random.Random(1).getstate())
            assert link.welcome is None
            assert user.ready == user.lost == 0
        only_warning(log, "unreachable", "start `wanspec drafter` there or mend the url")


@pytest.mark.parametrize(
    "url",
    ["http://a..b:1", f"http://{'x' * 70}:1", "http://127.0.0.1:1/ä?x=1#y", "http://xn--:1", "http://1.2.3.4.5:1"],
)
def test_odd_addresses_do_not_end_the_thread(log: LogLines, url: str) -> None:
    with running(url) as (link, _):
        wait_until(log.warnings)
        state = link._rng.getstate()
        wait_until(lambda: link._rng.getstate() != state)  # still trying
    assert all(line.startswith("drafter eu (") for line in log.warnings())
    assert not [r for r in log.records if r.exc_info]


def test_a_token_that_no_header_can_carry(
    server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EU_TOKEN", "sec\nret")
    with running(server.url, token_env="EU_TOKEN") as (_, user):
        wait_until(log.warnings)
        monkeypatch.setenv("EU_TOKEN", "secret")
        wait_until(lambda: user.ready)
    assert "ret" not in log.warnings()[0].replace("retr", "")


def test_without_the_token(server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANSPEC_TOKEN", raising=False)
    server.token = "secret"
    with running(server.url) as (link, user):
        wait_until(lambda: server.attempts >= 3)
        assert link.welcome is None
        only_warning(log, "does not accept our token (HTTP 401)", "set WANSPEC_TOKEN here to the drafter's")
        server.token = None
        wait_until(lambda: user.ready)


def test_with_the_token(server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "secret"
    monkeypatch.setenv("EU_TOKEN", "wrong")
    with running(server.url, token_env="EU_TOKEN") as (_, user):
        wait_until(lambda: server.attempts >= 2)
        assert "secret" not in only_warning(log, "set EU_TOKEN here")
        assert "wrong" not in log.warnings()[0]
        monkeypatch.setenv("EU_TOKEN", "secret")
        wait_until(lambda: user.ready)


@pytest.mark.parametrize(
    ("status", "fragments"),
    [
        (404, ["has no /wanspec/v1 (HTTP 404)", "start it by `wanspec drafter MODEL`"]),
        (403, ["does not accept our token (HTTP 403)"]),
        (503, ["answers HTTP 503 instead of opening the WebSocket"]),
        (200, ["answers HTTP 200 instead of opening the WebSocket"]),
    ],
)
def test_other_servers(server: DrafterServer, log: LogLines, status: int, fragments: list[str]) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status)

    server.handler = handler
    with running(server.url) as (_, user):
        wait_until(lambda: server.attempts >= 3)
        only_warning(log, *fragments)
        server.handler = None
        wait_until(lambda: user.ready)


def test_another_vocabulary(server: DrafterServer, log: LogLines) -> None:
    with running(server.url, fingerprint="other") as (link, user):
        wait_until(lambda: server.attempts >= 3)
        assert not user.ready
        assert not link.faults
        only_warning(log, "refuses us (vocabulary: ", "serve a draft model with the target's tokenizer")


def answering(*frames: bytes | str, then_silent: bool = True) -> Callable:
    """A server that opens the WebSocket, sends these frames after the first it gets, and then says nothing."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        await socket.receive()
        for frame in frames:
            await (socket.send_bytes(frame) if isinstance(frame, bytes) else socket.send_str(frame))
        while then_silent and (await socket.receive()).type is WSMsgType.BINARY:
            pass
        return socket

    return handler


WELCOME = Welcome(1, "toy", VOCAB_SIZE, FINGERPRINT, 8, 64, 64)


@pytest.mark.parametrize(
    ("frames", "fragment"),
    [
        ((b"\xc1",), "frame is not msgpack"),
        (("hello",), "sent a WebSocket frame of type TEXT"),
        ((encode([]),), "neither welcome nor refuse"),
        ((encode([WELCOME, WELCOME]),), "neither welcome nor refuse"),
        ((encode([Close(1)]),), "neither welcome nor refuse"),
        ((encode([Welcome(2, "toy", VOCAB_SIZE, FINGERPRINT, 8, 64, 64)]),), "neither welcome nor refuse"),
        ((encode([Welcome(1, "toy", VOCAB_SIZE, "other", 8, 64, 64)]),), "another vocabulary"),
        ((encode([WELCOME]), b"\xc1"), "frame is not msgpack"),
        ((encode([WELCOME]), "hello"), "sent a WebSocket frame of type TEXT"),
    ],
)
def test_hostile_servers(server: DrafterServer, log: LogLines, frames: tuple[bytes | str, ...], fragment: str) -> None:
    server.handler = answering(*frames)
    with running(server.url) as (link, user):
        wait_until(lambda: link.faults >= 2)
        wait_until(lambda: user.lost == user.ready)
        server.handler = None
        wait_until(lambda: link.welcome is not None and link.welcome.max_sessions == 256)
    assert any("broke the protocol" in line and fragment in line for line in log.warnings())
    # Said once, unless it was welcomed in between.
    assert len(log.warnings()) <= 1 + (user.ready - 1)


def test_an_old_version_is_told_so(server: DrafterServer, log: LogLines) -> None:
    server.handler = answering(encode([Refuse("version", "this drafter speaks version 7, not 1")]))
    with running(server.url):
        wait_until(lambda: server.attempts >= 2)
    only_warning(log, "refuses us (version: this drafter speaks version 7, not 1)", "match the versions")


def test_an_oversized_frame(server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_FRAME_BYTES", 1000)
    server.handler = answering(encode([WELCOME]), bytes(2000))
    with running(server.url) as (_, user):
        wait_until(lambda: user.lost)
        wait_until(log.warnings)


def test_one_that_does_not_answer_at_all(log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "GREETING_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with running(f"http://127.0.0.1:{mute.getsockname()[1]}"):
            wait_until(log.warnings)
    only_warning(log, "does not answer within", "is its address right?")


def test_one_that_does_not_greet(server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "GREETING_TIMEOUT_S", 1.0)
    server.handler = answering()
    with running(server.url):
        wait_until(lambda: server.attempts >= 2)
    only_warning(log, "does not greet within")


@pytest.mark.parametrize(("last_words", "said"), [((), "silent for"), ((b"\xc1",), "broke the protocol")])
def test_one_that_no_longer_reads_is_dropped_at_once(
    server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch, last_words: tuple[bytes, ...], said: str
) -> None:
    monkeypatch.setattr(link_module, "SILENCE_LIMIT_S", 0.2)
    released = asyncio.Event()

    async def dead(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        transport = request.transport
        assert transport is not None
        transport.pause_reading()  # type: ignore[attr-defined]
        for frame in (encode([WELCOME]), *last_words):
            await socket.send_bytes(frame)
        await released.wait()
        transport.abort()
        return socket

    server.handler = dead
    with running(server.url) as (_, user):
        wait_until(lambda: user.ready)
        began_s = time.monotonic()
        wait_until(lambda: user.lost, timeout_s=20.0)
        # Not after the time-out of a closing handshake that nobody answers.
        assert time.monotonic() - began_s < 3.0
        assert server._loop is not None
        server._loop.call_soon_threadsafe(released.set)
    assert said in log.warnings()[0]


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
