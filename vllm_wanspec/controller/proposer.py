"""RemoteProposer: vLLM's custom proposer contract on top of the pool.

vLLM builds it in the model-runner process and calls `propose` once per step, in the serving path: nothing here waits
on the network, and nothing that goes wrong may raise, since an exception there ends the engine.
"""

import atexit
import logging
from typing import Any

from vllm_wanspec.config import load_settings, settings_path
from vllm_wanspec.controller import hooks
from vllm_wanspec.controller.metrics import serve_metrics
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.core.messages import MAX_COMMIT_TOKENS, vocabulary_fingerprint
from vllm_wanspec.errors import ConfigError

logger = logging.getLogger("vllm.wanspec.proposer")


class RemoteProposer:
    """Takes drafts from remote drafters; named by ``--speculative-config`` as ``vllm_wanspec.RemoteProposer``."""

    def __init__(self, vllm_config: Any) -> None:
        """Read the configuration and connect, on tensor-parallel rank 0 alone.

        Raises:
            ConfigError: The configuration file is missing or wrong.
            UnsupportedError: This vLLM, or the way it is used, does not go with remote drafting.
        """
        hooks.install_in_engine(vllm_config)
        settings = load_settings(settings_path(vllm_config.additional_config))
        self._limit = min(vllm_config.speculative_config.num_speculative_tokens, settings.length.max)
        self._scheduled_limit = self._limit
        self._runner: Any = None
        self._rows: list[str | None] = []
        self._drafts: list[list[int]] = []
        self._failed = False
        self.pool: DraftPool | None = None
        if not _is_first_rank():
            return
        vocabulary = _vocabulary(vllm_config.model_config)
        self.pool = DraftPool(
            settings,
            fingerprint=vocabulary_fingerprint(vocabulary),
            vocab_size=min(max(vocabulary.values()) + 1, vllm_config.model_config.get_vocab_size()),
            speculation_length=self._limit,
        )
        self.pool.start()
        atexit.register(self.pool.stop)
        if settings.metrics is not None:
            serve_metrics(self.pool, settings.metrics)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Part of vLLM's contract; there is no model to load here."""

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        """Learn which requests came and went; called at the start of every step by the wrap in `hooks`."""
        try:
            if self._runner is None:
                self._runner = runner
                hooks.attach(runner, self)
            wanted = getattr(scheduler_output, "num_spec_tokens_to_schedule", None)
            self._scheduled_limit = self._limit if wanted is None else min(self._limit, wanted)
            new = [(r.req_id, r.prompt_token_ids) for r in scheduler_output.scheduled_new_reqs if _wants_drafts(r)]
            if self.pool is None:
                return
            self.pool.step_begins()
            if new or scheduler_output.finished_req_ids:
                self.pool.begin(list(scheduler_output.finished_req_ids), new)
        except Exception as error:
            self._fail(error)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for the next step.

        Args:
            sampled_token_ids: Per batch row the tokens that this step yielded; empty for rows still in prefill.
            num_tokens_no_spec: int32 array [rows], length of each row's context, sampled tokens included.
            token_ids_cpu: int32 array [rows, max_model_len], the contexts.
            slot_mappings: Unused.

        Returns:
            One list per row, of at most ``num_speculative_tokens`` ids of the vocabulary; never raises.
        """
        empty: list[list[int]] = [[] for _ in sampled_token_ids]
        self._drafts = empty
        if self.pool is None or self._runner is None or self._failed:
            return empty
        try:
            rows = self._verified(self.pool, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
            self._rows = [request if tokens else None for request, tokens in rows]
            self._drafts = self.pool.step(rows, self._scheduled_limit)
        except Exception as error:
            self._fail(error)
        return self._drafts

    def redraft(self, drafts: object) -> None:
        """Improve the drafts of this step in place just before the scheduler takes them; never raises."""
        if self.pool is None or self._failed or drafts is not self._drafts:
            return
        try:
            self.pool.redraft(self._rows, self._drafts, self._scheduled_limit)
        except Exception as error:
            for draft in self._drafts:
                draft.clear()
            self._fail(error)

    def _verified(
        self, pool: DraftPool, sampled: list[list[int]], lengths: Any, contexts: Any
    ) -> list[tuple[str, list[int]]]:
        """Per row the request and the tokens that its session has not seen yet.

        They are read from the row's context by position, so that whatever the scheduler did meanwhile, the session
        ends up with exactly the target's context; one that does not fit any more begins anew.
        """
        rows: list[tuple[str, list[int]]] = []
        for row, request in enumerate(self._runner.input_batch.req_ids[: len(sampled)]):
            known = pool.length(request)
            length = int(lengths[row])
            if not sampled[row] or known is None:
                rows.append((request, []))
            elif known < length <= known + MAX_COMMIT_TOKENS:
                rows.append((request, contexts[row, known:length].tolist()))
            else:
                pool.begin([request], [(request, contexts[row, :length].tolist())])
                rows.append((request, []))
        return rows

    def _fail(self, error: Exception) -> None:
        """A fault of ours: say so once, and serve without drafts from now on."""
        self._drafts = [[] for _ in self._drafts]
        if not self._failed:
            self._failed = True
            logger.error("remote drafting stops by a fault of its own; requests are served on", exc_info=error)


def _wants_drafts(request: Any) -> bool:
    """Whether a new request is one that a drafter can follow, and has not opted out."""
    if request.prompt_token_ids is None or request.mm_features or request.prompt_embeds is not None:
        return False
    params = request.sampling_params
    extra: dict[str, Any] = (params.extra_args if params is not None else None) or {}
    return params is not None and extra.get("wanspec") != "off"


def _vocabulary(model_config: Any) -> dict[str, int]:
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise ConfigError("remote drafting needs the tokenizer, to compare vocabularies: drop --skip-tokenizer-init")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _is_first_rank() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank()) == 0
