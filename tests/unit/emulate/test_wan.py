"""The WAN proxy, with real sockets on the loopback.

Times are compared by medians with wide margins: a lower bound is what the proxy promises, the upper one only guards
against delaying several times over; test_wan_delay.py is exact.
"""

import asyncio
import hashlib
import random
import socket
import struct
from time import monotonic

import pytest
from wan_ends import connection, echo, median_round_trip_ms, round_trip_ms, run, target, until

from vllm_wanspec.emulate.wan import WanProxy
from vllm_wanspec.emulate.wan_settings import Outage, WanSettings
from vllm_wanspec.errors import ConfigError

LATE_MS = 120.0  # what a busy machine may add to a median


def make_proxy(address: tuple[str, int], max_in_flight_bytes: int = 1 << 22, **settings: object) -> WanProxy:
    wan = WanSettings().changed(**settings)
    return WanProxy(address, wan, rng=random.Random(7), max_in_flight_bytes=max_in_flight_bytes)


@pytest.mark.parametrize("rtt_ms", [0.0, 10.0, 50.0])
def test_round_trip(rtt_ms: float) -> None:
    async def main() -> None:
        async with target(echo) as address, make_proxy(address, rtt_ms=rtt_ms) as proxy, connection(proxy) as streams:
            assert rtt_ms <= await median_round_trip_ms(*streams) < rtt_ms + LATE_MS

    run(main())


def test_set_up_costs_one_round_trip() -> None:
    async def main() -> None:
        async with target(echo) as address, make_proxy(address, rtt_ms=40.0) as proxy, connection(proxy) as streams:
            first_ms = await round_trip_ms(*streams)
            assert 75.0 <= first_ms < 80.0 + 2 * LATE_MS

    run(main())


def test_round_trip_changes_while_running() -> None:
    async def main() -> None:
        async with target(echo) as address, make_proxy(address, rtt_ms=5.0) as proxy, connection(proxy) as streams:
            assert await median_round_trip_ms(*streams) < 5.0 + LATE_MS
            assert proxy.update(rtt_ms=150.0).rtt_ms == 150.0
            assert 150.0 <= await median_round_trip_ms(*streams) < 150.0 + LATE_MS
            proxy.update(rtt_ms=5.0)
            assert 5.0 <= await median_round_trip_ms(*streams) < 5.0 + LATE_MS

    run(main())


def test_shorter_round_trip_does_not_overtake() -> None:
    async def main() -> None:
        async with target(echo) as address, make_proxy(address, rtt_ms=100.0) as proxy, connection(proxy) as streams:
            reader, writer = streams
            await round_trip_ms(reader, writer)
            writer.write(b"first")
            await until(lambda: proxy.in_flight_bytes == 5)
            proxy.update(rtt_ms=0.0)
            writer.write(b"second")
            assert await reader.readexactly(11) == b"firstsecond"

    run(main())


def test_order_under_jitter() -> None:
    rng = random.Random(3)
    chunks = [rng.randbytes(rng.randrange(1, 30_000)) for _ in range(60)]

    async def main() -> None:
        async with target(echo) as address, make_proxy(address, rtt_ms=2.0, jitter_ms=4.0) as proxy:
            async with connection(proxy) as (reader, writer):
                for chunk in chunks:
                    writer.write(chunk)
                    await asyncio.sleep(0)
                writer.write_eof()
                back = await reader.read(-1)
            size = sum(map(len, chunks))
            assert hashlib.sha256(back).digest() == hashlib.sha256(b"".join(chunks)).digest()
            assert (proxy.bytes_up, proxy.bytes_down) == (size, size)

    run(main())


