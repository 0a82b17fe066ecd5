"""Greedy output stays plain vLLM's with every length policy, wide trees and steps held back for late drafts."""

import asyncio
import signal
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from .fleet import Drafter, Fleet
from .scrape import drafts_decide, is_up, until, wanspec_page
from .workload import PlainTruth, client_of, run_staggered, vary

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

REQUESTS = 32
AT_ONCE = 6
LONGEST_PROMPT = 800


@dataclass(frozen=True)
class Case:
    """One target's settings, and counters that must have moved for the run to say anything about them."""

    config: dict[str, Any]
    moved: tuple[str, ...] = ()


WIDE = {"entropy_threshold_nats": 0.0, "max_branches": 8, "running_branches": 32, "min_probability": 0.001}
CASES = {
    "awc, wide trees, fixed waits": Case(
        {"length": {"policy": "awc"}, "tree": WIDE, "late": {"policy": "fixed", "max_wait_ms": 12}},
        ("branch_hits", "waits"),
    ),
    "fixed, adaptive threshold, adaptive waits": Case(
        {
            "length": {"policy": "fixed"},
            "tree": {"entropy_threshold_nats": "adaptive"},
            "late": {"policy": "adaptive", "max_wait_ms": 100},
        },
        ("branch_hits",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_output_is_exact(
    name: str, fleet: Fleet, drafter: Drafter, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    case = CASES[name]
    endpoints = [{"name": "main", "url": drafter.url}]
    target = fleet.wanspec(name.partition(",")[0], {"draft_endpoints": endpoints, **case.config})
    fleet.wait_ready(target.server)
    chosen = [prompt for prompt in prompts if len(prompt) < LONGEST_PROMPT][:REQUESTS]
    requests = vary(chosen)

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, target, "main"), "the drafter serves the target")
            # Wide trees of six requests at once on one core: drafts are shorter than elsewhere, and the bar lower.
            async with drafts_decide(http, target, accepted=300, rejected=150):
                run = await run_staggered(client_of(http, target), requests, AT_ONCE)
            await plain.check(http, requests, run.done())
            page = await wanspec_page(http, target)
            for counter in (*case.moved, "hits", "misses", "added_nodes"):
                value = page.get(f"wanspec_{counter}_total")
                print(f"{counter}: {value:g}", end=" ")
                assert value > 0.0, f"vacuous: {counter} is 0"

    try:
        asyncio.run(main())
    finally:
        target.server.signal(signal.SIGTERM)
