"""What the side-by-side bench reads around its requests, and its proposers."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from vllm_wanspec.cli.wan import control_app
from vllm_wanspec.emulate.wan import WanProxy
from vllm_wanspec.emulate.wan_settings import WanSettings
from vllm_wanspec.lab.compare import probes
from vllm_wanspec.lab.compare.oracle import EmptyProposer, OracleProposer, write_references
from vllm_wanspec.lab.compare.probes import Probe, Wan
from vllm_wanspec.lab.harness.client import ClientError


def oracle(path: Path, tokens: int = 3) -> OracleProposer:
    config = SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=tokens))
    return OracleProposer(config, {"WANSPEC_ORACLE": str(path)})


def test_the_oracle_proposes_what_comes_next(tmp_path: Path) -> None:
    write_references(tmp_path / "known.json", [([1, 2], [5, 6, 7, 8]), ([3], [9])])
    proposer = oracle(tmp_path / "known.json")
    contexts = np.array([[1, 2, 5, 0], [3, 0, 0, 0], [1, 2, 9, 0], [1, 2, 5, 6]], np.int32)
    # The third row has left its text, the last one is still in prefill.
    drafts = proposer.propose([[5], [3], [9], []], np.array([3, 1, 3, 4]), contexts, slot_mappings=None)
    assert drafts == [[6, 7, 8], [9], [], []]
    assert all(type(token) is int for draft in drafts for token in draft)


def test_the_oracle_reads_again_what_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    proposer = oracle(path)
    assert proposer.next_tokens([1, 2]) == []
    write_references(path, [([1], [2, 3])])
    assert proposer.next_tokens([1, 2]) == [3]
    write_references(path, [([7], [8])])
    os.utime(path, ns=(1, 1))
    assert proposer.next_tokens([1, 2]) == [3]  # known: no need to look
    assert proposer.next_tokens([7]) == [8]
    path.write_text("[[")
    os.utime(path, ns=(2, 2))
    assert proposer.next_tokens([5]) == []
    assert proposer.next_tokens([7]) == [8]


def test_the_empty_proposer_proposes_nothing() -> None:
    assert EmptyProposer(None).propose([[1], []], None, None, slot_mappings=None) == [[], []]


@asynccontextmanager
async def served(pages: Mapping[str, Any]) -> Any:
    """Serve what the pages give, by path."""

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=pages[request.path]())

    app = web.Application()
    app.add_routes([web.get(path, page) for path in pages])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as http:
        yield http, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def test_counters_are_read_from_target_controller_and_drafter_once_they_rest() -> None:
    drafted = iter([10, 14, 18, 18, 99])
    pages = {
        "/target": lambda: (
            'vllm:spec_decode_num_drafts_total{engine="0"} 3.0\nvllm:spec_decode_num_draft_tokens_total 12\n'
            "vllm:spec_decode_num_accepted_tokens_total 7\n"
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{p="0"} 3\n'
        ),
        "/controller": lambda: "wanspec_hits_total 4\nwanspec_local_draft_passes_total 0\nwanspec_x_total 1\n",
        "/drafter": lambda: f"wanspec_drafted_tokens_total {next(drafted)}\n",
    }

    async def main() -> None:
        async with served(pages) as (http, url):
            probe = Probe(http, f"{url}/target", f"{url}/controller", f"{url}/drafter", {"target": os.getpid()})
            settled = await probe.settled(0.0)
            assert settled.values == {
                "num_drafts": 3.0,
                "num_draft_tokens": 12.0,
                "num_accepted_tokens": 7.0,
                "hits": 4.0,
                "local_draft_passes": 0.0,
                "drafted_tokens": 18.0,
            }
            assert next(drafted) == 99
            assert probe.cpu_s()["target"] > 0.0
            plain = Probe(http, f"{url}/target", None, None, {})
            assert set((await plain.settled(None)).values) == {"num_drafts", "num_draft_tokens", "num_accepted_tokens"}
            assert plain.cpu_s() == {}

    asyncio.run(main())


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
    monkeypatch.setattr(probes, "LINK_DEADLINE_S", 0.3)
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