def test_jitter_comes_from_the_rng() -> None:
    class Highest(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return b

    async def main() -> None:
        async with target(echo) as address:
            proxy = WanProxy(address, WanSettings(rtt_ms=10.0, jitter_ms=20.0), rng=Highest())
            async with proxy, connection(proxy) as streams:
                assert 50.0 <= await median_round_trip_ms(*streams) < 50.0 + LATE_MS

    run(main())


def test_bandwidth() -> None:
    async def main() -> None:
        async with (
            target(echo) as address,
            make_proxy(address, bandwidth_mbit=8.0) as proxy,
            connection(proxy) as streams,
        ):
            reader, writer = streams
            started_s = monotonic()
            writer.write(bytes(300_000))  # 0.3 s at 1 MB/s; both directions at once
            await reader.readexactly(300_000)
            assert 0.3 <= monotonic() - started_s < 0.9

    run(main())


def test_bandwidth_is_shared_by_connections() -> None:
    async def transfer(proxy: WanProxy) -> None:
        async with connection(proxy) as (reader, writer):
            writer.write(bytes(100_000))
            await reader.readexactly(100_000)

    async def main() -> None:
        async with target(echo) as address, make_proxy(address, bandwidth_mbit=8.0) as proxy:
            started_s = monotonic()
            await asyncio.gather(*(transfer(proxy) for _ in range(3)))
            assert monotonic() - started_s >= 0.3

    run(main())


def test_outage_stalls_then_delivers() -> None:
    async def main() -> None:
        async with target(echo) as address, make_proxy(address) as proxy, connection(proxy) as streams:
            await round_trip_ms(*streams)
            end_s = proxy.elapsed_s + 0.3
            proxy.update(outages=[Outage(proxy.elapsed_s, 0.3)])
            assert await round_trip_ms(*streams) < 3000.0
            assert proxy.elapsed_s >= end_s
            assert await median_round_trip_ms(*streams) < LATE_MS

    run(main())


def test_outage_stalls_new_connections_and_ends_early() -> None:
    async def main() -> None:
        async with target(echo) as address, make_proxy(address, outages=[Outage(0.0, 1000.0)]) as proxy:
            async with connection(proxy) as streams:
                exchange = asyncio.create_task(round_trip_ms(*streams))
                done, _ = await asyncio.wait([exchange], timeout=0.15)
                assert not done
                assert (proxy.connections_open, proxy.bytes_up) == (1, 0)
                proxy.update(outages=[])
                await exchange

    run(main())


def test_unreachable_target_drops_the_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: refused

        async def main() -> None:
            async with make_proxy(unused.getsockname()) as proxy:
                for count in (1, 2):
                    async with connection(proxy) as (reader, _):
                        with pytest.raises(ConnectionResetError):
                            await reader.readexactly(1)
                    assert proxy.connections_failed == count

        run(main())
    assert "cannot reach 127.0.0.1:" in caplog.text


def test_half_close_of_the_client() -> None:
    async def answer_at_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d bytes" % len(await reader.read(-1)))

    async def main() -> None:
        async with target(answer_at_end) as address, make_proxy(address, rtt_ms=10.0) as proxy:
            async with connection(proxy) as (reader, writer):
                writer.write(b"question")
                writer.write_eof()
                assert await reader.read(-1) == b"8 bytes"

    run(main())


def test_half_close_of_the_target() -> None:
    received: list[bytes] = []

    async def speak_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        received.append(await reader.read(-1))

    async def main() -> None:
        async with target(speak_first) as address, make_proxy(address, rtt_ms=10.0) as proxy:
            async with connection(proxy) as (reader, writer):
                assert await reader.read(-1) == b"bye"
                writer.write(b"still here")
                writer.write_eof()
                await until(lambda: bool(received))
            assert received == [b"still here"]

    run(main())


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def test_reset_by_the_target_reaches_the_client() -> None:
    async def reset_after_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        reset(writer)

    async def main() -> None:
        async with target(reset_after_first) as address, make_proxy(address, rtt_ms=20.0) as proxy:
            async with connection(proxy) as (reader, writer):
                writer.write(b"x")
                started_s = monotonic()
                with pytest.raises(ConnectionResetError):
                    await reader.readexactly(1)
                assert monotonic() - started_s >= 0.035  # set-up, there and back
            await until(lambda: proxy.connections_open == 0)

    run(main())


def test_reset_by_the_client_reaches_the_target() -> None:
    seen: list[str] = []

    async def wait_for_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(1)
            await reader.read(-1)
            seen.append("end")
        except ConnectionResetError:
            seen.append("reset")

    async def main() -> None:
        async with target(wait_for_end) as address, make_proxy(address, rtt_ms=20.0) as proxy:
            async with connection(proxy) as (_, writer):
                writer.write(b"x")
                await until(lambda: proxy.bytes_up == 1)
                reset(writer)
                await until(lambda: bool(seen))
        assert seen == ["reset"]

    run(main())


def test_back_pressure_bounds_what_is_held() -> None:
    limit_bytes, size = 256 * 1024, 4 * 1024 * 1024
    data = random.Random(5).randbytes(size)

    async def main() -> None:
        read_on = asyncio.Event()
        digest: list[bytes] = []

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_on.wait()
            digest.append(hashlib.sha256(await reader.read(-1)).digest())

        async with target(slow) as address, make_proxy(address, limit_bytes, rtt_ms=20.0) as proxy:
            async with connection(proxy) as (reader, writer):
                held_bytes = [0]

                def all_arrived() -> bool:
                    held_bytes.append(proxy.in_flight_bytes)
                    return bool(digest)

                writer.write(data)
                writer.write_eof()
                await until(lambda: proxy.in_flight_bytes >= limit_bytes)
                read_on.set()
                await until(all_arrived)
                assert max(held_bytes) <= limit_bytes + 16 * 1024
                assert digest == [hashlib.sha256(data).digest()]
                assert await reader.read(-1) == b""
            assert (proxy.bytes_up, proxy.in_flight_bytes) == (size, 0)

    run(main())


def test_close_ends_open_connections() -> None:
    async def main() -> None:
        async with target(echo) as address:
            proxy = make_proxy(address, rtt_ms=1000.0)
            await proxy.start()
            async with connection(proxy) as (reader, writer):
                writer.write(b"x")
                await until(lambda: proxy.connections_open == 1)
                await proxy.close()
                with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                    await reader.readexactly(1)
            assert (proxy.connections_open, proxy.in_flight_bytes) == (0, 0)
            await proxy.close()

    run(main())


def test_port_in_use() -> None:
    async def main() -> None:
        async with make_proxy(("127.0.0.1", 9)) as first:
            second = WanProxy(first.target, rng=random.Random(), listen=first.address)
            with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{first.address.port}: "):
                await second.start()
            await second.close()

    run(main())
