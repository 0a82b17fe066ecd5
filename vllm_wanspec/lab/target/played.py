"""A target without a model: calls the real proposer as vLLM's model runner does, and takes the time of its calls.

The forward is a sleep, so that other threads run meanwhile, as they do beside a real one. Rows, contexts and the
scheduler's words are those that the proposer looks at in vLLM; nothing else of vLLM is needed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.sim.language import Language
from vllm_wanspec.sim.synthetic import FINGERPRINT

__all__ = ["PlayedTarget", "Proposer", "StepTimes", "Workload", "make_pool", "make_settings"]

LOOKAHEAD_TOKENS = 64
"""So far ahead that the drafter's pace, not this, ends a tree: the largest trees that there are."""

OUTPUT_S = 0.001
"""From `propose` to the taking of the drafts, while the step's tokens go out: frames arrive in it."""


class Proposer(Protocol):
    """What vLLM and the wraps of the model runner call."""

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        """At the start of a step."""

    def propose(self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any) -> list[Any]:
        """After the verification."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What the target does.

    Attributes:
        rows: Requests that run at any time.
        prompt_tokens: Length of a prompt.
        output_tokens: Mean length of an output; a request that has ended is replaced by a new one.
        step_ms: The target's step without tokens...
        token_ms: ...and what each token in it adds.
        limit: Most tokens to verify per row.
        seed: For the lengths of outputs.
    """

    rows: int = 64
    prompt_tokens: int = 300
    output_tokens: int = 200
    step_ms: float = 35.0
    token_ms: float = 0.1
    limit: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step: nanoseconds in the proposer, on the clock and on this thread's processor, and what it yielded.

    What it was held back on purpose is in ``wait_ns``, and not in ``take_ns``.
    Where ``propose_ns + take_ns`` is well above ``cpu_ns``, the thread waited: for a lock, for the interpreter, or for
    the processor.
    """

    begin_ns: int
    propose_ns: int
    take_ns: int
    wait_ns: int
    cpu_ns: int
    decoding: int
    yielded: int
    offered: int


def make_settings(url: str, tree: str = "", late: str | None = None) -> Settings:
    """The default settings with a long lookahead, and with the changes of ``tree`` (see `TreeSettings.overridden`)."""
    settings = Settings.model_validate(
        {
            "draft_endpoints": [{"name": "synthetic", "url": url}],
            "tree": {"lookahead_tokens": LOOKAHEAD_TOKENS},
            **({"late": {"policy": late}} if late else {}),
        }
    )
    return settings.model_copy(update={"tree": settings.tree.overridden(tree)}) if tree else settings


def make_pool(settings: Settings, language: Language, limit: int) -> DraftPool:
    """A pool for targets that speak ``language``; it has not been started."""
    return DraftPool(settings, fingerprint=FINGERPRINT, vocab_size=language.vocab_size, speculation_length=limit)


class _Runner:
    """As much of vLLM's model runner as the proposer sees."""

    def __init__(self, rows: int, max_len: int) -> None:
        self.input_batch = SimpleNamespace(req_ids=[""] * rows)
        self.contexts = np.zeros((rows, max_len), dtype=np.int32)
        self.lengths = np.zeros(rows, dtype=np.int32)
        self.effective_drafter_max_model_len = max_len
        self._draft_token_ids: Any = None

    def take_draft_token_ids(self) -> Any:
        return self._draft_token_ids


class _Request:
    """One row's request; ``draft`` is verified in the next step, ``new`` says that this is its prefill."""

    def __init__(self, name: str, context: list[int], output_tokens: int) -> None:
        self.name = name
        self.context = context
        self.end = len(context) + output_tokens
        self.draft: list[int] = []
        self.new = True


