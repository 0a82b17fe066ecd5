"""Drafters that are no good cost a log line each, and nothing else."""

import asyncio

import aiohttp
import pytest

from .fleet import BAD_DRAFTERS, Drafter, Target
from .peers import Peers
from .scrape import drafts_decide, is_up, until, wanspec_page
from .workload import PlainTruth, Request, client_of, run_staggered

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LONGEST_PROMPT = 150


def complaints(log: str, drafter: str) -> list[str]:
    return [line for line in log.splitlines() if f"drafter {drafter} (" in line]


def test_bad_drafters_cost_one_line_each(
    small: Target, drafter: Drafter, peers: Peers, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    chosen = [prompt[:LONGEST_PROMPT] for prompt in prompts][-32:]
    requests = [Request(prompt, 96 - 8 * (index % 5)) for index, prompt in enumerate(chosen)]

    async def tried_again() -> bool:
        return min(peers.garbled.connections, peers.turncoat.connections) >= 2

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, small, "good"), "the good drafter serves the target")
            async with drafts_decide(http, small):
                run = await run_staggered(client_of(http, small), requests, 8)
            await until(tried_again, "bad drafters are tried again")
            page = await wanspec_page(http, small)
            for name in BAD_DRAFTERS:
                assert (page.get("wanspec_peer_faults_total", drafter=name) >= 1) == (name in ("garbled", "turncoat"))
                assert name == "turncoat" or page.get("wanspec_drafter_up", drafter=name) == 0.0
            await plain.check(http, requests, run.done())

    asyncio.run(main())
    log = small.log()
    for name, right in BAD_DRAFTERS.items():
        lines = complaints(log, name)
        print(*lines, sep="\n")
        assert len(lines) == 1, f"{len(lines)} lines about {name}"
        assert "WARNING" in lines[0] and right in lines[0]
    assert "Traceback" not in log and "ERROR" not in log
    assert "refused: wrong or missing bearer token" in drafter.server.log_path.read_text("utf-8", "replace")
