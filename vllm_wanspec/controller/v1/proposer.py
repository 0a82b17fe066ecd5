"""RemoteProposer: vLLM's custom proposer contract on top of the pool.

vLLM builds it in the model-runner process and calls `propose` once per step, in the serving path: nothing here waits
on the network, and nothing that goes wrong may raise, since an exception there ends the engine.
"""

from typing import Any

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.controller.requests import Requests, tokens_and_drafts
from vllm_wanspec.controller.service import read_settings, start_requests
from vllm_wanspec.controller.v1 import hooks
from vllm_wanspec.core.messages import MAX_COMMIT_TOKENS

NONE: list[int] = []
"""Of a row that yields nothing for a session; not to be changed."""


class RemoteProposer:
    """Takes drafts from remote drafters; named by ``--speculative-config`` as ``vllm_wanspec.RemoteProposer``."""

    def __init__(self, vllm_config: Any) -> None:
        """Read the configuration and connect, on tensor-parallel rank 0 alone.

        Raises:
            ConfigError: The configuration file is missing or wrong.
            UnsupportedError: This vLLM, or the way it is used, does not go with remote drafting.
        """
        hooks.install_in_engine()
        settings, limit = read_settings(vllm_config)
        self._set_up(start_requests(vllm_config, settings, limit), limit)

    @classmethod
    def over(cls, pool: DraftPool, tree: TreeSettings, limit: int) -> "RemoteProposer":
        """A proposer over a pool that has been started, for measurements without a vLLM engine.

        Args:
            pool: Serves the drafts.
            tree: What requests ask for that say nothing else.
            limit: Most tokens to draft per request and step.
        """
        proposer = cls.__new__(cls)
        proposer._set_up(Requests(pool, tree), limit)
        return proposer

    def _set_up(self, requests: Requests | None, limit: int) -> None:
        self._requests = requests
        self._limit = self._scheduled_limit = limit
        self._runner: Any = None
        self._rows: list[str | None] = []
        self._drafts: list[list[int]] = []

    @property
    def pool(self) -> DraftPool | None:
        """Serves the drafts; None on other ranks than the first."""
        return None if self._requests is None else self._requests.pool

    @property
    def failed(self) -> bool:
        """Whether a fault of ours has ended drafting."""
        return self._requests is not None and self._requests.failed

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Part of vLLM's contract; there is no model to load here."""

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        """Learn which requests came and went; called at the start of every step by the wrap in `hooks`."""
        requests = self._requests
        try:
            if self._runner is None:
                self._runner = runner
                hooks.attach(runner, self)
            wanted = getattr(scheduler_output, "num_spec_tokens_to_schedule", None)
            self._scheduled_limit = self._limit if wanted is None else min(self._limit, wanted)
            if requests is None:
                return
            requests.pool.step_begins(*tokens_and_drafts(scheduler_output))
            new = scheduler_output.scheduled_new_reqs
            requests.begin(scheduler_output.finished_req_ids, [(one, one.prompt_token_ids) for one in new])
        except Exception as error:
            self._fail(error)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Take what a step yielded; the drafts for the next one are filled in later, by `draft`.

        Args:
            sampled_token_ids: Per batch row the tokens that this step yielded; empty for rows still in prefill.
            num_tokens_no_spec: int32 array [rows], length of each row's context, sampled tokens included.
            token_ids_cpu: int32 array [rows, max_model_len], the contexts.
            slot_mappings: Unused.

        Returns:
            One empty list per row; never raises.
        """
        self._drafts = [[] for _ in sampled_token_ids]
        requests = self._requests
        if requests is None or self._runner is None or requests.failed:
            return self._drafts
        try:
            rows = self._verified(requests, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
            requests.end_where_apart(rows)
            self._rows = [request if tokens else None for request, tokens in rows]
            requests.pool.step(rows)
        except Exception as error:
            self._fail(error)
        return self._drafts

    def draft(self, drafts: object) -> None:
        """Fill in the lists of `propose`, in place, just before the scheduler takes them; never raises.

        Each becomes a draft of at most ``num_speculative_tokens`` ids of the vocabulary.
        """
        requests = self._requests
        if requests is None or requests.failed or drafts is not self._drafts:
            return
        try:
            self._drafts[:] = requests.without_apart(requests.pool.draft(self._rows, self._scheduled_limit))
        except Exception as error:
            self._fail(error)

    def _verified(
        self, requests: Requests, sampled: list[list[int]], lengths: Any, contexts: Any
    ) -> list[tuple[str, list[int]]]:
        """Per row the request and the tokens that its session has not seen yet.

        They are read from the row's context by position, so that whatever the scheduler did meanwhile, the session
        ends up with exactly the target's context; one that does not fit any more begins anew.
        """
        rows: list[tuple[str, list[int]]] = []
        context_lengths = lengths[: len(sampled)].tolist()
        names = self._runner.input_batch.req_ids[: len(sampled)]
        every = zip(names, requests.pool.known(names), context_lengths, sampled, strict=True)
        for row, (request, known, length, tokens) in enumerate(every):
            if not tokens or known < 0:
                rows.append((request, NONE))
            elif known + len(tokens) == length:
                rows.append((request, tokens))
            elif known < length <= known + MAX_COMMIT_TOKENS:
                rows.append((request, contexts[row, known:length].tolist()))
            else:
                requests.begin_anew(request, contexts[row, :length].tolist())
                rows.append((request, NONE))
        return rows

    def _fail(self, error: Exception) -> None:
        if self._requests is not None:
            self._requests.fail(error)
