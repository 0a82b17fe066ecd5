"""RemoteDrafts: what Model Runner V2 is told by us in each step, and what we learn from it.

The model runner's thread lays a step out: requests go and come, drafts are bound when its inputs are prepared. Its
output comes later, with async scheduling after the next step has been laid out, and on a thread of its own. Nothing
here waits on the network, and nothing that goes wrong may raise: what is in doubt is a step without drafts.

A `Step` is made when drafts are bound, goes with the step's output, and is read where that output is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_wanspec.controller.requests import Requests, tokens_and_drafts
from vllm_wanspec.core.block import Walked
from vllm_wanspec.core.learned.meter import Began

Wish = Mapping[str, int]
"""How many drafts each request should have room for in the step to come, by request."""


Told = Callable[[], list[Walked]]
"""Gives, once the step's output is there, what each row's draft was."""


class Binding(Protocol):
    """Writes the drafts of a batch where the runner reads them."""

    def bind(self, requests: Sequence[str], slots: Any, placed: Sequence[Sequence[int]], fixed: bool) -> Told | None:
        """Write drafts for the rows of a step.

        Args:
            requests: Per row the request.
            slots: Per row its slot, an integer array.
            placed: Per row what the scheduler has laid out: drafts or placeholders, as many as are verified.
            fixed: Whether other drafts than those that the scheduler has must not be verified.

        Returns:
            None where the pool knows already what the drafts are.
        """


@dataclass(slots=True)
class Step:
    """One step, from when it is laid out until its output is there.

    Attributes:
        requests: Per row.
        lengths: Per row how many drafts are verified.
        began: What the pool's meter knows of its beginning.
        told: See `Binding.bind`.
    """

    requests: list[str]
    lengths: list[int]
    began: Began | None
    told: Told | None = None


class RemoteDrafts:
    """One model runner's drafts, on one tensor-parallel rank.

    Attributes:
        warming_up: Whether the requests that come are vLLM's own, made to warm its kernels up.
    """

    def __init__(
        self,
        requests: Requests | None,
        binding: Binding | None,
        limit: int,
        *,
        share: Callable[[Any], None] | None = None,
        wishes: bool = False,
        uniform: bool = False,
    ) -> None:
        """Begin without requests.

        Args:
            requests: The target's; None on other ranks than the first.
            binding: How drafts are bound; None on other ranks than the first.
            limit: Most tokens to draft per request and step.
            share: Gives the first rank's drafts of some slots to the others, called on all ranks; None for one rank.
            wishes: Whether steps are laid out before what comes before them is known (async scheduling), so that the
                scheduler must be told how many drafts to expect.
            uniform: Whether all rows of a step should have room for as many drafts, or none.
        """
        self.warming_up = False
        self._requests = requests
        self._binding = binding
        self._limit = limit
        self._share = share
        self._wishes = wishes
        self._uniform = uniform
        self._step: Step | None = None
        self._early: tuple[list[str], Told | None] | None = None
        self._decoding: list[str] = []

    # Requests go and come.

    def finished(self, scheduler_output: Any) -> None:
        """Before the runner frees the slots of requests that have finished or are preempted."""
        requests = self._serving()
        if requests is None:
            return
        try:
            for request in scheduler_output.preempted_req_ids or ():
                requests.pool.place(request, None)
            requests.begin(scheduler_output.finished_req_ids, [])
        except Exception as error:
            requests.fail(error)

    def added(self, scheduler_output: Any, slots: Mapping[str, int]) -> None:
        """After the runner has given slots to new requests, those among them that come back from a preemption.

        Args:
            scheduler_output: The step's.
            slots: By request.
        """
        requests = self._serving()
        if requests is None:
            return
        try:
            new = []
            for request in scheduler_output.scheduled_new_reqs:
                context = request.prefill_token_ids
                if context is None or not self._goes_on(requests, request.req_id, context):
                    new.append((request, context))
            requests.begin([request.req_id for request, _ in new], new)
            for request in scheduler_output.scheduled_new_reqs:
                requests.pool.place(request.req_id, slots.get(request.req_id))
        except Exception as error:
            requests.fail(error)

    @staticmethod
    def _goes_on(requests: Requests, request: str, context: Sequence[int]) -> bool:
        """Whether a request that comes has a session already, and the text that the session knows."""
        known = requests.pool.context(request)
        return known is not None and known == context

    # A step.

    def bind(self, scheduler_output: Any, requests: list[str], slots: Any) -> None:
        """Right before the runner prepares a step's inputs: the last moment at which its drafts can change.

        Args:
            scheduler_output: The step's.
            requests: Per row the request, in the runner's order.
            slots: Per row its slot, an integer array.
        """
        by_request = scheduler_output.scheduled_spec_decode_tokens
        placed = [by_request.get(request, ()) for request in requests]
        early, self._early = self._early, None
        serving = self._serving()
        step = self._step = Step(requests, list(map(len, placed)), None)
        try:
            if serving is not None:
                step.began = serving.pool.step_begins(*tokens_and_drafts(scheduler_output))
                if early is not None:
                    step.told = _reordered(early, requests)
                elif by_request and self._binding is not None:
                    fixed = bool(scheduler_output.has_structured_output_requests)
                    step.told = self._binding.bind(requests, slots, placed, fixed)
        except Exception as error:
            self._fail(error)
        # That the ranks share what is in the slots follows from what all of them know, whatever went wrong on one.
        if by_request and early is None and self._share is not None:
            self._share(slots)

    def bind_early(self, requests: list[str], slots: Any) -> None:
        """Bind the next step's drafts at once, where the grammar of some of these requests is held against them.

        Does nothing where the scheduler gets the drafts in time for that.
        """
        if not self._wishes:
            return
        self._early = (requests, None)
        try:
            if self._serving() is not None and self._binding is not None:
                placed = [(PLACEHOLDER,) * self._limit] * len(requests)
                self._early = (requests, self._binding.bind(requests, slots, placed, fixed=False))
        except Exception as error:
            self._fail(error)
        if self._share is not None:
            self._share(slots)

    def take_step(self) -> Step | None:
        """The step that has been bound last, for its output; once."""
        step, self._step = self._step, None
        return step

    def ended(self, step: Step, sampled: Sequence[Sequence[int]]) -> Wish | None:
        """A step's output is there: commit it.

        Args:
            step: As `take_step` gave it.
            sampled: Per row the tokens that it yielded; none for rows still in prefill.

        Returns:
            What is wished of the step after the next; None where steps are laid out in time.
        """
        requests = self._serving()
        if requests is None:
            return self._none_wished(step)
        try:
            rows = list(zip(step.requests, sampled, strict=True))
            requests.end_where_apart(rows)
            told = [] if step.told is None else _cut(step.told(), step.lengths)
            requests.pool.step(rows, told, step.began)
            self._decoding = [request for request, tokens in rows if tokens]
            if not self._wishes:
                return None
            lengths = requests.pool.lengths(self._decoding, self._limit, uniform=self._uniform)
            return dict(zip(self._decoding, lengths, strict=True))
        except Exception as error:
            self._fail(error)
            return self._none_wished(step)

    def _none_wished(self, step: Step) -> Wish | None:
        """No drafts after a fault of ours; nothing is said on other ranks, and while kernels are warmed up."""
        failed = self._requests is not None and self._requests.failed
        return dict.fromkeys(step.requests, 0) if failed and self._wishes else None

    def laid_out(self, requests: Sequence[str]) -> list[list[int]] | None:
        """The drafts that the scheduler gets after a step's output.

        Args:
            requests: Per row the request.

        Returns:
            Per row its draft; None where the scheduler must keep what it has.
        """
        if self._requests is None:
            return None
        try:
            if self._wishes:
                told = None if self._early is None else self._early[1]
                # Lists of their own: vLLM changes them in place.
                return None if told is None else [list(walked.tokens) for walked in told()]
            serving = self._serving()
            if serving is None:
                return [[] for _ in requests]
            decoding = set(self._decoding)
            rows = [request if request in decoding else None for request in requests]
            return serving.without_apart(serving.pool.draft(rows, self._limit))
        except Exception as error:
            self._fail(error)
            return [[] for _ in requests]

    def _serving(self) -> Requests | None:
        requests = self._requests
        return None if requests is None or requests.failed or self.warming_up else requests

    def _fail(self, error: Exception) -> None:
        if self._requests is not None:
            self._requests.fail(error)


PLACEHOLDER = -1


def _cut(told: Sequence[Walked], lengths: Sequence[int]) -> list[Walked]:
    """Drafts, as much of them as was verified."""
    return [
        walked if len(walked.tokens) <= length else _shortened(walked, length)
        for walked, length in zip(told, lengths, strict=True)
    ]


def _shortened(walked: Walked, length: int) -> Walked:
    tokens, looked_up = walked
    return Walked(tokens[:length], max(0, looked_up - (len(tokens) - length)))


def _reordered(early: tuple[list[str], Told | None], requests: Sequence[str]) -> Told | None:
    """What was told of drafts that were bound for the rows of another order."""
    before, told = early
    if told is None:
        return None

    def again() -> list[Walked]:
        known = dict(zip(before, told(), strict=True))
        return [known.get(request, NOTHING) for request in requests]

    return again


NOTHING = Walked([], 0)
