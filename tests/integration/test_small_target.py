"""A target in tight straits (little KV cache, small prefill chunks, short contexts) stays exact."""

import asyncio

import aiohttp
import pytest

from vllm_wanspec.lab.harness.client import Completion

from .fleet import ASYNC, CHUNK, CONTEXT_LIMIT, EACH_RUNNER, MODEL_NAME, SPECULATIVE_TOKENS, Target
from .peers import Peers
from .scrape import drafts_decide, is_up, until, vllm_page, wanspec_page
from .workload import PlainTruth, Request, client_of, run_staggered, send

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), EACH_RUNNER]

AT_ONCE = 8
LEAVING_TOKENS = 96
OPT_OUT = {"vllm_xargs": {"wanspec": "off"}}


def cut(prompts: list[tuple[int, ...]], count: int, begin: int = 0) -> list[tuple[int, ...]]:
    """Different beginnings of prompts, 100 to 160 tokens long."""
    long = [prompt for prompt in prompts if len(prompt) >= 100][begin : begin + count]
    assert len(long) == count
    return [prompt[: 100 + 12 * (index % 6)] for index, prompt in enumerate(long)]


async def total(http: aiohttp.ClientSession, target: Target, name: str, **labels: str) -> float:
    return (await vllm_page(http, target)).get(name, **labels)


def test_chunked_prefill_and_preemption(small: Target, plain: PlainTruth, prompts: list[tuple[int, ...]]) -> None:
    requests = [Request(prompt, 96 - 8 * (index % 5)) for index, prompt in enumerate(cut(prompts, 32))]
    # Backwards, so that none of it is in cached blocks.
    longest = next(prompt[::-1] for prompt in prompts if len(prompt) > 3 * CHUNK)[: 3 * CHUNK]

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, small, "good"), "the good drafter serves the target")
            client = client_of(http, small)
            computed = "vllm:request_prefill_kv_computed_tokens_sum"
            before = await total(http, small, computed)
            alone = await send(client, Request(longest, 32))
            # No step may take more than CHUNK tokens, so these were computed in several.
            assert await total(http, small, computed) - before > 2 * CHUNK
            assert f"max_num_batched_tokens={CHUNK}" in small.log()
            await plain.check(http, [Request(longest, 32)], [alone])

            before = await total(http, small, "vllm:num_preemptions_total")
            async with drafts_decide(http, small):
                run = await run_staggered(client, requests, AT_ONCE)
            preemptions = await total(http, small, "vllm:num_preemptions_total") - before
            print(f"{preemptions:.0f} preemptions")
            assert preemptions >= 3
            assert run.most_at_once >= 4
            await plain.check(http, requests, run.done())

    asyncio.run(main())


def test_requests_that_end_at_max_model_len(
    small: Target, runner: str, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    """One that comes close to the limit must not switch drafts off for the others, nor have them verify rubbish."""
    chosen = cut(prompts, 30, begin=4)
    requests = [Request(prompt, CONTEXT_LIMIT - len(prompt)) for prompt in chosen]

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, small, "good"), "the good drafter serves the target")
            drafted = await total(http, small, "vllm:spec_decode_num_draft_tokens_total")
            preempted = await total(http, small, "vllm:num_preemptions_total")
            offered = (await wanspec_page(http, small)).get("wanspec_offered_tokens_total")
            async with drafts_decide(http, small):
                run = await run_staggered(client_of(http, small), requests, AT_ONCE)
            drafted = await total(http, small, "vllm:spec_decode_num_draft_tokens_total") - drafted
            offered = (await wanspec_page(http, small)).get("wanspec_offered_tokens_total") - offered
            assert run.most_at_once >= 4
            preempted = await total(http, small, "vllm:num_preemptions_total") - preempted
            # vLLM pads the row of a request that comes back from its cached blocks.
            padding = SPECULATIVE_TOKENS * preempted
            if runner != ASYNC:  # whose steps have room for drafts before there are any
                assert drafted <= offered + padding, "the target verified tokens that no drafter drafted"
            for completion in run.done():
                assert len(completion.prompt_ids) + len(completion.token_ids) == CONTEXT_LIMIT
                assert completion.finish_reason == "length"
            await plain.check(http, requests, run.done())

    asyncio.run(main())


