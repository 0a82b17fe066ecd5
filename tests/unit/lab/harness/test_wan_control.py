"""Setting the emulated WAN while it runs."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import pytest
from aiohttp import web
from metrics_pages import served

from vllm_wanspec.cli.wan import control_app
from vllm_wanspec.emulate.wan import WanProxy, WanSettings
from vllm_wanspec.lab.harness import wan_control
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.wan_control import Wan


class Link:
    """A controller's metrics page: its link measures what the proxy says, once it has connected anew."""

    def __init__(self, proxy: WanProxy) -> None:
        self.proxy = proxy
        self.error_ms = 0.0
        self.looks = 0

    def page(self) -> str:
        self.looks += 1
        if self.looks % 3 == 0:  # it takes its time to connect
            self.proxy.connections_total += 1
        rtt_s = (self.proxy.settings.rtt_ms + self.error_ms) / 1000.0
        return f'wanspec_drafter_up{{drafter="demo"}} 1\nwanspec_drafter_rtt_seconds{{drafter="demo"}} {rtt_s}\n'


def test_the_round_trip_is_set_once_every_link_has_measured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_control, "LINK_DEADLINE_S", 0.3)
    proxy = WanProxy(("127.0.0.1", 9), WanSettings(), rng=random.Random(7))
    link = Link(proxy)

    async def main() -> None:
        runner = web.AppRunner(control_app(proxy))
        async with proxy, served({"/metrics": link.page}) as (http, url):
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            control = f"http://127.0.0.1:{runner.addresses[0][1]}"
            wan = Wan(http, control, [f"{url}/metrics"])

            async def connect() -> None:
                await asyncio.sleep(0.05)
                proxy.connections_total += 1

            for rtt_ms, error_ms, near in ((30.0, 2.5, True), (30.0, 4.0, False), (0.0, 2.5, True), (0.0, 3.5, False)):
                link.error_ms = error_ms
                task = asyncio.create_task(connect())
                assert await wan.set(rtt_ms) is near
                await task
                assert proxy.settings.rtt_ms == rtt_ms
            link.looks = -1000  # it never connects again
            with pytest.raises(ClientError, match="was not up 0 s after the WAN was changed"):
                await wan.set(50.0)
            await runner.cleanup()

    asyncio.run(main())


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
