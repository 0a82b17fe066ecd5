"""The width bench's churning load: its figures from two readings, and sessions on a toy drafter."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, draft_model, toy

from vllm_wanspec.lab.drafter.churning import ChurningWorkload, Reading, churn_row
from vllm_wanspec.lab.drafter.loads import ChurningLoad, Drafter
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.cpu import CpuClock
from vllm_wanspec.sim.controller import DrafterError, DraftTokenizer, Tally, playing

TOKENIZER = DraftTokenizer(FINGERPRINT, lambda text: [ord(letter) % VOCAB_SIZE for letter in text])


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def workload(http: aiohttp.ClientSession, url: str, cpu: CpuClock | None = None) -> ChurningWorkload:
    drafter = Drafter(http, url, TOKENIZER, itertools.cycle([[1] * 50, [2] * 50]), cpu or CpuClock())
    return ChurningWorkload(drafter, ChurningLoad(), seed=0, warm_up_s=0.0)


def test_a_window_s_figures() -> None:
    earlier = {"drafted_tokens": 100.0, "branch_seconds": 5.0}
    before = Reading(10.0, Counters(earlier), {"api": 1.0, "engine": 2.0, "core": 9.0}, Tally(1000, 10))
    later = {
        "drafted_tokens": 500.0,
        "branch_seconds": 9.0,
        "branches_started": 8.0,
        "gap_seconds": 1.5,
        "first_seconds": 0.2,
        "first_tokens": 100.0,
    }
    after = Reading(12.0, Counters(later), {"api": 1.5, "engine": 3.0, "core": 10.9}, Tally(5000, 60))
    found = churn_row(2, before, after)
    assert found.running == pytest.approx(2.0)
    assert found.is_near
    assert found.step_ms == pytest.approx(10.0)
    assert found.gap_ms == pytest.approx(5.0)
    assert found.first_ms == pytest.approx(2.0)
    assert (found.events_per_s, found.starts_per_s) == (200.0, 4.0)
    assert (found.bytes_per_s, found.committed_per_s) == (2000.0, 25.0)
    assert (found.api_cpu, found.engine_cpu) == (0.25, 0.5)
    assert found.others_cpu == pytest.approx(0.2)


def test_a_window_without_anything_is_all_zero() -> None:
    found = churn_row(8, Reading(1.0), Reading(2.0))
    assert found.step_ms == found.gap_ms == found.events_per_s == found.api_cpu == found.others_cpu == 0.0
    assert not found.is_near


METRICS = """\
# HELP wanspec_drafted_tokens_total Tokens.
wanspec_drafted_tokens_total 42.0
wanspec_running_branches 3.0
wanspec_gap_seconds_total{engine="0",model_name="a b"} 1.5
wanspec_gap_seconds_total{engine="1",model_name="a b"} 0.5
wanspec_gap_seconds_bucket{le="0.1"} 7.0
"""


def test_only_the_wanted_samples_are_read() -> None:
    async def metrics(request: web.Request) -> web.StreamResponse:
        return web.Response(text=METRICS)

    async def run() -> Reading:
        async with serving(metrics) as url, aiohttp.ClientSession() as http:
            with pytest.raises(ClientError, match="cannot read metrics"):
                await workload(http, url + "/nothing").read()
            return await workload(http, url, CpuClock(os.getpid(), core=0)).read()

    reading = asyncio.run(run())
    assert reading.counters.values == {"drafted_tokens": 42.0, "gap_seconds": 2.0}
    if sys.platform == "linux":
        assert reading.cpu_s["api"] > 0.0
        assert reading.cpu_s["core"] > 0.0


class serving:
    """A web server with one page, ``/metrics``."""

    def __init__(self, handler: Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]) -> None:
        app = web.Application()
        app.router.add_get("/metrics", handler)
        self._runner = web.AppRunner(app)

    async def __aenter__(self) -> str:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def test_the_workload_opens_one_session_after_another() -> None:
    async def run(url: str) -> None:
        async with asyncio.timeout(20.0), aiohttp.ClientSession() as http:
            load = workload(http, url)
            async with playing(load.play(8)):
                await until(lambda: server.attempts > 2)
        assert load.tally.received_bytes > 0

    with DrafterServer(toy(), model=draft_model(max_context=150)) as server:
        asyncio.run(run(server.url))


def test_a_failing_workload_is_told() -> None:
    async def run() -> None:
        async with asyncio.timeout(20.0), aiohttp.ClientSession() as http:
            async with playing(workload(http, "http://127.0.0.1:9").play(8)):
                await asyncio.sleep(0.2)

    with pytest.raises(DrafterError, match="no drafter there"):
        asyncio.run(run())
