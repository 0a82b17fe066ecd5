"""RemoteProposer: vLLM's custom proposer contract on top of the pool.

vLLM builds it in the model-runner process and calls `propose` once per step, in the serving path: nothing here waits
on the network, and nothing that goes wrong may raise, since an exception there ends the engine.
"""

import atexit
import logging
from itertools import takewhile
from typing import Any

from vllm_wanspec.config import Settings, TreeSettings, load_settings, settings_path
from vllm_wanspec.controller.live import NO_END, last_use
from vllm_wanspec.controller.metrics import serve_metrics
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.controller.request_settings import tree_asked
from vllm_wanspec.controller.startup import NO_TOKENIZER, engine_place, settings_of
from vllm_wanspec.controller.v1 import hooks
from vllm_wanspec.core.messages import MAX_COMMIT_TOKENS, vocabulary_fingerprint
from vllm_wanspec.core.vocabulary import Tokens
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.eventlog import EventLog
from vllm_wanspec.text import printable

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
        limit = min(vllm_config.speculative_config.num_speculative_tokens, settings.length.max)
        pool = _start_pool(vllm_config, settings, limit) if _is_first_rank() else None
        self._set_up(pool, settings.tree, limit)
        self._apart = frozenset(settings.vocabulary_may_differ)
        self._max_model_len = int(vllm_config.model_config.max_model_len)

    @classmethod
    def over(cls, pool: DraftPool, tree: TreeSettings, limit: int) -> "RemoteProposer":
        """A proposer over a pool that has been started, for measurements without a vLLM engine.

        Args:
            pool: Serves the drafts.
            tree: What requests ask for that say nothing else.
            limit: Most tokens to draft per request and step.
        """
        proposer = cls.__new__(cls)
        proposer._set_up(pool, tree, limit)
        return proposer

    def _set_up(self, pool: DraftPool | None, tree: TreeSettings, limit: int) -> None:
        self.pool = pool
        self._tree = tree
        self._limit = self._scheduled_limit = limit
        self._runner: Any = None
        self._rows: list[str | None] = []
        self._drafts: list[list[int]] = []
        self._failed = False
        self._wrong_override = ""
        self._max_model_len = NO_END
        self._apart = frozenset[int]()

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
            if self.pool is None:
                return
            self.pool.step_begins(*_tokens_and_drafts(scheduler_output))
            finished, new = scheduler_output.finished_req_ids, scheduler_output.scheduled_new_reqs
            if finished or new:
                asked = [(request, tree) for request in new if (tree := self._tree_of(request)) is not None]
                contexts = [(request.req_id, request.prompt_token_ids) for request, _ in asked]
                ends = [self._end_of(request) for request, _ in asked]
                self.pool.begin(list(finished), contexts, [tree for _, tree in asked], ends)
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
        if self.pool is None or self._runner is None or self._failed:
            return self._drafts
        try:
            rows = self._verified(self.pool, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
            if self._apart:
                self._end_where_apart(self.pool, rows)
            self._rows = [request if tokens else None for request, tokens in rows]
            self.pool.step(rows)
        except Exception as error:
            self._fail(error)
        return self._drafts

    def draft(self, drafts: object) -> None:
        """Fill in the lists of `propose`, in place, just before the scheduler takes them; never raises.

        Each becomes a draft of at most ``num_speculative_tokens`` ids of the vocabulary.
        """
        if self.pool is None or self._failed or drafts is not self._drafts:
            return
        try:
            drafts = self.pool.draft(self._rows, self._scheduled_limit)
            self._drafts[:] = [self._without_apart(draft) for draft in drafts] if self._apart else drafts
        except Exception as error:
            self._fail(error)

    def _verified(
        self, pool: DraftPool, sampled: list[list[int]], lengths: Any, contexts: Any
    ) -> list[tuple[str, list[int]]]:
        """Per row the request and the tokens that its session has not seen yet.

        They are read from the row's context by position, so that whatever the scheduler did meanwhile, the session
        ends up with exactly the target's context; one that does not fit any more begins anew.
        """
        rows: list[tuple[str, list[int]]] = []
        context_lengths = lengths[: len(sampled)].tolist()
        for row, request in enumerate(self._runner.input_batch.req_ids[: len(sampled)]):
            known = pool.length(request)
            length = context_lengths[row]
            if not sampled[row] or known is None:
                rows.append((request, []))
            elif known + len(sampled[row]) == length:
                rows.append((request, sampled[row]))
            elif known < length <= known + MAX_COMMIT_TOKENS:
                rows.append((request, contexts[row, known:length].tolist()))
            else:
                context = contexts[row, :length].tolist()
                anew = [(request, context)] if self._apart.isdisjoint(context) else []
                pool.begin([request], anew, [pool.tree(request)], [pool.end(request)])
                rows.append((request, []))
        return rows

    def _end_where_apart(self, pool: DraftPool, rows: list[tuple[str, list[int]]]) -> None:
        """End the sessions of requests whose text now has a token that drafters may have another for."""
        ended = [request for request, tokens in rows if not self._apart.isdisjoint(tokens)]
        if ended:
            pool.begin(ended, [])

    def _without_apart(self, draft: list[int]) -> list[int]:
        """A draft up to the first token that the drafter may mean otherwise."""
        return list(takewhile(lambda token: token not in self._apart, draft))

    def _tree_of(self, request: Any) -> TreeSettings | None:
        """What a new request asks of drafters; None where it opted out or cannot be drafted."""
        if not _can_be_drafted(request):
            return None
        if not self._apart.isdisjoint(request.prompt_token_ids):
            return None
        # The first token comes with the prefill, without a draft.
        if len(request.prompt_token_ids) + 1 > last_use(self._end_of(request)):
            return None
        try:
            return tree_asked(request.sampling_params.extra_args, self._tree)
        except ConfigError as error:
            if str(error) != self._wrong_override:
                self._wrong_override = str(error)
                name = printable(str(request.req_id))
                logger.warning("vllm_xargs: %s; request %s is served as configured", error, name)
            return self._tree

    def _end_of(self, request: Any) -> int:
        """The length in tokens at which a request is over."""
        wanted = getattr(request.sampling_params, "max_tokens", None)
        return (
            self._max_model_len if wanted is None else min(len(request.prompt_token_ids) + wanted, self._max_model_len)
        )

    def _fail(self, error: Exception) -> None:
        """A fault of ours: say so once, and serve without drafts from now on."""
        if not self._failed:
            self._failed = True
            logger.error("remote drafting stops by a fault of its own; requests are served on", exc_info=error)


def _can_be_drafted(request: Any) -> bool:
    """Whether a new request is one that a drafter can follow: tokens in, tokens out."""
    return (
        request.prompt_token_ids is not None
        and not request.mm_features
        and request.prompt_embeds is None
        and request.sampling_params is not None
    )


def _tokens_and_drafts(scheduler_output: Any) -> tuple[int, int]:
    """Tokens and draft tokens of a step in which all rows decode; zeros where one is in prefill."""
    drafts = sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
    tokens = scheduler_output.total_num_scheduled_tokens
    decoding = tokens == len(scheduler_output.num_scheduled_tokens) + drafts
    return (tokens, drafts) if decoding and not scheduler_output.scheduled_new_reqs else (0, 0)


def _start_pool(vllm_config: Any, settings: Settings, limit: int) -> DraftPool:
    vocabulary = _vocabulary(vllm_config.model_config)
    model = str(vllm_config.model_config.model)
    tokens = Tokens.of(vocabulary, settings.vocabulary_may_differ)
    engines, rank = engine_place(vllm_config)
    settings = settings_of(settings, rank)
    log = EventLog(settings.events, "controller", model) if settings.events else None
    pool = DraftPool(
        settings,
        fingerprint=tokens.fingerprint if tokens.apart else vocabulary_fingerprint(vocabulary),
        vocab_size=min(max(vocabulary.values()) + 1, vllm_config.model_config.get_vocab_size()),
        speculation_length=limit,
        max_model_len=int(vllm_config.model_config.max_model_len),
        tokens=tokens,
        queued=(lambda: None) if engines > 1 else hooks.queued_requests,
        sink=log.record if log else None,
    )
    pool.start()
    atexit.register(pool.stop)
    if settings.metrics is not None:
        serve_metrics(pool, settings.metrics)
    return pool


def _vocabulary(model_config: Any) -> dict[str, int]:
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise ConfigError(NO_TOKENIZER)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _is_first_rank() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank()) == 0
