"""The loop that carries frames: who is not read, says nothing, or says much."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from host_peer import TOY, opened
from played_loop import now_s, played
from toys import FINGERPRINT, draft_model

from vllm_wanspec.core.messages import Hello, Ping
from vllm_wanspec.core.wire import encode
from vllm_wanspec.drafter.host import StreamingHost
from vllm_wanspec.drafter.ports import IDLE_S, SEND_DEADLINE_S, LocalPort, serve
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.sim.engine import Engine

HELLO = encode([Hello(1, FINGERPRINT, "test")])


def host() -> StreamingHost:
    return StreamingHost(Engine(TOY), draft_model(), clock=now_s)


async def read(frame: bytes) -> None:
    pass


async def deaf(frame: bytes) -> None:
    await asyncio.Event().wait()


async def pinging(seconds: float, *first: bytes) -> AsyncIterator[bytes]:
    """Says something each second for so long; then it is gone."""
    for frame in first:
        yield frame
    while now_s() < seconds:
        await asyncio.sleep(1.0)
        yield encode([Ping(1)])


async def saying(*frames: bytes) -> AsyncIterator[bytes]:
    for frame in frames:
        yield frame
    await asyncio.Event().wait()


def test_a_peer_that_reads_and_pings_is_served_as_long_as_it_likes() -> None:
    async def scenario() -> None:
        await serve(LocalPort(host()), pinging(600.0, HELLO), read)
        assert now_s() >= 600.0

    played(scenario())


def test_a_peer_that_takes_no_frame_is_dropped_with_its_sessions() -> None:
    async def scenario() -> None:
        serving = host()
        with pytest.raises(RemoteProtocolError, match="taken no frame for 15 s"):
            await serve(LocalPort(serving), pinging(600.0, HELLO, encode([opened(1)])), deaf)
        assert now_s() == pytest.approx(SEND_DEADLINE_S, abs=0.1)
        assert (serving.sessions, serving.running, serving.connections) == (0, 0, set())

    played(scenario())


@pytest.mark.parametrize("frames", [(), (HELLO,), (HELLO, encode([opened(1)]))], ids=len)
def test_a_peer_that_says_nothing_is_dropped(frames: tuple[bytes, ...]) -> None:
    async def scenario() -> None:
        serving = host()
        with pytest.raises(RemoteProtocolError, match="said nothing for 60 s"):
            await serve(LocalPort(serving), saying(*frames), read)
        assert now_s() == pytest.approx(IDLE_S, abs=0.1)
        assert serving.sessions == 0

    played(scenario())


def test_a_timeout_of_the_transport_s_own_is_its_own() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield HELLO
        raise TimeoutError("of the socket")

    async def scenario() -> None:
        with pytest.raises(TimeoutError, match="of the socket"):
            await serve(LocalPort(host()), broken(), read)

    played(scenario())


def test_who_sends_much_leaves_others_their_turn() -> None:
    async def scenario() -> None:
        serving = host()
        seen: list[int] = []

        async def much() -> AsyncIterator[bytes]:
            yield HELLO
            for number in range(1, 101):
                yield encode([opened(number)])

        async def little() -> AsyncIterator[bytes]:
            yield HELLO
            yield encode([Ping(1)])
            seen.append(serving.sessions)

        await asyncio.gather(serve(LocalPort(serving), much(), read), serve(LocalPort(serving), little(), read))
        assert seen[0] <= 10

    played(scenario())
