"""In float32 greedy output on a GPU is token for token plain vLLM's, on each model runner and way of scheduling."""

import asyncio

import aiohttp
import pytest
from integration.fleet import Target
from integration.scrape import drafts_decide, is_up, until
from integration.workload import PlainTruth, Request, client_of, run_staggered, vary

from vllm_wanspec.lab.target.gpu_measure import V2_LINE
from vllm_wanspec.lab.target.gpu_plan import BACKENDS, Backend, usable_gpus

from .conftest import GpuHouse

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]

REQUESTS, AT_ONCE = 32, 8
LONGEST_PROMPT = 800
SAMPLED_TOKENS = 20
ACCEPTED, REJECTED = 300, 100
"""Steps are fast on a GPU, where nothing is paced on every runner: fewer drafts come in time."""


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_greedy_requests_batched_with_sampled_ones_are_exact(
    house: GpuHouse, prompt_texts: list[str], backend: Backend, tensor_parallel: int
) -> None:
    if usable_gpus() < tensor_parallel:
        pytest.skip(f"{usable_gpus()} GPU")
    with house.pair(backend, tensor_parallel) as (plain, ours):
        for target in (plain, ours):
            assert (V2_LINE in target.log()) is backend.v2, "not the model runner that was asked for"
        asyncio.run(check(plain, ours, prompt_texts))


async def check(plain: Target, ours: Target, texts: list[str]) -> None:
    async with aiohttp.ClientSession() as http:
        prompts = [(await client_of(http, plain).complete(text, 1)).prompt_ids for text in texts]
        greedy = vary([prompt for prompt in prompts if len(prompt) < LONGEST_PROMPT][:REQUESTS])
        assert len(greedy) == REQUESTS
        sampled = [Request(request.prompt, SAMPLED_TOKENS, temperature=1.0) for request in greedy[::2]]
        mixed = [*greedy, *sampled]
        mixed[1::2], mixed[::2] = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
        await until(lambda: is_up(http, ours, "main"), "the drafter serves the target")
        async with drafts_decide(http, ours, accepted=ACCEPTED, rejected=REJECTED):
            run = await run_staggered(client_of(http, ours), mixed, AT_ONCE)
        assert run.most_at_once >= AT_ONCE // 2
        pairs = [pair for pair in zip(mixed, run.done(), strict=True) if pair[0].temperature == 0.0]
        await PlainTruth(plain).check(http, [request for request, _ in pairs], [got for _, got in pairs])
