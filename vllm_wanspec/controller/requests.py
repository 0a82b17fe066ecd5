"""Requests as vLLM tells of them: which are drafted for, until what length, and when they begin and end.

Both model runners' sides use it. It belongs to the thread that runs the model; what it tells the pool is under the
pool's lock.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from typing import Any

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.live import NO_END, last_use
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.controller.request_settings import tree_asked
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.text import printable

logger = logging.getLogger("vllm.wanspec.proposer")


class Requests:
    """The requests of one target.

    Attributes:
        pool: Serves the drafts.
        failed: Whether a fault of ours has ended drafting.
    """

    def __init__(
        self, pool: DraftPool, tree: TreeSettings, *, max_model_len: int = NO_END, apart: Collection[int] = ()
    ) -> None:
        """Begin without requests.

        Args:
            pool: A pool that has been started.
            tree: What requests ask for that say nothing else.
            max_model_len: The target's longest context.
            apart: Ids that drafters may have other tokens for; no text with one of them is drafted for.
        """
        self.pool = pool
        self.failed = False
        self._tree = tree
        self._max_model_len = max_model_len
        self._apart = frozenset(apart)
        self._wrong_override = ""

    def begin(self, finished: Collection[str], new: Iterable[tuple[Any, Sequence[int] | None]]) -> None:
        """Requests have finished, and then others have come.

        Args:
            finished: Their ids.
            new: Of each what vLLM's scheduler says of it, and its context's token ids.
        """
        contexts, trees, ends = [], [], []
        for request, context in new:
            tree = self._tree_of(request, context)
            if tree is not None and context is not None:
                contexts.append((request.req_id, context))
                trees.append(tree)
                ends.append(self._end_of(request))
        if finished or contexts:
            self.pool.begin(list(finished), contexts, trees, ends)

    def begin_anew(self, request: str, context: Sequence[int]) -> None:
        """A request's text is another than was known: its session begins anew."""
        anew = [(request, context)] if self._apart.isdisjoint(context) else []
        self.pool.begin([request], anew, [self.pool.tree(request)], [self.pool.end(request)])

    def end_where_apart(self, rows: Sequence[tuple[str, Sequence[int]]]) -> None:
        """End the sessions of requests whose text now has a token that drafters may have another for."""
        if self._apart:
            ended = [request for request, tokens in rows if not self._apart.isdisjoint(tokens)]
            if ended:
                self.pool.begin(ended, [])

    def without_apart(self, drafts: list[list[int]]) -> list[list[int]]:
        """Drafts, each up to the first token that the drafter may mean otherwise."""
        if not self._apart:
            return drafts
        return [list(takewhile(lambda token: token not in self._apart, draft)) for draft in drafts]

    def fail(self, error: Exception) -> None:
        """A fault of ours: say so once, and serve without drafts from now on."""
        if not self.failed:
            self.failed = True
            logger.error("remote drafting stops by a fault of its own; requests are served on", exc_info=error)

    def _tree_of(self, request: Any, context: Sequence[int] | None) -> TreeSettings | None:
        """What a new request asks of drafters; None where it opted out or cannot be drafted."""
        if context is None or not _can_be_drafted(request) or not self._apart.isdisjoint(context):
            return None
        # The first token comes with the prefill, without a draft.
        if len(context) + 1 > last_use(self._end_of(request)):
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
        wanted: int | None = getattr(request.sampling_params, "max_tokens", None)
        if wanted is None:
            return self._max_model_len
        return min(len(request.prompt_token_ids) + wanted, self._max_model_len)


def _can_be_drafted(request: Any) -> bool:
    """Whether a new request is one that a drafter can follow: tokens in, tokens out."""
    return (
        request.prompt_token_ids is not None
        and not request.mm_features
        and request.prompt_embeds is None
        and request.sampling_params is not None
    )


def tokens_and_drafts(scheduler_output: Any) -> tuple[int, int]:
    """Tokens and draft tokens of a step in which all rows decode; zeros where one is in prefill."""
    drafts = sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
    tokens = scheduler_output.total_num_scheduled_tokens
    decoding = tokens == len(scheduler_output.num_scheduled_tokens) + drafts
    return (tokens, drafts) if decoding and not scheduler_output.scheduled_new_reqs else (0, 0)
