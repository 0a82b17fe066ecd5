"""That the WAN proxy delays by what it is told, to 2 ms, with real sockets on the loopback.

A busy machine can only make a trip longer: none is too short, and the calmest are not too long.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from time import monotonic

import pytest
from wan_ends import connection, echo, round_trip_ms, run, target

from vllm_wanspec.emulate.wan import WanProxy
from vllm_wanspec.emulate.wan_settings import WanSettings

TOLERANCE_MS = 2.0
CALM, TRIPS = 3, 400


class Middle(random.Random):
    """Draws the mean of every jitter."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


async def check(trip_ms: Callable[[], Awaitable[float]], wanted_ms: float) -> None:
    """Trips take this long: as soon as a few are not too long, or after many."""
    trips_ms: list[float] = []
    while sum(trip <= wanted_ms + TOLERANCE_MS for trip in trips_ms) < CALM and len(trips_ms) < TRIPS:
        trips_ms.append(await trip_ms())
    calmest_ms = sorted(trips_ms)[:CALM]
    assert calmest_ms == pytest.approx([wanted_ms] * CALM, abs=TOLERANCE_MS)


def test_the_round_trip_is_as_long_as_told() -> None:
    async def main() -> None:
        async with target(echo) as address:
            proxy = WanProxy(address, WanSettings(rtt_ms=40.0), rng=random.Random(7))
            async with proxy, connection(proxy) as streams:
                await round_trip_ms(*streams)  # with the set-up
                await check(lambda: round_trip_ms(*streams), 40.0)

    run(main())


@pytest.mark.parametrize("upwards", [True, False])
def test_each_direction_takes_half(upwards: bool) -> None:
    arrivals_s: asyncio.Queue[float] = asyncio.Queue()

    async def note_and_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1):
            arrivals_s.put_nowait(monotonic())
            writer.write(b"x")

    async def main() -> None:
        async with target(note_and_answer) as address:
            proxy = WanProxy(address, WanSettings(rtt_ms=40.0), rng=random.Random(7))
            async with proxy, connection(proxy) as streams:

                async def one_way_ms() -> float:
                    sent_s, trip_ms = monotonic(), await round_trip_ms(*streams)
                    up_ms = ((await arrivals_s.get()) - sent_s) * 1e3
                    return up_ms if upwards else trip_ms - up_ms

                await one_way_ms()
                await check(one_way_ms, 20.0)

    run(main())


def test_jitter_can_be_changed_while_running_and_lasts_half_of_it_each_way_in_the_mean() -> None:
    async def main() -> None:
        async with target(echo) as address:
            proxy = WanProxy(address, WanSettings(rtt_ms=20.0), rng=Middle())
            async with proxy, connection(proxy) as streams:
                await round_trip_ms(*streams)
                for jitter_ms in (0.0, 15.0, 5.0):
                    proxy.update(jitter_ms=jitter_ms)
                    await check(lambda: round_trip_ms(*streams), 20.0 + jitter_ms)

    run(main())
