"""What lost segments cost, worked out by hand: R = 40 ms, so 20 ms each way and time-outs of 240 ms."""

import asyncio
import hashlib
import random
from collections.abc import Iterable
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wan_ends import connection, echo, round_trip_ms, run, target, until

from vllm_wanspec.emulate.wan import WanProxy
from vllm_wanspec.emulate.wan_loss import LossyPath
from vllm_wanspec.emulate.wan_settings import WanSettings

WAN = WanSettings(rtt_ms=40.0, loss=0.1)
LOST, ARRIVES = 0.0, 0.9


class Fates(random.Random):
    """Loses transmissions and lets them arrive in this order, then lets all arrive; draws the greatest jitter."""

    def __init__(self, *fates: float) -> None:
        super().__init__(0)
        self.fates = list(fates)

    def random(self) -> float:
        return self.fates.pop(0) if self.fates else ARRIVES

    def uniform(self, a: float, b: float) -> float:
        return b


def s(seconds: float) -> object:
    return pytest.approx(seconds, abs=1e-9)


def test_without_losses_a_chunk_takes_half_a_round_trip_and_draws_nothing_but_jitter() -> None:
    path, rng = LossyPath(random.Random(5)), random.Random(5)
    wan = WanSettings(rtt_ms=40.0, jitter_ms=10.0)
    for sent_s in (1.0, 2.0):
        transit = path.send(5000, sent_s, wan)
        assert (transit.due_s, transit.lost, transit.waits) == (s(sent_s + 0.02 + rng.uniform(0.0, 0.01)), 0, False)


def test_what_nothing_follows_arrives_after_a_time_out() -> None:
    transit = LossyPath(Fates(LOST)).send(100, 1.0, WAN)
    assert (transit.due_s, transit.lost, transit.waits) == (s(1.0 + 0.24 + 0.02), 1, True)


def test_what_is_followed_arrives_a_round_trip_after_what_follows() -> None:
    path = LossyPath(Fates(LOST))
    lost, follower = path.send(100, 1.0, WAN), path.send(100, 1.1, WAN)
    assert follower.due_s == s(1.12)  # known at 1.14, and sent again
    assert (lost.due_s, lost.waits) == (s(1.16), False)
    path.send(100, 1.11, WAN)
    assert lost.due_s == s(1.16)


def test_what_follows_too_late_or_is_lost_too_changes_nothing() -> None:
    path = LossyPath(Fates(LOST, ARRIVES, ARRIVES, LOST, ARRIVES, LOST, ARRIVES))
    lost, late = path.send(100, 1.0, WAN), path.send(100, 1.21, WAN)  # known at 1.25, but sent again at 1.24
    assert (lost.due_s, late.due_s) == (s(1.26), s(1.23))
    both = [path.send(100, 2.0, WAN), path.send(100, 2.1, WAN)]
    assert [transit.due_s for transit in both] == [s(2.26), s(2.36)]
    path.send(100, 2.15, WAN)
    assert [transit.due_s for transit in both] == [s(2.21), s(2.21)]


@pytest.mark.parametrize(
    ("fates", "due_s", "waits"),
    [
        ([ARRIVES, LOST, ARRIVES, ARRIVES], 0.06, False),  # the third tells of the second
        ([LOST, ARRIVES, LOST, ARRIVES, ARRIVES], 0.06, False),
        ([ARRIVES, ARRIVES, LOST, ARRIVES], 0.26, True),  # nothing tells of the third
        ([LOST, LOST, ARRIVES, ARRIVES, LOST, ARRIVES], 0.04 + 0.24 + 0.02, True),  # the first is lost twice
    ],
)
def test_a_chunk_of_several_segments_waits_for_the_last(fates: list[float], due_s: float, waits: bool) -> None:
    transit = LossyPath(Fates(*fates)).send(2 * 1460 + 1, 0.0, WAN)
    assert (transit.due_s, transit.waits) == (s(due_s), waits)


def test_a_tail_that_is_followed_does_not_hurry_the_rest_of_its_chunk() -> None:
    path = LossyPath(Fates(LOST, LOST, ARRIVES, ARRIVES, LOST, ARRIVES))
    transit = path.send(2 * 1460 + 1, 0.0, WAN)
    path.send(1, 0.01, WAN)
    assert transit.due_s == s(0.30)


@pytest.mark.parametrize(("size", "segments"), [(0, 1), (1, 1), (1460, 1), (1461, 2), (16384, 12)])
def test_how_many_segments_a_chunk_has(size: int, segments: int) -> None:
    rng = Fates(*[LOST, ARRIVES] * 20)
    assert LossyPath(rng).send(size, 0.0, WAN).lost == segments
    assert len(rng.fates) == 40 - 2 * segments


@pytest.mark.parametrize(
    ("times", "due_s"),
    [
        (1, 0.26),
        (2, 0.24 + 0.48 + 0.02),
        (3, 0.24 + 0.48 + 0.96 + 0.02),
        (10, 0.24 * 511 + 120.0 + 0.02),  # 0.24 · 2⁹ = 122.88
        (99, 0.24 * 511 + 6 * 120.0 + 0.02),  # it arrives the sixteenth time
    ],
)
def test_what_is_lost_again_waits_twice_as_long(times: int, due_s: float) -> None:
    transit = LossyPath(Fates(*[LOST] * times)).send(1, 0.0, WAN)
    assert (transit.due_s, transit.lost) == (s(due_s), min(times, 15))


def test_what_is_lost_again_after_a_fast_retransmit_waits_for_the_first_time_out() -> None:
    path = LossyPath(Fates(LOST, LOST, LOST))
    lost = path.send(1, 0.0, WAN)
    path.send(1, 0.1, WAN)
    assert lost.due_s == s(0.14 + 0.24 + 0.48 + 0.02)


