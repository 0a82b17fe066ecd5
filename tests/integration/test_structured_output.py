"""Output that must follow a grammar is plain vLLM's too: what the grammar allowed is what is verified."""

import asyncio
import re
from dataclasses import replace

import aiohttp
import pytest

from .fleet import EACH_RUNNER, Target
from .scrape import drafts_decide, is_up, until
from .workload import PlainTruth, Request, client_of, run_staggered

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), EACH_RUNNER]

ALLOWED = r"[A-Za-z_ ().,:=\n]*"
"""Neither digits nor quotes, which the demo's prompts are full of."""
GRAMMAR = {"structured_outputs": {"regex": ALLOWED}}
REQUESTS = 32
AT_ONCE = 6
LONGEST_PROMPT = 600
BLOCK = 32
"""Tokens of a block of the KV cache, which is cached whole."""


def test_greedy_requests_with_a_grammar_are_exact(
    wanspec: Target, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    chosen = [prompt for prompt in prompts if 60 < len(prompt) < LONGEST_PROMPT][:REQUESTS]
    assert len(chosen) == REQUESTS
    free = [Request(prompt, 64 + 8 * (index % 5)) for index, prompt in enumerate(chosen)]
    # Two of three are bound, so that in most steps some rows of a batch are and others are not.
    requests = [one if index % 3 == 0 else replace(one, extra=GRAMMAR) for index, one in enumerate(free)]

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, wanspec, "main"), "the drafter serves the target")
            async with drafts_decide(http, wanspec, accepted=300, rejected=300):
                run = await run_staggered(client_of(http, wanspec), requests, AT_ONCE)
            assert run.most_at_once >= 4
            expected = await plain.check_as_asked(http, requests, run.done())
            unbound = await plain.answers(http, free)
            bound = [index for index, request in enumerate(requests) if request.extra]
            for index in bound:
                assert re.fullmatch(ALLOWED, expected[index].text), expected[index].text
            turned = sum(expected[index].token_ids != unbound[index].token_ids for index in bound)
            assert turned >= REQUESTS // 3, f"vacuous: the grammar changed only {turned} answers"

    asyncio.run(main())


def test_a_prompt_that_is_cached_but_for_its_last_token(
    wanspec: Target, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    """The scheduler lays such a request out as a decode with placeholders, which under a grammar stay until it runs."""
    cached = [prompt[: 2 * BLOCK + 1] for prompt in prompts if len(prompt) > 2 * BLOCK + 1][:4]
    free = [Request(prompt, 24) for prompt in cached]
    requests = free + [replace(one, extra=GRAMMAR) for one in free]

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            for at_once in (1, AT_ONCE):
                run = await run_staggered(client_of(http, wanspec), requests, at_once)
                await plain.check_as_asked(http, requests, run.done())

    asyncio.run(main())
