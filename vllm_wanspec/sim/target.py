"""The target without a model: calls a proposer as vLLM's model runner does, and takes the time of its calls.

The forward is a sleep, so that other threads run meanwhile, as they do beside a real one. Rows, contexts and the
scheduler's words are those that a proposer looks at in vLLM; nothing else of vLLM is needed.

A `PlayedTarget` owns its requests and its runner; the proposer reads them in its calls, and replaces the drafts that
the runner gives out, as in vLLM. All of it belongs to the thread that steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from vllm_wanspec.sim.models import Language

__all__ = ["PlayedTarget", "Proposer", "Runner", "StepTimes", "Timing", "Workload", "new_request", "scheduled"]

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
class Timing:
    """Nanoseconds, on the clock and on a thread's processor."""

    wall_ns: int
    cpu_ns: int

    def less(self, other: Timing) -> Timing:
        """This without the other."""
        return Timing(self.wall_ns - other.wall_ns, self.cpu_ns - other.cpu_ns)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step: nanoseconds in the proposer, on the clock and on this thread's processor, and what it yielded.

    What it was held back on purpose is in ``wait_ns``, and not in ``take_ns``.
    Where ``begin_ns + propose_ns + take_ns`` is well above ``cpu_ns``, the thread waited: for a lock, for the
    interpreter, or for the processor.
    """

    begin_ns: int
    propose_ns: int
    take_ns: int
    wait_ns: int
    cpu_ns: int
    decoding: int
    yielded: int
    offered: int


class Runner:
    """As much of vLLM's model runner as a proposer sees."""

    def __init__(self, rows: int, max_len: int) -> None:
        """Have room for ``rows`` contexts of ``max_len`` tokens."""
        self.input_batch = SimpleNamespace(req_ids=[""] * rows)
        self.contexts = np.zeros((rows, max_len), dtype=np.int32)
        self.lengths = np.zeros(rows, dtype=np.int32)
        self.effective_drafter_max_model_len = max_len
        self._draft_token_ids: Any = None

    def take_draft_token_ids(self) -> Any:
        """The drafts of the last `Proposer.propose`, as they are by now."""
        return self._draft_token_ids

    def hold(self, row: int, context: Sequence[int], known: int = 0) -> None:
        """Have a row's context in place, of which so many tokens are there already."""
        length = len(context)
        self.contexts[row, known:length] = context[known:]
        self.lengths[row] = length


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
        off_clock: Callable[[], Timing] = lambda: Timing(0, 0),
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare; nothing is called before the first `step`.

        Args:
            proposer: What is measured.
            language: What the target speaks.
            workload: What it does.
            waited_s: How long the proposer has held steps back on purpose so far.
            off_clock: How long it has been about what it only plays so far, which is not measured.
            clock: Seconds, monotonic.
            sleep: Lets so many of them pass.
        """
        self._proposer = proposer
        self._waited_s = waited_s
        self._off_clock = off_clock
        self._clock = clock
        self._sleep = sleep
        self._language = language
        self._workload = workload
        self._rng = random.Random(workload.seed)
        self._started = 0
        self._finished: list[str] = []
        longest = workload.prompt_tokens + 2 * workload.output_tokens + 2 * workload.limit
        self._runner = Runner(workload.rows, longest)
        # The first ones end at any time, so that later ones do not all begin in the same step.
        self._requests = [self._request(self._rng.uniform(0.1, 1.25)) for _ in range(workload.rows)]

    def step(self) -> StepTimes:
        """One whole step: scheduling, forward, verification, `propose`, outputs, and the taking of the drafts."""
        runner, proposer = self._runner, self._proposer
        output = self._schedule()
        off = self._off_clock()
        begin = _timed(proposer.begin_step, runner, output).less(self._off_clock().less(off))
        for request, draft in zip(self._requests, self._drafts([r.draft for r in self._requests]), strict=True):
            request.draft = draft
        offered = sum(len(request.draft) for request in self._requests)
        decoding = [not request.new for request in self._requests]
        sampled = self._forward(output.total_num_scheduled_tokens)
        propose = _timed(self._propose, sampled)
        self._sleep(OUTPUT_S)
        waited_s = self._waited_s()
        take = _timed(runner.take_draft_token_ids)
        wait_ns = round((self._waited_s() - waited_s) * 1e9)
        self._take(runner._draft_token_ids)
        return StepTimes(
            begin_ns=begin.wall_ns,
            propose_ns=propose.wall_ns,
            take_ns=take.wall_ns - wait_ns,
            wait_ns=wait_ns,
            cpu_ns=begin.cpu_ns + propose.cpu_ns + take.cpu_ns,
            decoding=sum(decoding),
            yielded=sum(len(tokens) for tokens, old in zip(sampled, decoding, strict=True) if old),
            offered=offered,
        )

    def _drafts(self, laid_out: Sequence[list[int]]) -> Sequence[list[int]]:
        """What is verified in a step, of what the scheduler has laid out per row: by default that."""
        return laid_out

    def _propose(self, sampled: list[list[int]]) -> None:
        runner = self._runner
        runner._draft_token_ids = self._proposer.propose(sampled, runner.lengths, runner.contexts)

    def _schedule(self) -> SimpleNamespace:
        """What the scheduler says of the step: who came, who went, which drafts are verified."""
        requests = self._requests
        self._runner.input_batch.req_ids = [request.name for request in requests]
        new = [new_request(request.name, list(request.context)) for request in requests if request.new]
        counts = {r.name: len(r.context) if r.new else 1 + len(r.draft) for r in requests}
        finished, self._finished = set(self._finished), []
        return scheduled(new, finished, counts, {r.name: list(r.draft) for r in requests if r.draft})

    def _forward(self, tokens: int) -> list[list[int]]:
        """Verify the drafts, in the time that the target takes for it; the contexts are then those of vLLM."""
        workload, runner = self._workload, self._runner
        ends_s = self._clock() + (workload.step_ms + workload.token_ms * tokens) / 1e3
        sampled = [self._language.verify(request.context, request.draft) for request in self._requests]
        self._sleep(max(0.0, ends_s - self._clock()))
        for row, (request, fresh) in enumerate(zip(self._requests, sampled, strict=True)):
            known = 0 if request.new else len(request.context)
            request.context += fresh
            runner.hold(row, request.context, known)
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


def new_request(name: str, prompt: list[int] | None, **changes: Any) -> SimpleNamespace:
    """What the scheduler says of a new request, as far as a proposer looks."""
    values = {
        "req_id": name,
        "prompt_token_ids": prompt,
        "mm_features": [],
        "prompt_embeds": None,
        "prefill_token_ids": prompt,
        "sampling_params": SimpleNamespace(extra_args=None, temperature=0.0),
    }
    return SimpleNamespace(**{**values, **changes})


def scheduled(
    new: Sequence[SimpleNamespace],
    finished: set[str],
    counts: Mapping[str, int],
    drafts: Mapping[str, list[int]],
    limit: int | None = None,
) -> SimpleNamespace:
    """What the scheduler says of a step, as far as a proposer looks.

    Args:
        new: Requests that begin; see `new_request`.
        finished: Names of those that have gone since the last step.
        counts: Tokens in the step, by request.
        drafts: Those among them that are drafted.
        limit: Most drafted tokens per request of the next step, where the scheduler says so.
    """
    return SimpleNamespace(
        scheduled_new_reqs=list(new),
        finished_req_ids=finished,
        preempted_req_ids=None,
        has_structured_output_requests=False,
        num_spec_tokens_to_schedule=limit,
        num_scheduled_tokens=dict(counts),
        total_num_scheduled_tokens=sum(counts.values()),
        scheduled_spec_decode_tokens=dict(drafts),
    )


def _timed(call: Callable[..., object], *arguments: object) -> Timing:
    """How long a call took, on the clock and on this thread's processor."""
    cpu_ns, began_ns = time.thread_time_ns(), time.perf_counter_ns()
    call(*arguments)
    wall_ns = time.perf_counter_ns() - began_ns
    return Timing(wall_ns, time.thread_time_ns() - cpu_ns)
