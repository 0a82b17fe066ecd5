"""DrafterLink with drafters that are not there, refuse, break the protocol or fall silent."""

import asyncio
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from aiohttp import web
from conftest import LogLines
from links import TOY, WELCOME, answering, only_warning, running
from toys import VOCAB_SIZE, DrafterServer, wait_until

from vllm_wanspec.controller import link as link_module
from vllm_wanspec.core.messages import Close, Commit, Pong, Refuse, Welcome
from vllm_wanspec.core.wire import encode

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(TOY) as server:
        yield server


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
    ["http://a..b:1", f"http://{'x' * 70}:1", "http://127.0.0.1:1/ä", "http://xn--:1", "http://1.2.3.4.5:1"],
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


def test_a_token_of_a_file_is_read_again(server: DrafterServer, log: LogLines, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\n", "utf-8")
    server.token = "new"
    with running(server.url, token_file=str(file)) as (_, user):
        wait_until(lambda: server.attempts >= 3)
        assert user.ready == 0
        only_warning(log, f"(HTTP 401); write one of the drafter's tokens into {file} here")
        file.write_text("# of May\nnew\n", "utf-8")
        wait_until(lambda: user.ready)


@pytest.mark.parametrize(
    ("status", "fragments"),
    [
        (404, ["has no /wanspec/v1 (HTTP 404)", "start it by `wanspec drafter MODEL`"]),
        (403, ["does not accept our token (HTTP 403)"]),
        (429, ["lets nobody in from here (HTTP 429)", "too many wrong tokens", "set WANSPEC_TOKEN here"]),
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


@pytest.mark.parametrize(
    ("frames", "fragment"),
    [
        ((b"\xc1",), "first message is not hello, welcome or refuse"),
        (("hello",), "sent a WebSocket frame of type TEXT"),
        ((encode([]),), "first message is not hello, welcome or refuse"),
        ((encode([WELCOME, WELCOME]),), "first message is not hello, welcome or refuse"),
        ((encode([Close(1)]),), "not of protocol version 1"),
        ((encode([Pong(1)]),), "neither welcome nor refuse"),
        ((encode([Welcome(1, "invented", VOCAB_SIZE, "other", 8, 64, 64)]),), "another vocabulary"),
        ((encode([WELCOME]), b"\xc1"), "not of protocol version 1"),
        ((encode([WELCOME]), encode([Commit(1, 1, (2,))])), "not of protocol version 1"),
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


@pytest.mark.parametrize("newer", [[2, 2], [2, 2, "m", {"much": "more"}, 7]])
def test_a_newer_version_is_named_whatever_it_says(server: DrafterServer, log: LogLines, newer: list[object]) -> None:
    server.handler = answering(msgpack.packb([newer]))
    with running(server.url) as (link, _):
        wait_until(lambda: server.attempts >= 2)
        assert not link.faults
    only_warning(log, "speaks version 2 of the protocol, this target 1", "match the versions")


def test_an_oversized_frame(server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_DRAFTERS_BYTES", 1000)
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
