"""Section 5, as the target sees it: which drafter gets a request's session, and what moves it to another one."""

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from aiohttp import web
from pools import pool_of, up
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, draft_model, toy, wait_until
from two_drafters import TwoDrafters

from vllm_wanspec.controller import link as link_module
from vllm_wanspec.core.messages import Message, Open, Ping, Pong, Reject, Welcome
from vllm_wanspec.core.wire import decode, encode
from vllm_wanspec.emulate.wan import WanProxy, WanSettings

WELCOME = Welcome(1, "toy", VOCAB_SIZE, FINGERPRINT, 256, 4096, 4096)


@pytest.mark.parametrize("code", ["engine", "overloaded"])
def test_requests_that_one_drafter_rejects_are_drafted_for_by_another(code: str) -> None:
    def rejecting(message: Message) -> list[Message]:
        return [Reject(message.session, code)] if isinstance(message, Open) else []

    shares = TwoDrafters(rejecting).shares(after_s=30.0)
    assert min(shares.values()) > 0.9, shares


@pytest.mark.parametrize("code", ["vocabulary", "too_long"])
def test_a_reject_bars_the_drafter_and_not_the_request(code: str) -> None:
    def rejecting(message: Message) -> list[Message]:
        return [Reject(message.session, code)] if isinstance(message, Open) else []

    shares = TwoDrafters(rejecting).shares(after_s=30.0)
    assert min(shares.values()) > 0.9, shares


def test_requests_of_a_drafter_that_drafts_nothing_move_to_one_that_does() -> None:
    shares = TwoDrafters(lambda message: []).shares(after_s=30.0)
    assert min(shares.values()) > 0.9, shares


def test_a_drafter_that_drafts_nothing_gets_few_new_requests() -> None:
    two = TwoDrafters(lambda message: [])
    two.shares(after_s=30.0)
    opened_before = two.pool.links[0].next_number
    for index in range(40):
        two.pool.begin([f"new{index - 1}"], [(f"new{index}", [0, 1, 2])])
    assert two.pool.links[0].next_number - opened_before <= 10  # probes, no more


def test_pongs_that_answer_no_ping_do_not_shorten_the_round_trip() -> None:
    lie = threading.Event()
    lies = [encode([Pong(2**53)] * 64), encode([])]  # where the second has arrived, the first has been taken

    async def liar(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([WELCOME]))
        while not lie.is_set():
            await asyncio.sleep(0.002)
        for frame in lies:
            await socket.send_bytes(frame)
        async for _ in socket:
            pass
        return socket

    with DrafterServer(toy(4)) as server:
        server.handler = liar
        with pool_of(server.url) as pool:
            wait_until(lambda: up(pool))
            [link] = pool.links
            honest_s, received = link.rtt_s, link.received_bytes
            lie.set()
            wait_until(lambda: link.faults or link.received_bytes == received + sum(map(len, lies)))
            assert link.faults or link.rtt_s > honest_s / 2, f"R fell from {honest_s} to {link.rtt_s} s"


def test_unanswered_pings_move_sessions_before_the_connection_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", link_module.PING_INTERVAL_S / 10)
    monkeypatch.setattr(link_module, "SILENCE_LIMIT_S", link_module.SILENCE_LIMIT_S / 10)
    pings = 0

    async def black_hole(request: web.Request) -> web.StreamResponse:
        nonlocal pings
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([WELCOME]))
        async for frame in socket:
            pings += sum(isinstance(message, Ping) for message in decode(frame.data))
        return socket

    with DrafterServer(toy(4)) as hole, DrafterServer(toy(4)) as good:
        hole.handler = black_hole
        with pool_of(hole.url, good.url) as pool:
            wait_until(lambda: up(pool) == 2)
            pool.begin([], [(f"r{index}", [index, 2, 3]) for index in range(8)])
            wait_until(lambda: good.sessions == 8)
            assert pings <= 8


def test_a_long_context_gets_through_a_slow_uplink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(link_module, "SILENCE_LIMIT_S", 0.5)
    monkeypatch.setattr(link_module, "FIRST_BACKOFF_S", 0.01)
    context = [index % VOCAB_SIZE for index in range(100_000)]  # 100 kB: 1.6 s at 0.5 Mbit/s

    with DrafterServer(toy(4), model=draft_model(max_context=200_000)) as server, slow_uplink(server.port) as port:
        with pool_of(f"http://127.0.0.1:{port}") as pool:
            wait_until(lambda: up(pool))
            began = server.attempts
            pool.begin([], [("long", context)])
            wait_until(lambda: server.sessions or server.attempts >= began + 2, timeout_s=20.0)
            assert server.attempts == began


@contextmanager
def slow_uplink(port: int) -> Iterator[int]:
    """The port of a proxy to ``port`` that lets 0.5 Mbit/s through each way, in a thread of its own."""
    started, loop = threading.Event(), asyncio.new_event_loop()
    ended = asyncio.Event()
    addresses: list[int] = []

    async def proxy() -> None:
        async with WanProxy(("127.0.0.1", port), WanSettings(bandwidth_mbit=0.5), rng=random.Random(1)) as wan:
            addresses.append(wan.address.port)
            started.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(proxy()), name="slow-uplink", daemon=True)
    thread.start()
    try:
        assert started.wait(5.0)
        yield addresses[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(5.0)
        loop.close()