class PlayedTarget:
    """Steps a proposer with a full batch."""

    def __init__(
        self,
        proposer: Proposer,
        language: Language,
        workload: Workload,
        *,
        waited_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Prepare; nothing is called before the first `step`.

        Args:
            proposer: What is measured.
            language: What the target speaks.
            workload: What it does.
            waited_s: How long the proposer has held steps back on purpose so far.
        """
        self._proposer = proposer
        self._waited_s = waited_s
        self._language = language
        self._workload = workload
        self._rng = random.Random(workload.seed)
        self._started = 0
        self._finished: list[str] = []
        self._runner = _Runner(workload.rows, workload.prompt_tokens + 2 * workload.output_tokens + 2 * workload.limit)
        # The first ones end at any time, so that later ones do not all begin in the same step.
        self._requests = [self._request(self._rng.uniform(0.1, 1.25)) for _ in range(workload.rows)]

    def step(self) -> StepTimes:
        """One whole step: scheduling, forward, verification, `propose`, outputs, and the taking of the drafts."""
        runner, proposer = self._runner, self._proposer
        output = self._schedule()
        begin = _timed(proposer.begin_step, runner, output)
        decoding = [not request.new for request in self._requests]
        sampled = self._forward(output.total_num_scheduled_tokens)
        propose = _timed(self._propose, sampled)
        time.sleep(OUTPUT_S)
        waited_s = self._waited_s()
        take = _timed(runner.take_draft_token_ids)
        wait_ns = round((self._waited_s() - waited_s) * 1e9)
        self._take(runner._draft_token_ids)
        return StepTimes(
            begin_ns=begin.wall_ns,
            propose_ns=propose.wall_ns,
            take_ns=take.wall_ns - wait_ns,
            wait_ns=wait_ns,
            cpu_ns=propose.cpu_ns + take.cpu_ns,
            decoding=sum(decoding),
            yielded=sum(len(tokens) for tokens, old in zip(sampled, decoding, strict=True) if old),
            offered=sum(len(request.draft) for request in self._requests),
        )

    def _propose(self, sampled: list[list[int]]) -> None:
        runner = self._runner
        runner._draft_token_ids = self._proposer.propose(sampled, runner.lengths, runner.contexts)

    def _schedule(self) -> SimpleNamespace:
        """What the scheduler says of the step: who came, who went, which drafts are verified."""
        requests = self._requests
        self._runner.input_batch.req_ids = [request.name for request in requests]
        new = [request for request in requests if request.new]
        counts = {r.name: len(r.context) if r.new else 1 + len(r.draft) for r in requests}
        finished, self._finished = set(self._finished), []
        return SimpleNamespace(
            scheduled_new_reqs=[_new_request(request) for request in new],
            finished_req_ids=finished,
            num_spec_tokens_to_schedule=None,
            num_scheduled_tokens=counts,
            total_num_scheduled_tokens=sum(counts.values()),
            scheduled_spec_decode_tokens={r.name: list(r.draft) for r in requests if r.draft},
        )

    def _forward(self, tokens: int) -> list[list[int]]:
        """Verify the drafts, in the time that the target takes for it; the contexts are then those of vLLM."""
        workload, runner = self._workload, self._runner
        ends_s = time.perf_counter() + (workload.step_ms + workload.token_ms * tokens) / 1e3
        sampled = [self._language.verify(request.context, request.draft) for request in self._requests]
        time.sleep(max(0.0, ends_s - time.perf_counter()))
        for row, (request, fresh) in enumerate(zip(self._requests, sampled, strict=True)):
            known = 0 if request.new else len(request.context)
            request.context += fresh
            length = len(request.context)
            runner.contexts[row, known:length] = request.context[known:]
            runner.lengths[row] = length
            request.new = False
        return sampled

    def _take(self, drafts: Sequence[Sequence[int]]) -> None:
        """What the scheduler does with a step's tokens and drafts; a request that ends gives its row to a new one."""
        for row, (request, draft) in enumerate(zip(self._requests, drafts, strict=True)):
            request.draft = list(draft)
            if len(request.context) >= request.end:
                self._finished.append(request.name)
                self._requests[row] = self._request(self._rng.uniform(0.75, 1.25))

    def _request(self, length: float) -> _Request:
        """A new request, whose output is ``length`` times the mean."""
        self._started += 1
        prompt = self._language.prompt(self._started, self._workload.prompt_tokens)
        return _Request(f"request-{self._started}", prompt, round(length * self._workload.output_tokens))


def _new_request(request: _Request) -> SimpleNamespace:
    return SimpleNamespace(
        req_id=request.name,
        prompt_token_ids=list(request.context),
        mm_features=[],
        prompt_embeds=None,
        sampling_params=SimpleNamespace(extra_args=None, temperature=0.0),
    )


@dataclass(frozen=True, slots=True)
class _Timing:
    wall_ns: int
    cpu_ns: int


def _timed(call: Callable[..., object], *arguments: object) -> _Timing:
    """How long a call took, on the clock and on this thread's processor."""
    cpu_ns, began_ns = time.thread_time_ns(), time.perf_counter_ns()
    call(*arguments)
    wall_ns = time.perf_counter_ns() - began_ns
    return _Timing(wall_ns, time.thread_time_ns() - cpu_ns)
