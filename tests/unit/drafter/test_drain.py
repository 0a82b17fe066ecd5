"""The end of a drafter: sessions finish or are ended within a bound, and only then does the engine go."""

import asyncio
import logging
from types import SimpleNamespace

import pytest
from conftest import LogLines
from host_peer import Peer, opened, with_peer
from played_loop import now_s, played

from vllm_wanspec.core.messages import Close, Reject
from vllm_wanspec.drafter.drain import LAST_WORDS_S, before_shutdown, let_go
from vllm_wanspec.errors import UnsupportedError


class Sessions:
    """So many, each of which ends by itself at some time."""

    def __init__(self, *ends_s: float) -> None:
        self._ends_s = ends_s
        self.ended = False

    async def ask(self, last: bool) -> int:
        self.ended |= last
        return 0 if self.ended else sum(end_s > now_s() for end_s in self._ends_s)


@pytest.mark.parametrize(
    ("ends_s", "left", "longest_s"), [((), 0, 0.0), ((1.0, 2.0), 0, 2.1), ((1.0, 99.0), 1, 5.1 + LAST_WORDS_S)]
)
def test_sessions_have_their_time_and_no_more(ends_s: tuple[float, ...], left: int, longest_s: float) -> None:
    async def scenario() -> None:
        sessions = Sessions(*ends_s)
        assert await let_go(sessions.ask, 5.0) == left
        assert sessions.ended == bool(left)
        assert now_s() <= longest_s

    played(scenario())


def test_the_engine_is_stopped_once_the_sessions_are_over() -> None:
    order: list[str] = []

    def shutdown(timeout: float) -> str:
        order.append(f"engine, {timeout:g}")
        return "stopped"

    async def ask(last: bool) -> int:
        order.append("sessions")
        return 0

    async def scenario() -> None:
        client = SimpleNamespace(shutdown=shutdown)
        before_shutdown(client, ask, 5.0)
        assert await asyncio.to_thread(client.shutdown, timeout=3.0) == "stopped"
        client.shutdown(timeout=4.0)  # on the loop itself, as vLLM does at the end: nothing can be waited for
        assert order == ["sessions", "engine, 3", "engine, 4"]

    asyncio.run(scenario())


def test_a_fault_in_letting_go_does_not_keep_the_engine(log: LogLines) -> None:
    async def broken(last: bool) -> int:
        raise ZeroDivisionError

    async def scenario() -> None:
        client = SimpleNamespace(shutdown=lambda: "stopped")
        before_shutdown(client, broken, 5.0)
        assert await asyncio.to_thread(client.shutdown) == "stopped"

    asyncio.run(scenario())
    [line] = log.warnings()
    assert "could not be let go (ZeroDivisionError)" in line


def test_a_client_that_cannot_be_held_back_is_named() -> None:
    async def scenario() -> None:
        with pytest.raises(UnsupportedError, match=r"has no AsyncLLM\.shutdown"):
            before_shutdown(SimpleNamespace(), Sessions().ask, 5.0)

    asyncio.run(scenario())


def test_a_host_that_drains_takes_no_new_session_and_goes_on_with_the_old() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1))
        assert await peer.host.let_go(last=False) == 1
        await peer.say(opened(2))
        await peer.until(lambda: Reject(2, "overloaded") in peer.received and len(peer.tokens(1)) == 8)
        assert peer.host.stats().draining == 1
        await peer.say(Close(1))
        assert await peer.host.let_go(last=False) == 0
        assert peer.host.stats().rejects == {"overloaded/draining": 1}

    with_peer(scenario)


def test_a_drafter_that_stops_ends_what_is_left_without_an_error(log: LogLines) -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1, lookahead=4000), opened(2, lookahead=4000))
        await peer.until(lambda: peer.tokens(1) and peer.tokens(2))
        assert await peer.host.let_go(last=True) == 0
        await peer.until(lambda: all(Reject(number, "overloaded") in peer.received for number in (1, 2)))
        await peer.until(lambda: peer.host.running == 0)
        peer.host.complain("EngineDeadError: gone")
        assert peer.host.stats().dismissed == 2

    with_peer(scenario)
    assert not log.lines(logging.ERROR)
