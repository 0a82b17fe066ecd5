"""ControllerSession: the target's side of one request, without I/O.

It is told what the target has verified and what the drafter sent, and answers with messages for the drafter and with
drafts for the target. It outlives links: without one it only keeps the context, and `open` begins anew elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from vllm_wanspec.core.messages import Close, Commit, Nodes, Open, Reject
from vllm_wanspec.core.tree import DraftTree
from vllm_wanspec.errors import RemoteProtocolError

FIRST_REOPEN_DELAY_S = 0.05
MAX_REOPEN_DELAY_S = 5.0
_PERMANENT_REJECTS = frozenset({"too_long", "vocabulary"})


@dataclass(slots=True)
class Counters:
    """What sessions count, all in plain integers; one object serves all sessions of a controller.

    Attributes:
        steps: Verification steps in which a request with a session got tokens (its prefill not included).
        committed_tokens: Tokens that those steps yielded.
        offered_tokens: Draft tokens handed to the target.
        hits: Commits that stayed in the tree to their end.
        misses: Commits that left it.
        blind_steps: Commits made while an earlier one was still pending, so that nothing could be predicted.
        added_nodes: Nodes that arrived in time to be live.
        late_drafts: Positions whose drafts arrived after they were committed.
        stale_nodes: Nodes dropped on arrival because what they hang below is gone.
        opened_sessions: Sessions opened, again after a lost link included.
        rejected_sessions: Rejects received.
        local_draft_passes: Forward passes of a draft model on the target's side.
    """

    steps: int = 0
    committed_tokens: int = 0
    offered_tokens: int = 0
    hits: int = 0
    misses: int = 0
    blind_steps: int = 0
    added_nodes: int = 0
    late_drafts: int = 0
    stale_nodes: int = 0
    opened_sessions: int = 0
    rejected_sessions: int = 0
    local_draft_passes: int = 0

    def items(self) -> list[tuple[str, int]]:
        """Names and values."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


class ControllerSession:
    """One request's context and, while a drafter serves it, its copy of the draft tree."""

    def __init__(self, context: Sequence[int], counters: Counters, *, max_nodes: int, alternatives: int) -> None:
        """Start without a link.

        Args:
            context: Prompt token ids.
            counters: Where to count.
            max_nodes: Budget of live nodes.
            alternatives: Most probable tokens asked for at each position.
        """
        self._context = list(context)
        self._prompt_length = len(context)
        self._counters = counters
        self._max_nodes = max_nodes
        self._alternatives = alternatives
        self._number: int | None = None
        self._tree: DraftTree | None = None
        self._reopen_at: float | None = 0.0
        self._rejects = 0

    @property
    def length(self) -> int:
        """Tokens in the committed context."""
        return len(self._context)

    @property
    def tree(self) -> DraftTree | None:
        """The copy of the draft tree; None without a link. Read only."""
        return self._tree

    def wants_link(self, now: float) -> bool:
        """Whether `open` may be called: there is no link, and no reject that still holds at ``now`` (seconds)."""
        return self._number is None and self._reopen_at is not None and now >= self._reopen_at

    def open(self, number: int, *, vocab_size: int, max_nodes: int, lookahead: int) -> Open:
        """Begin a session numbered ``number`` on a link; the message to send.

        Args:
            number: Not used before on the link.
            vocab_size: Ids that both sides' tokenizers have are below this.
            max_nodes: The drafter's budget of nodes per session.
            lookahead: Tokens to draft beyond the last commit.
        """
        budget = min(self._max_nodes, max_nodes)
        self._number = number
        self._tree = DraftTree(len(self._context), vocab_size=vocab_size, max_nodes=budget)
        self._counters.opened_sessions += 1
        return Open(number, tuple(self._context), lookahead, budget, self._alternatives)

    def commit(self, tokens: Sequence[int]) -> Commit | None:
        """Take what the target has verified; the message to send, if there is a link."""
        counters = self._counters
        position = len(self._context)
        self._context.extend(tokens)
        if position > self._prompt_length:
            counters.steps += 1
            counters.committed_tokens += len(tokens)
        if self._tree is None or self._number is None:
            return None
        blind = bool(self._tree.pending)
        stayed = self._tree.commit(tokens)
        if blind:
            counters.blind_steps += 1
        elif stayed == len(tokens):
            counters.hits += 1
        else:
            counters.misses += 1
        return Commit(self._number, position, tuple(tokens))

    def receive(self, message: Nodes | Reject, now: float) -> None:
        """Take what the drafter sent for this session.

        Raises:
            RemoteProtocolError: No correct drafter sends that.
        """
        if isinstance(message, Reject):
            self._counters.rejected_sessions += 1
            self.link_lost()
            self._rejects += 1
            delay = min(MAX_REOPEN_DELAY_S, FIRST_REOPEN_DELAY_S * 2.0 ** min(self._rejects, 10))
            self._reopen_at = None if message.code in _PERMANENT_REJECTS else now + delay
            return
        tree = self._tree
        if tree is None:
            return
        if message.seen > tree.committed_length:
            raise RemoteProtocolError(f"nodes claim commit position {message.seen} of {tree.committed_length}")
        appended = tree.append(message.nodes)
        self._rejects = 0
        self._counters.added_nodes += appended.added
        self._counters.stale_nodes += appended.stale
        self._counters.late_drafts += appended.late

    def draft(self, limit: int) -> list[int]:
        """At most ``limit`` token ids that the target may verify next; empty when there is nothing to use."""
        if self._tree is None:
            return []
        return [node.token for node in self._tree.best_path(limit)]

    def link_lost(self) -> None:
        """The link is gone, and the tree with it; the context stays."""
        self._number = None
        self._tree = None

    def close(self) -> Close | None:
        """The request is over; the message to send, if there is a link."""
        number = self._number
        self.link_lost()
        self._reopen_at = None
        return None if number is None else Close(number)