def test_two_choices_per_request(
    small: Target, peers: Peers, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    """vLLM takes n = 2 only with sampling; sampling among one token is greedy, and goes the way of sampling."""
    requests = [Request(prompt, 96) for prompt in cut(prompts, 26, begin=8)]

    async def choices(http: aiohttp.ClientSession, request: Request) -> list[Completion]:
        body = {"model": MODEL_NAME, "prompt": request.prompt, "max_tokens": request.max_tokens, "n": 2}
        body |= {"temperature": 1.0, "top_k": 1, "ignore_eos": True, "return_token_ids": True}
        async with http.post(small.url + "/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            answer = await response.json()
        return [Completion(request.prompt, tuple(c["token_ids"]), "", 0.0, 0.0, None) for c in answer["choices"]]

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, small, "good"), "the good drafter serves the target")
            async with drafts_decide(http, small):
                pairs = await asyncio.gather(*(choices(http, request) for request in requests))
            assert all(len(pair) == 2 for pair in pairs)
            assert all(len(peers.relay.opened_for(request.prompt)) >= 2 for request in requests)
            await plain.check(http, [r for r in requests for _ in range(2)], [c for pair in pairs for c in pair])

    asyncio.run(main())


async def leave(http: aiohttp.ClientSession, target: Target, request: Request) -> None:
    """Send a request, and hang up once its first tokens are there."""
    began = asyncio.Event()
    complete = client_of(http, target).complete
    task = asyncio.create_task(
        complete(request.prompt, request.max_tokens, ignore_eos=True, on_text=lambda *_: began.set())
    )
    await began.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


def test_clients_that_leave_in_mid_stream(
    small: Target, peers: Peers, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    everything = cut(prompts, 36, begin=13)
    leaving = [Request(prompt, LEAVING_TOKENS) for prompt in everything[:4]]
    staying = [Request(prompt, 96 - 8 * (index % 5)) for index, prompt in enumerate(everything[4:])]

    async def all_closed() -> bool:
        opened = [one for request in leaving for one in peers.relay.opened_for(request.prompt)]
        return bool(opened) and all(one.session in peers.relay.closed for one in opened)

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, small, "good"), "the good drafter serves the target")
            generated = await total(http, small, "vllm:generation_tokens_total")
            async with drafts_decide(http, small), asyncio.timeout(240):
                others = asyncio.create_task(run_staggered(client_of(http, small), staying, 4))
                await asyncio.gather(*(leave(http, small, request) for request in leaving[:3]))
                run = await others
                # Nothing else keeps the engine going now: it must still notice.
                await leave(http, small, leaving[3])
            await until(all_closed, "the drafter is told of all requests that ended")
            generated = await total(http, small, "vllm:generation_tokens_total") - generated
            assert generated < run.tokens + len(leaving) * LEAVING_TOKENS / 2, "requests ran on without their clients"
            assert all(peers.relay.opened_for(request.prompt) for request in leaving)
            assert peers.relay.open_now() == []
            await plain.check(http, staying, run.done())

    asyncio.run(main())


def test_requests_that_opt_out(
    small: Target, runner: str, peers: Peers, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    chosen = cut(prompts, 40)
    requests = [Request(p, 96 - 8 * (i % 5), extra=OPT_OUT if i % 6 == 0 else {}) for i, p in enumerate(chosen)]
    alone = Request(prompts[0][:90], 40, extra=OPT_OUT)

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, small, "good"), "the good drafter serves the target")
            before = await total(http, small, "vllm:spec_decode_num_draft_tokens_total")
            undrafted = await send(client_of(http, small), alone)
            verified = await total(http, small, "vllm:spec_decode_num_draft_tokens_total") - before
            assert verified <= (2 * SPECULATIVE_TOKENS if runner == ASYNC else 0)  # laid out before we are asked
            begin = len(peers.relay.opened)
            async with drafts_decide(http, small):
                run = await run_staggered(client_of(http, small), requests, AT_ONCE)
            opened = {message.tokens for message in peers.relay.opened[begin:]}
            assert not any(r.prompt in opened for r in requests if r.extra)
            assert all(r.prompt in opened for r in requests if not r.extra)
            await plain.check(http, [alone, *requests], [undrafted, *run.done()])

    asyncio.run(main())