@pytest.mark.parametrize(
    ("rtt_ms", "jitter_ms", "timeout_s"),
    [(0.0, 0.0, 0.2), (40.0, 0.0, 0.24), (40.0, 30.0, 0.27), (100.0, 300.0, 0.8)],  # 0.4 + 4 · 0.1
)
def test_time_outs(rtt_ms: float, jitter_ms: float, timeout_s: float) -> None:
    assert WanSettings(rtt_ms, jitter_ms).retransmission_timeout_s == s(timeout_s)


def test_all_ways_of_a_repeat_have_jitter() -> None:
    path, wan = LossyPath(Fates(LOST)), WanSettings(rtt_ms=40.0, jitter_ms=5.0, loss=0.1)
    lost = path.send(1, 0.0, wan)
    assert lost.due_s == s(0.245 + 0.025)
    path.send(1, 0.1, wan)
    assert lost.due_s == s(0.1 + 3 * 0.025)


def test_a_share_of_all_segments_is_lost_and_the_same_ones_each_time() -> None:
    def lost(loss: float) -> list[int]:
        path = LossyPath(random.Random(3))
        return [path.send(1, float(index), WanSettings(loss=loss)).lost for index in range(20_000)]

    for loss in (0.01, 0.1, 0.5):
        found = lost(loss)
        assert sum(map(bool, found)) / 20_000 == pytest.approx(loss, rel=0.15)
        assert sum(found) / 20_000 == pytest.approx(loss / (1 - loss), rel=0.15)
    assert lost(0.1) == lost(0.1)


@given(
    seed=st.integers(0, 1000),
    chunks=st.lists(st.tuples(st.integers(0, 16_384), st.floats(0.0, 0.5)), max_size=30),
    loss=st.floats(0.0, 0.5),
    jitter_ms=st.floats(0.0, 50.0),
)
def test_nothing_is_early_and_what_follows_only_brings_forward(
    seed: int, chunks: Iterable[tuple[int, float]], loss: float, jitter_ms: float
) -> None:
    path, wan, now_s = LossyPath(random.Random(seed)), WanSettings(40.0, jitter_ms, loss=loss), 0.0
    sent = []
    for size, pause_s in chunks:
        now_s += pause_s
        before_s = [transit.due_s for _, transit in sent]
        sent.append((now_s, path.send(size, now_s, wan)))
        for was_s, (sent_s, transit) in zip(before_s, sent, strict=False):
            assert transit.due_s <= was_s + 1e-9
            assert transit.due_s >= sent_s + (0.06 if transit.lost else 0.02) - 1e-9


def test_a_lost_chunk_waits_for_the_time_out_through_the_proxy() -> None:
    async def main() -> None:
        rng = Fates()
        async with target(echo) as address, WanProxy(address, WAN, rng=rng) as proxy, connection(proxy) as streams:
            await round_trip_ms(*streams)
            rng.fates = [LOST]
            assert 280.0 <= await round_trip_ms(*streams) < 400.0  # 240 + 20 there, 20 back
            assert proxy.segments_lost == 1
            assert await round_trip_ms(*streams) < 160.0

    run(main())


def test_what_follows_frees_a_lost_chunk_through_the_proxy_and_does_not_overtake_it() -> None:
    async def main() -> None:
        rng = Fates()
        async with target(echo) as address, WanProxy(address, WAN, rng=rng) as proxy, connection(proxy) as streams:
            reader, writer = streams
            await round_trip_ms(reader, writer)
            rng.fates = [LOST]
            writer.write(b"first")
            await until(lambda: proxy.in_flight_bytes == 5)
            followed_s = monotonic()
            writer.write(b"second")
            assert await reader.readexactly(11) == b"firstsecond"
            assert 0.079 <= monotonic() - followed_s < 0.2  # 60 there, 20 back

    run(main())


def test_the_end_of_a_stream_can_be_lost() -> None:
    async def main() -> None:
        rng = Fates()
        async with target(echo) as address, WanProxy(address, WAN, rng=rng) as proxy, connection(proxy) as streams:
            reader, writer = streams
            await round_trip_ms(reader, writer)
            rng.fates = [LOST]
            began_s = monotonic()
            writer.write_eof()
            assert await reader.read(-1) == b""
            assert 0.279 <= monotonic() - began_s < 0.4

    run(main())


def test_all_arrives_in_order_however_much_is_lost() -> None:
    data = random.Random(5).randbytes(400_000)

    async def main() -> None:
        async with target(echo) as address, WanProxy(address, rng=random.Random(7)) as proxy:
            proxy.update(rtt_ms=4.0, jitter_ms=3.0, loss=0.05)
            async with connection(proxy) as (reader, writer):
                writer.write(data)
                writer.write_eof()
                assert hashlib.sha256(await reader.read(-1)).digest() == hashlib.sha256(data).digest()
            assert proxy.segments_lost > 10
            assert (proxy.bytes_up, proxy.bytes_down, proxy.in_flight_bytes) == (len(data), len(data), 0)

    run(main())


def test_a_connection_that_waits_for_a_time_out_can_be_closed() -> None:
    async def main() -> None:
        rng = Fates(*[LOST] * 15)
        async with target(echo) as address:
            proxy = WanProxy(address, WAN, rng=rng)
            await proxy.start()
            async with connection(proxy) as (_, writer):
                writer.write(b"x")
                await until(lambda: proxy.segments_lost == 15)
                await asyncio.wait_for(proxy.close(), 5.0)
            assert (proxy.connections_open, proxy.in_flight_bytes) == (0, 0)

    run(main())
