"""The program that the drafter's route is compared with: its requests, and how they are measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from vllm_wanspec.lab.drafter.direct import DirectLoad, DirectWorkload, make_app
from vllm_wanspec.lab.drafter.loads import STEADY_LOOKAHEAD, SteadyLoad
from vllm_wanspec.lab.drafter.width_figures import SteadyRow
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.cpu import CpuClock


class Playing:
    """The direct client's pages over requests whose tokens come at a steady pace."""

    def __init__(self, step_s: float = 0.002) -> None:
        self.asked: list[tuple[tuple[int, ...], int]] = []
        self._step_s = step_s
        self._runner = web.AppRunner(make_app(DirectLoad(self._generate, [[1, 2, 3], [4, 5, 6]])))

    async def _generate(self, context: list[int], tokens: int) -> AsyncIterator[int]:
        self.asked.append((tuple(context), tokens))
        for _ in range(tokens // 2):
            await asyncio.sleep(self._step_s)
            yield 2

    async def __aenter__(self) -> str:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def test_the_direct_client_is_measured_like_a_session() -> None:
    playing = Playing()

    async def run(width: int) -> SteadyRow:
        async with asyncio.timeout(20.0), playing as url, aiohttp.ClientSession() as http:
            return await DirectWorkload(http, url, CpuClock(), SteadyLoad(branch_depth=40)).window(width, 0.3)

    found = asyncio.run(run(3))
    rounds = int(found.rounds)
    assert rounds > 1
    assert playing.asked[:3] == [((1, 2, 0), 40), ((1, 2, 1), 40), ((1, 2, 2), 40)]  # a context, and a token of its own
    assert playing.asked[3][0] == (4, 5, 0)
    assert found.is_near
    assert found.events_per_s * found.step_ms == pytest.approx(3000.0, rel=0.2)
    assert found.measured_s > 0.0
    playing = Playing()
    asyncio.run(run(1))
    assert playing.asked[0] == ((1, 2, 0), STEADY_LOOKAHEAD)  # as long as a main line


def test_arrivals_are_kept_request_by_request() -> None:
    times = iter([1.0, 2.0, 3.0, 4.0])

    async def generate(context: list[int], tokens: int) -> AsyncIterator[int]:
        for _ in range(2):
            await asyncio.sleep(0.0)
            yield 1 + context[-1]

    load = DirectLoad(generate, [[7, 7]], clock=lambda: next(times))
    assert asyncio.run(load.round(2, 9)) == [[1.0, 3.0], [2.0, 2.0, 4.0, 4.0]]


def test_a_direct_client_that_fails_is_told() -> None:
    async def window(url: str) -> SteadyRow:
        async with aiohttp.ClientSession() as http:
            return await DirectWorkload(http, url, CpuClock(), SteadyLoad()).window(1, 0.1)

    async def generate(context: list[int], tokens: int) -> AsyncIterator[int]:
        yield 1
        raise RuntimeError("dead engine")

    async def broken() -> None:
        playing = Playing()
        playing._runner = web.AppRunner(make_app(DirectLoad(generate, [[1]])))
        async with playing as url:
            await window(url)

    with pytest.raises(ClientError, match="the direct client failed: 500"):
        asyncio.run(broken())
    with pytest.raises(ClientError, match="the direct client failed"):
        asyncio.run(window("http://127.0.0.1:9"))
