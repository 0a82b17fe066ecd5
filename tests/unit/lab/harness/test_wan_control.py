"""Setting the emulated WAN while it runs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from metrics_pages import served

from vllm_wanspec.cli.wan import control_app
from vllm_wanspec.emulate.wan import WanProxy, WanSettings
from vllm_wanspec.lab.harness import wan_control
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.wan_control import Wan, expected_ms, is_off


class Link:
    """A controller's metrics page: its link measures what the proxy says, once it has connected anew."""

    def __init__(self, proxy: WanProxy) -> None:
        self.proxy = proxy
        self.error_ms = 0.0
        self.looks = 0
        self.losses: set[float] = set()

    def page(self) -> str:
        self.looks += 1
        if self.looks % 3 == 0:  # it takes its time to connect
            self.proxy.connections_total += 1
        wan = self.proxy.settings
        self.losses.add(wan.loss)
        rtt_s = (wan.rtt_ms + wan.jitter_ms + self.error_ms) / 1000.0
        lines = [f'wanspec_drafter_median_rtt_seconds{{drafter="{name}"}}' for name in ("demo", "other")]
        return f'wanspec_drafter_up{{drafter="demo"}} 1\n{lines[0]} {rtt_s}\n{lines[1]} 9\n'


@asynccontextmanager
async def controlled(link: Link) -> AsyncIterator[Wan]:
    """Controls the link's proxy, and two controllers that have such a link."""
    runner = web.AppRunner(control_app(link.proxy))
    async with link.proxy, served({"/metrics": link.page, "/second": link.page, "/empty": str}) as (http, url):
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        control_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield Wan(http, control_url, [f"{url}/metrics", f"{url}/second"], path_ms=0.0)
        await runner.cleanup()


async def connecting(link: Link, setting: Awaitable[bool]) -> bool:
    """Set the WAN while both controllers connect anew."""

    async def connect() -> None:
        await asyncio.sleep(0.05)
        link.proxy.connections_total += 2

    measured, _ = await asyncio.gather(setting, connect())
    return measured


def make_link() -> Link:
    return Link(WanProxy(("127.0.0.1", 9), WanSettings(), rng=random.Random(7)))


def test_the_round_trip_is_set_once_every_link_has_measured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_control, "LINK_DEADLINE_S", 0.3)
    link = make_link()

    async def main() -> None:
        async with controlled(link) as wan:
            for rtt_ms, error_ms, near in ((30.0, 3.4, True), (30.0, 3.6, False), (0.0, 1.9, True), (0.0, 2.1, False)):
                link.error_ms = error_ms
                assert await connecting(link, wan.set(rtt_ms)) is near
                assert link.proxy.settings.rtt_ms == rtt_ms
            link.looks = -1000  # it never connects again
            with pytest.raises(ClientError, match="was not up 0 s after the WAN was changed"):
                await wan.set(50.0)

    asyncio.run(main())


def test_the_proxy_delays_by_what_the_path_does_not_take_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_control, "PINGS_S", 0.05)
    link = make_link()
    link.error_ms = 1.5

    async def main() -> None:
        async with controlled(link) as wan:
            wan.path_ms = None
            await connecting(link, wan._connect_anew(1.5))  # as if it had been connected a while
            setting = asyncio.create_task(wan.set(30.0))
            while wan.path_ms is None or not setting.done():
                link.proxy.connections_total += 2
                await asyncio.sleep(0.05)
            assert await setting
            assert wan.path_ms == pytest.approx(1.5)
            assert link.proxy.settings.rtt_ms == pytest.approx(28.5)
            assert await connecting(link, wan.set(1.0))
            assert link.proxy.settings.rtt_ms == 0.0

    asyncio.run(main())


def test_jitter_and_losses_are_set_too_and_losses_begin_once_the_round_trip_is_measured() -> None:
    link = make_link()

    async def main() -> None:
        async with controlled(link) as wan:
            assert await connecting(link, wan.set(30.0, 5.0, 0.02))
            assert link.proxy.settings == WanSettings(30.0, 5.0, loss=0.02)
            assert await connecting(link, wan.set(30.0, 5.0, 0.01))
            assert link.losses == {0.0}
            assert await connecting(link, wan.set(40.0))
            assert link.proxy.settings == WanSettings(40.0)
            with pytest.raises(ClientError, match="/settings: 400"):
                await connecting(link, wan.set(40.0, loss=0.6))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("measured_ms", "rtt_ms", "off"),
    [
        (0.0, 0.0, False),
        (2.0, 0.0, False),
        (2.1, 0.0, True),
        (36.9, 40.0, False),  # 2 + 5 % of 40
        (44.0, 40.0, False),
        (44.1, 40.0, True),
        (35.9, 40.0, True),
        (20.0, 40.0, True),  # half
        (60.0, 40.0, True),  # three quarters each way
        (float("nan"), 40.0, True),
    ],
)
def test_what_counts_as_another_round_trip(measured_ms: float, rtt_ms: float, off: bool) -> None:
    assert is_off(measured_ms, rtt_ms) is off


def test_what_is_off_is_judged_before_the_time_scale() -> None:
    assert is_off(15.5, 12.5)
    assert not is_off(15.5, 12.5, time_scale=1.25)
    assert is_off(15.7, 12.5, time_scale=1.25)


def test_the_mean_round_trip_has_the_mean_of_both_jitters() -> None:
    assert expected_ms(30.0) == 30.0
    assert expected_ms(30.0, 5.0) == 35.0
    wan, rng = WanSettings(30.0, 5.0), random.Random(3)
    drawn_ms = [1e3 * (wan.one_way_s(rng) + wan.one_way_s(rng)) for _ in range(10_000)]
    assert sum(drawn_ms) / len(drawn_ms) == pytest.approx(expected_ms(30.0, 5.0), abs=0.1)


def test_dropped_connections_can_be_made_anew() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(1))

    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        proxy = WanProxy(server.sockets[0].getsockname()[:2], WanSettings(), rng=random.Random(7))
        runner = web.AppRunner(control_app(proxy))
        async with proxy, aiohttp.ClientSession() as http:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            connections = []
            for _ in range(2):
                reader, writer = await asyncio.open_connection(*proxy.address)
                connections.append(writer)
                writer.write(b"x")
                assert await reader.read(1) == b"x"
                async with http.delete(f"http://127.0.0.1:{runner.addresses[0][1]}/connections") as answer:
                    assert (await answer.json())["connections_total"] == len(connections)
                with pytest.raises(ConnectionResetError):
                    await reader.read(1)
            for writer in connections:
                writer.close()
            await runner.cleanup()
        server.close()

    asyncio.run(main())
