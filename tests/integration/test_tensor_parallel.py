"""A target over two processes is exact: its second rank verifies the drafts that the first has bound."""

import asyncio

import aiohttp
import pytest

from vllm_wanspec.lab.target.widened import widen

from .fleet import ASYNC, REMOTE_ALONE, V1, Drafter, Fleet, on_runner
from .scrape import drafts_decide, is_up, until
from .workload import PlainTruth, client_of, run_staggered, vary

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

RANKS = 2
REQUESTS = 8
AT_ONCE = 3
LONGEST_PROMPT = 400


@pytest.mark.parametrize("runner", [V1, ASYNC])
def test_two_ranks_are_exact(
    runner: str, fleet: Fleet, drafter: Drafter, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    # The demo's target has five heads; the wider one computes the same.
    folder = fleet.folder / f"wide-{runner}"
    widen(fleet.models.target, RANKS, folder)
    config = {"draft_endpoints": [{"name": "main", "url": drafter.url}]} | REMOTE_ALONE
    target = fleet.wanspec(f"two-ranks-{runner}", config, model=folder, ranks=RANKS, **on_runner(runner))
    fleet.wait_ready(target.server)
    requests = vary([prompt for prompt in prompts if len(prompt) < LONGEST_PROMPT][:REQUESTS], shortest=48)

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, target, "main"), "the drafter serves the target")
            async with drafts_decide(http, target, accepted=60, rejected=40):
                run = await run_staggered(client_of(http, target), requests, AT_ONCE)
            await plain.check(http, requests, run.done())

    try:
        asyncio.run(main())
    finally:
        fleet.stop(target.server)
