"""What a request asks of vLLM's sampler acts on drafted rows as on others."""

import asyncio
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from .fleet import EACH_RUNNER, MODEL_NAME, V1, Target
from .scrape import drafts_decide, is_up, until
from .workload import PlainTruth, Request, client_of, run_staggered

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), EACH_RUNNER]

ASKED: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"bad_words": [" self", " return", " the"]},
    {"logprobs": 2},
]
BIASED = {"logit_bias": {str(token): -4.0 for token in range(200, 400)}}
"""vLLM refuses it on V1 where there is any speculation."""
REQUESTS = 24
AT_ONCE = 6
LONGEST_PROMPT = 600
LOGPROBS_TOKENS = 48


def test_greedy_requests_with_parameters_are_exact(
    wanspec: Target, runner: str, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    asked = ASKED if runner == V1 else [*ASKED, BIASED]
    chosen = [prompt for prompt in prompts if 60 < len(prompt) < LONGEST_PROMPT][-REQUESTS:]
    free = [Request(prompt, 64 + 8 * (index % 5)) for index, prompt in enumerate(chosen)]
    requests = [replace(one, extra=asked[index % len(asked)]) for index, one in enumerate(free)]

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, wanspec, "main"), "the drafter serves the target")
            async with drafts_decide(http, wanspec, accepted=300, rejected=300):
                run = await run_staggered(client_of(http, wanspec), requests, AT_ONCE)
            expected = await plain.check_as_asked(http, requests, run.done())
            unasked = await plain.answers(http, free)
            for extra in asked[1:-1] if runner == V1 else [*asked[1:-2], BIASED]:  # all but the log-probabilities
                turned = [
                    one.token_ids != other.token_ids
                    for one, other, request in zip(expected, unasked, requests, strict=True)
                    if request.extra is extra
                ]
                assert sum(turned) >= len(turned) // 2, f"vacuous: {extra} changed {sum(turned)} of {len(turned)}"

    asyncio.run(main())


def test_log_probabilities_are_those_of_the_tokens(
    wanspec: Target, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    prompt = next(prompt for prompt in prompts if 100 < len(prompt) < LONGEST_PROMPT)
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": LOGPROBS_TOKENS, "temperature": 0.0, "logprobs": 2}
    body["ignore_eos"] = True

    async def answer(http: aiohttp.ClientSession, target: Target) -> dict[str, Any]:
        async with http.post(target.url + "/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            found: dict[str, Any] = (await response.json())["choices"][0]["logprobs"]
        return found

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, wanspec, "main"), "the drafter serves the target")
            ours, stock = await answer(http, wanspec), await answer(http, plain.target)
        assert ours["tokens"] == stock["tokens"]
        assert len(ours["tokens"]) == LOGPROBS_TOKENS
        assert ours["token_logprobs"] == pytest.approx(stock["token_logprobs"], abs=1e-3)
        for one, other in zip(ours["top_logprobs"], stock["top_logprobs"], strict=True):
            assert one == pytest.approx(other, abs=1e-3)

    asyncio.run(main())
