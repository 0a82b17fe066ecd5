"""The vLLM engine as a draft engine: what is asked of the client, and what is read from its outputs."""

import asyncio
import math
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.drafter.engines import VllmEngine, _step


def completion(positions: list[tuple[int, dict[int, float]]]) -> SimpleNamespace:
    """A completion with flat log-probabilities: per position the token and the probabilities of the best."""
    flat = SimpleNamespace(start_indices=[], end_indices=[], token_ids=[], logprobs=[])
    for _, ranked in positions:
        flat.start_indices.append(len(flat.token_ids))
        flat.token_ids += list(ranked)
        flat.logprobs += [math.log(p) for p in ranked.values()]
        flat.end_indices.append(len(flat.token_ids))
    return SimpleNamespace(token_ids=[token for token, _ in positions], logprobs=flat)


def test_a_step_is_the_token_the_entropy_and_the_others_in_order() -> None:
    # As vLLM gives it: the sampled token first, then the ranked ones, the sampled one among them or not.
    step = _step(completion([(7, {7: 0.5, 9: 0.125, 8: 0.25})]), 0)
    assert step.token == 7
    assert step.logprob == math.log(0.5)
    assert [token for token, _ in step.alternatives] == [8, 9]
    assert step.entropy_nats == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(4) + 0.125 * math.log(8) * 2)


def test_each_position_has_its_own_figures() -> None:
    both = completion([(1, {1: 0.9, 2: 0.1}), (5, {5: 0.6, 6: 0.4})])
    assert [_step(both, index).token for index in (0, 1)] == [1, 5]
    assert _step(both, 1).alternatives == ((6, math.log(0.4)),)


class FakeClient:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, str]] = []
        self.aborted = 0

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        self.calls.append((prompt, params, request_id))
        try:
            yield SimpleNamespace(outputs=[completion([])])
            for token in range(10):
                await asyncio.sleep(0)
                yield SimpleNamespace(outputs=[completion([(token, {token: 0.75, 20: 0.25})])])
        except GeneratorExit:
            self.aborted += 1
            raise


@pytest.mark.vllm
def test_what_is_asked_of_vllm() -> None:
    from vllm.sampling_params import RequestOutputKind

    client = FakeClient()
    engine = VllmEngine(client)

    async def run() -> list[DraftStep]:
        return [step async for steps in engine.draft((1, 2, 3), 10) for step in steps]

    steps = asyncio.run(run())
    assert [step.token for step in steps] == list(range(10))
    [(prompt, params, request_id)] = client.calls
    assert prompt["prompt_token_ids"] == [1, 2, 3]
    assert (params.temperature, params.max_tokens, params.logprobs) == (0.0, 10, 8)
    assert params.flat_logprobs
    assert params.ignore_eos
    assert not params.detokenize
    assert params.output_kind is RequestOutputKind.DELTA
    assert request_id.startswith("wanspec-")


@pytest.mark.vllm
def test_requests_have_different_ids() -> None:
    client = FakeClient()
    engine = VllmEngine(client)

    async def run() -> None:
        for _ in range(3):
            async for _ in engine.draft((1,), 1):
                pass

    asyncio.run(run())
    assert len({request_id for _, _, request_id in client.calls}) == 3


@pytest.mark.vllm
def test_vllm_s_own_flat_log_probabilities_fit() -> None:
    from vllm.logprobs import FlatLogprobs, Logprob

    flat = FlatLogprobs()
    flat.append({4: Logprob(-0.1, 1, None), 6: Logprob(-3.0, 2, None)})
    flat.append({9: Logprob(-0.2, 1, None), 8: Logprob(-2.0, 2, None)})
    given = SimpleNamespace(token_ids=[4, 9], logprobs=flat)
    assert _step(given, 1).alternatives == ((8, -2.0),)
    assert _step(given, 0).logprob == -0.1
