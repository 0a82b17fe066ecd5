"""Greedy output is token for token plain vLLM's, alone and batched with sampled requests."""

import asyncio

import aiohttp
import pytest

from .fleet import ASYNC, EACH_RUNNER, MRV2, V1, Target
from .scrape import LEAST_ACCEPTED, drafts_decide, each_is_somebody_s, is_up, until
from .workload import PlainTruth, Request, client_of, run_staggered, vary

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), EACH_RUNNER]

REQUESTS = 32
AT_ONCE = 6
LONGEST_PROMPT = 800
SAMPLED_TOKENS = 20
SAYS = {
    V1: "remote drafting on the V1 model runner, as vLLM chooses (Model Runner V2 needs Triton",
    MRV2: "remote drafting on Model Runner V2 with no async scheduling, by VLLM_USE_V2_MODEL_RUNNER=1",
    ASYNC: "remote drafting on Model Runner V2 with async scheduling, by VLLM_USE_V2_MODEL_RUNNER=1",
}


def test_staggered_greedy_requests_are_exact(
    wanspec: Target, runner: str, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    chosen = [prompt for prompt in prompts if len(prompt) < LONGEST_PROMPT][:REQUESTS]
    assert len(chosen) == REQUESTS and len({len(prompt) for prompt in chosen}) > REQUESTS // 2
    requests = vary(chosen)
    assert SAYS[runner] in wanspec.log()

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, wanspec, "main"), "the drafter serves the target")
            async with drafts_decide(http, wanspec), each_is_somebody_s(http, wanspec, runner == ASYNC):
                run = await run_staggered(client_of(http, wanspec), requests, AT_ONCE)
            assert run.most_at_once >= 4
            await plain.check(http, requests, run.done())

    asyncio.run(main())


def test_greedy_requests_batched_with_sampled_ones_are_exact(
    wanspec: Target, runner: str, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    greedy = vary([prompt for prompt in prompts if len(prompt) < LONGEST_PROMPT][:REQUESTS])
    sampled = [Request(request.prompt, SAMPLED_TOKENS, temperature=1.0) for request in greedy[::2]]
    # Sampled requests cannot accept more drafts than they have tokens: the rest of the bound is the greedy ones'.
    sampled_tokens = SAMPLED_TOKENS * len(sampled)
    mixed = [r for index, one in enumerate(greedy) for r in ([sampled[index // 2], one] if index % 2 == 0 else [one])]

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, wanspec, "main"), "the drafter serves the target")
            async with (
                drafts_decide(http, wanspec, accepted=LEAST_ACCEPTED + sampled_tokens),
                each_is_somebody_s(http, wanspec, runner == ASYNC),
            ):
                run = await run_staggered(client_of(http, wanspec), mixed, 8)
            pairs = list(zip(mixed, run.done(), strict=True))
            await plain.check(http, greedy, [got for request, got in pairs if request.temperature == 0.0])
            plainly = await plain.answers(http, [Request(r.prompt, r.max_tokens) for r in sampled])
            texts = [got.token_ids for request, got in pairs if request.temperature > 0.0]
            assert sum(a != b.token_ids for a, b in zip(texts, plainly, strict=True)) > len(sampled) // 2

    asyncio.run(main())
