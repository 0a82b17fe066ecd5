"""ControllerSession: the target's side of one request, without I/O.

It is told what the target has verified and what the drafter sent, and answers with messages for the drafter and with
drafts for the target. It outlives links: without one it only keeps the context, and `open` begins anew elsewhere.
"""

import sys
from collections.abc import Sequence
from math import inf

from vllm_wanspec.core.context import Context
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.draft import NO_DRAFT, Draft
from vllm_wanspec.core.flat import FlatTree
from vllm_wanspec.core.messages import Close, Commit, Limits, Nodes, Open, Reject, Resumed
from vllm_wanspec.core.policy.length import Window
from vllm_wanspec.core.policy.lookup import Text, guessed, lengthened
from vllm_wanspec.core.states import CONTROLLER_TABLE, ControllerEvent, ControllerState
from vllm_wanspec.core.tree import ROOT_ID
from vllm_wanspec.core.turnaround import AnswerClock, Coming, Turnaround
from vllm_wanspec.core.words import Guess
from vllm_wanspec.errors import RemoteProtocolError

_BLIND = ControllerState.BLIND  # to look it up takes long, on the serving path
_ALL_IDS = sys.maxsize


class ControllerSession:
    """One request's context and, while a drafter serves it, its copy of the draft tree.

    ``now`` is in seconds, on one clock for all sessions.

    Attributes:
        context: The committed token ids. Read only, but that whoever serves the target may just extend its ``own`` by
            what it has verified while there is no link and no draft, and count it.
        prompt_length: Tokens that the context began with.
        tree: The copy of the draft tree; None without a link. Read only.
        window: The request's adaptive window, if the length policy has one.
    """

    __slots__ = (
        "_clock",
        "_left_at",
        "_number",
        "_shared",
        "_state",
        "_text",
        "context",
        "prompt_length",
        "tree",
        "window",
    )

    def __init__(self, context: Sequence[int], shared: Shared, window: Window | None = None) -> None:
        """Start without a link.

        Args:
            context: Prompt token ids; not copied, see `Context`.
            shared: What all sessions count and learn together.
            window: The request's adaptive window, if the length policy has one.
        """
        self.context = Context(context)
        self.prompt_length = len(context)
        self._shared = shared
        self._state = ControllerState.UNSERVED
        self._number: int | None = None
        self.tree: FlatTree | None = None
        self._left_at = 0  # All nodes are a side branch's until the drafter knows the text up to here.
        self._clock = AnswerClock(Turnaround(), len(context))  # of no use until `open` sets another
        self._text = Text()
        self.window = window

    @property
    def length(self) -> int:
        """Tokens in the committed context."""
        return len(self.context)

    @property
    def state(self) -> ControllerState:
        """What the session is doing."""
        return self._state

    @property
    def wants_link(self) -> bool:
        """Whether `open` may be called: there is no link. What a drafter's reject means is that link's affair."""
        return self._state is ControllerState.UNSERVED

    def open(
        self,
        number: int,
        limits: Limits,
        now: float,
        *,
        vocab_size: int,
        turnaround: Turnaround,
        resumes: Resumed | None = None,
    ) -> Open:
        """Begin a session on a link; the message to send, whose tokens are the context itself, which goes on growing.

        Args:
            number: Not used before on the link.
            limits: What the drafter may do; its own limits are kept.
            now: Seconds.
            vocab_size: Ids that both sides' tokenizers have are below this.
            turnaround: Of the drafter; measured here.
            resumes: A session of this request's that a broken connection to the same drafter had.
        """
        self._state = CONTROLLER_TABLE[self._state, ControllerEvent.OPEN]
        self._number = number
        self.tree = FlatTree(
            len(self.context),
            vocab_size=vocab_size,
            max_nodes=limits.max_nodes,
            calibration=self._shared.calibration,
        )
        self._clock = AnswerClock(turnaround, len(self.context))
        self._shared.counters.opened_sessions += 1
        return Open(number, self.context, limits, len(self.context), resumes=resumes)  # type: ignore[arg-type]

    def commit(self, tokens: Sequence[int], now: float, draft: Draft = NO_DRAFT) -> Commit | None:
        """Take what the target has verified; the message to send, if there is a link.

        Args:
            tokens: In order; at least one.
            now: Seconds.
            draft: The last one made since the commit before, whether or not the target got it: what prompt lookup
                guessed in it is judged, and what the target took of it is counted.
        """
        counters, own, count = self._shared.counters, self.context.own, len(tokens)
        position = self.prompt_length + len(own)
        own.extend(tokens)
        if count > 1:
            if draft.guess or draft.branch:
                counters.took(draft, count - 1)
            else:
                counters.accepted_main_line += min(count - 1, len(draft.drafted))
        if draft.guess:
            before = len(draft.drafted)
            if list(tokens[:before]) == draft.drafted:
                counters.fallback_hits += self._shared.lookup.saw(draft.match, draft.guess, tokens[before:])
        if position > self.prompt_length:
            counters.steps += 1
            counters.committed_tokens += count
        tree = self.tree
        if tree is None:
            return None
        missed = False
        at = tree.at
        if tree.path[at : at + count] == tokens:  # as `FlatTree.commit` does, without the call
            tree.at = at + count
            counters.hits += 1
            followed = count
        elif self._state is _BLIND:
            tree.commit(tokens)
            counters.blind_steps += 1
            return Commit(self._number, position, tuple(tokens))  # type: ignore[arg-type]
        else:
            stayed, followed, missed = tree.commit(tokens)
            if stayed == count:
                counters.hits += 1
                counters.branch_hits += missed
            else:
                counters.misses += 1
                self._state = CONTROLLER_TABLE[self._state, ControllerEvent.LEAVE]
                self._clock.asked = position + count, now
            if missed:
                if stayed == count:
                    self._clock.line_left()
                tree.branch_id, self._left_at = _ALL_IDS, position + count
        if self.window is not None:
            self.window.observe(followed, missed, self._shared.cost)
        return Commit(self._number, position, tuple(tokens))  # type: ignore[arg-type]

    def receive(self, message: Nodes | Reject, now: float) -> None:
        """Take what the drafter sent for this session.

        Raises:
            RemoteProtocolError: No correct drafter sends that.
        """
        if isinstance(message, Reject):
            self._rejected()
            return
        tree = self.tree
        if tree is None:
            return
        if message.seen > tree.committed_length:
            raise RemoteProtocolError(f"nodes claim commit position {message.seen} of {tree.committed_length}")
        tree.catch_up(message.seen)
        if tree.branch_id == _ALL_IDS and message.seen >= self._left_at:
            tree.branch_id = tree.last_id
        appended = tree.append(message.nodes)
        if appended.aside:
            tree.branch_id, self._left_at = _ALL_IDS, appended.aside
        elif tree.cursor_id >= tree.branch_id:
            tree.branch_id = 0
        counters = self._shared.counters
        counters.received_nodes += len(message.nodes)
        counters.added_nodes += appended.added
        counters.stale_nodes += appended.stale
        counters.late_drafts += appended.late
        counters.late_hits += appended.late_hits
        self._clock.received(message, tree, now)
        if self._state is _BLIND and not tree.pending:
            self._state = CONTROLLER_TABLE[self._state, ControllerEvent.CATCH_UP]

    def draft(self, limit: int, least: float, now: float) -> Draft:
        """What the target may verify next, as far as a drafter has drafted it.

        Args:
            limit: Most tokens.
            least: See `FlatTree.draft`.
            now: Seconds.
        """
        tree = self.tree
        return NO_DRAFT if tree is None else tree.draft(limit, least)

    def fall_back(self, draft: Draft, limit: int, least: float, now: float) -> Draft:
        """What the target may verify with the help of prompt lookup, with a link or without.

        Args:
            draft: What `draft` has just given, to go on after or to replace; see `lengthened`.
            limit: Most tokens.
            least: The draft ends where the chance that the target takes all of it falls below this.
            now: Seconds.
        """
        self._text.follow(self.context)
        shared = self._shared
        longer = lengthened(draft, self._text, shared.lookup, limit, least, shared.vocab_size)
        shared.counters.fallback_tokens += len(longer.guess)
        return longer

    def guess(self, limit: int) -> Guess | None:
        """What prompt lookup goes on with behind all that is drafted, of at most ``limit`` tokens with what is drafted.

        None where enough is drafted, or nothing found.
        """
        tree, shared = self.tree, self._shared
        drafted = [] if tree is None else tree.draft(limit).drafted
        if len(drafted) >= limit:
            return None
        self._text.follow(self.context)
        match, tokens, _ = guessed(self._text, shared.lookup, drafted, 1.0, limit, vocab_size=shared.vocab_size)
        return Guess(ROOT_ID if tree is None else tree.line[0], tokens, match) if tokens else None

    def expected(self, limit: int) -> float:
        """How many of the next ``limit`` tokens the target can be expected to take of what is drafted by now."""
        tree = self.tree
        return 0.0 if tree is None else tree.draft(limit).expected

    def told(self, tokens: Sequence[int], looked_up: int, match: int, now: float) -> Draft:
        """What the target has verified, of a draft that a device put together from what was published.

        Args:
            tokens: The draft.
            looked_up: How many of them, at the end, were guessed.
            match: Of the guess.
            now: Seconds.
        """
        drafted, guess = list(tokens[: len(tokens) - looked_up]), tuple(tokens[len(tokens) - looked_up :])
        self._shared.counters.fallback_tokens += looked_up
        tree = self.tree
        branch = 0 if tree is None else tree.drafted_until(tree.branch_id, drafted)
        return Draft(drafted, 0.0, 1.0, guess, match, branch)

    def coming(self, now: float, agreement: float, until: float = inf) -> Coming | None:
        """When the next draft is expected, as `AnswerClock.coming`; None without a link."""
        tree = self.tree
        return None if tree is None else self._clock.coming(tree, now, agreement, until)

    def link_lost(self, now: float) -> None:
        """The link is gone, and the tree with it; the context stays."""
        if self._number is not None:
            self._unlink(ControllerEvent.LOSE)

    def close(self, now: float) -> Close | None:
        """The request is over; the message to send, if there is a link."""
        number = self._number
        self._unlink(ControllerEvent.CLOSE)
        return None if number is None else Close(number)

    def _rejected(self) -> None:
        """The drafter has ended the session: as a lost link, but that the drafter wanted it."""
        if self._number is not None:
            self._shared.counters.rejected_sessions += 1
            self._unlink(ControllerEvent.REJECT)

    def _unlink(self, event: ControllerEvent) -> None:
        self._state = CONTROLLER_TABLE[self._state, event]
        self._number = None
        self.tree = None
