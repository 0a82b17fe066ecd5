"""Draft engines: where a drafter's tokens come from. Here: the vLLM engine of the same server."""

import itertools
from collections.abc import AsyncGenerator, Sequence
from operator import itemgetter
from typing import Any, Protocol

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.policy.expansion import entropy_nats

TOP_K = 8
_LOGPROB = itemgetter(1)


class DraftEngine(Protocol):
    """Continues contexts greedily."""

    def draft(self, tokens: Sequence[int], max_tokens: int) -> AsyncGenerator[list[DraftStep], None]:
        """Stream the greedy continuation of ``tokens``, at most ``max_tokens`` tokens; closing it aborts."""
        ...


class VllmEngine:
    """The vLLM engine behind an engine client."""

    def __init__(self, engine_client: Any, top_k: int = TOP_K) -> None:
        """Draft with ``engine_client``; ``top_k`` probable tokens are known at each position."""
        self._client = engine_client
        self._top_k = top_k
        self._ids = itertools.count(1)

    async def draft(self, tokens: Sequence[int], max_tokens: int) -> AsyncGenerator[list[DraftStep], None]:
        """Stream the greedy continuation; see `DraftEngine`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            logprobs=self._top_k,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        # In vLLM's own form, "type" included: any other goes through a thread pool first, at every start.
        prompt = {"type": "token", "prompt_token_ids": list(tokens)}
        async for output in self._client.generate(prompt, params, f"wanspec-{next(self._ids)}"):
            completion = output.outputs[0]
            if completion.token_ids:
                yield [_step(completion, index) for index in range(len(completion.token_ids))]


def draft_step(token: int, ids: Sequence[int], logprobs: Sequence[float]) -> DraftStep:
    """One position as vLLM gives it: the sampled token first, then once more if it is among the most probable ones."""
    others = [item for item in zip(ids[1:], logprobs[1:], strict=True) if item[0] != token]
    others.sort(key=_LOGPROB, reverse=True)
    known = logprobs if len(others) == len(ids) - 1 else logprobs[1:]
    return DraftStep(token, logprobs[0], entropy_nats(known), tuple(others))


def _step(completion: Any, index: int) -> DraftStep:
    """One position of a vLLM completion with flat log-probabilities."""
    flat = completion.logprobs
    begin, end = flat.start_indices[index], flat.end_indices[index]
    return draft_step(completion.token_ids[index], flat.token_ids[begin:end], flat.logprobs[begin:end])
