"""DraftPool: all requests' sessions, and the drafters that serve them.

Two threads meet here under one lock. The model runner's thread opens, commits and takes drafts; the link thread
delivers what arrived. The lock is held for a batch or for a message, never over I/O.

The pool owns the sessions, by request, and what they learn and count together (`shared`); they are changed under the
lock. What steps take and yield (`meter`) the model runner's thread alone changes. Which session is on which link is
`placing`'s, what the drafts of a step are is decided in `drafting`, how long it is held back in `waiting`.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence

from vllm_wanspec.config import Settings, TreeSettings
from vllm_wanspec.controller.choice import tell_of_shorter_context
from vllm_wanspec.controller.drafting import MAX_LOOKUP_ROWS, Drafting
from vllm_wanspec.controller.link import NO_TOKENS, DrafterLink, LinkThread
from vllm_wanspec.controller.live import NO_END, LiveSession
from vllm_wanspec.controller.placing import Placing
from vllm_wanspec.controller.publishing import Publishing
from vllm_wanspec.controller.waiting import LateDrafts
from vllm_wanspec.core.block import Publication, Walked
from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Counters, Shared
from vllm_wanspec.core.draft import NO_DRAFT
from vllm_wanspec.core.events import RecordedControllerSession, Sink
from vllm_wanspec.core.learned.meter import Began, StepMeter
from vllm_wanspec.core.messages import Message, Nodes, Reject
from vllm_wanspec.core.policy.length import StepCost, Window
from vllm_wanspec.core.vocabulary import Tokens
from vllm_wanspec.errors import RemoteProtocolError

MESSAGES_AT_A_TIME = 8
"""After so many messages the link thread lets others run."""


class DraftPool:
    """Sessions by request id, over the links to the configured drafters."""

    def __init__(
        self,
        settings: Settings,
        *,
        fingerprint: str,
        vocab_size: int,
        speculation_length: int,
        max_model_len: int = 0,
        tokens: Tokens = NO_TOKENS,
        clock: Callable[[], float] = time.monotonic,
        queued: Callable[[], int | None] = lambda: 0,
        sink: Sink | None = None,
        seed: int | None = None,
        publication: Publication | None = None,
    ) -> None:
        """Prepare the links; `start` connects them.

        Args:
            settings: The configuration.
            fingerprint: Of the target's vocabulary.
            vocab_size: Ids that the target's tokenizer really has are below this.
            speculation_length: Most tokens that vLLM verifies per step.
            max_model_len: The target's longest context; a drafter with a shorter one is told of.
            tokens: Of the target's vocabulary, to name those that a drafter has others for.
            clock: Seconds, monotonic.
            queued: How many requests and aborts wait for the engine, which no step is held back for; while it gives
                None, not known, no step is held back adaptively.
            sink: Takes the event log's records.
            seed: For the jitter of back-offs.
            publication: Takes the trees of requests that have a slot, for a device to read.
        """
        self.shared = Shared(vocab_size=vocab_size)
        self._settings = settings
        self._vocab_size = vocab_size
        self._speculation_length = min(speculation_length, settings.length.max)
        self.meter = StepMeter(self.shared.times, self._speculation_length)
        self._late = LateDrafts(settings.late, self.meter, self.shared, clock=clock, queued=queued)
        self._drafting = Drafting(
            settings,
            self.meter,
            self.shared,
            self._late,
            speculation_length=self._speculation_length,
            clock=clock,
            recorded=sink is not None,
        )
        self._max_model_len = max_model_len
        self._shorter: set[DrafterLink] = set()
        self._clock = clock
        self._sink = sink
        self._arrived = threading.Condition(threading.Lock())
        self._sessions: dict[str, LiveSession] = {}
        rng = random.Random(seed)
        self.links = [DrafterLink(e, fingerprint, self, rng, tokens) for e in settings.draft_endpoints]
        self._publishing = Publishing(publication, self._sessions, guessed=2 * self._speculation_length + 1)
        self._placing = Placing(
            self.links,
            self._sessions,
            self.shared,
            self.meter,
            vocab_size=vocab_size,
            speculation_length=self._speculation_length,
            publish=self._publishing.publish,
        )
        self._thread = LinkThread(self.links)

    @property
    def counters(self) -> Counters:
        """What the sessions count."""
        return self.shared.counters

    @property
    def waits(self) -> bool:
        """Whether steps may be held back for drafts that are late."""
        return self._settings.late.policy != "none"

    def sessions_on(self, link: DrafterLink) -> int:
        """How many sessions a link has."""
        return len(self._placing.served[link])

    def start(self) -> None:
        """Connect to the drafters."""
        self._thread.start()

    def stop(self) -> None:
        """Close the connections."""
        self._thread.stop()

    # What the model runner's thread calls.

    def step_begins(self, tokens: int = 0, drafts: int = 0) -> Began:
        """The target begins a step, of which ``drafts`` among ``tokens`` as in `StepMeter`; `step` ends it."""
        return self.meter.begins(self._clock(), tokens, drafts)

    def begin(
        self,
        finished: Sequence[str],
        new: Sequence[tuple[str, Sequence[int]]],
        trees: Sequence[TreeSettings | None] = (),
        ends: Sequence[int] = (),
    ) -> None:
        """Close finished requests' sessions, then open those of ``new`` (request id, context token ids).

        Finished come first: an id can return. ``trees`` gives requests settings of their own, ``ends`` the length in
        tokens at which each is over.
        """
        with self._arrived:
            for request in finished:
                self._close(request)
            for index, (request, context) in enumerate(new):
                self._close(request)
                tree = trees[index] if index < len(trees) else None
                end = ends[index] if index < len(ends) else NO_END
                self._add(request, context, tree or self._settings.tree, end)
        self._flush()

    def step(
        self, rows: Sequence[tuple[str, Sequence[int]]], told: Sequence[Walked] = (), began: Began | None = None
    ) -> None:
        """Commit what a step yielded.

        Args:
            rows: Per batch row the request id and the tokens that were verified; none for rows still in prefill.
            told: Per row the draft, where a device made it; none where `draft` has.
            began: What `step_begins` gave, where the next step has begun before this one ends.
        """
        now = self._clock()
        if self.meter.ends(now, len(rows), sum([len(tokens) for _, tokens in rows]), began) and self._drafting.windowed:
            self.shared.cost = StepCost.of(self.shared.times)
        sessions, counters, plain, placing = self._sessions, self.counters, self._sink is None, self._placing
        drafted_rows = drafted_yield = dry_rows = dry_yield = 0
        commits: dict[DrafterLink, list[Message]] = {}
        with self._arrived:
            if told:
                self._take_told(rows, told, now)
            for request, tokens in rows:
                live = sessions.get(request)
                if live is None or not tokens:
                    continue
                core, draft, link = live.core, live.draft, live.link
                if link is None and draft is NO_DRAFT and plain:  # as `ControllerSession.commit`, without the call
                    dry_rows += 1
                    dry_yield += len(tokens)
                    if core.context.own:
                        counters.steps += 1
                        counters.committed_tokens += len(tokens)
                    core.context.own.extend(tokens)
                    continue
                if live.offered and draft.drafted:
                    drafted_rows += 1
                    drafted_yield += len(tokens)
                    if link is not None:
                        link.health.drafted_rows += 1
                        link.health.drafted_tokens += 1 + min(len(tokens) - 1, len(draft.drafted))
                else:
                    dry_rows += 1
                    dry_yield += len(tokens)
                live.draft = NO_DRAFT
                message = core.commit(tokens, now, draft)
                if link is not None and message is not None:
                    if core.prompt_length + len(core.context.own) > live.room:  # another may still have drafts of use
                        placing.leave(live, link, now)
                        placing.open(live, now)
                        self._publishing.publish(live)
                    elif link in commits:
                        commits[link].append(message)
                    else:
                        commits[link] = [message]
            for link, messages in commits.items():
                link.send_all(messages)
                if not self._drafting.withheld:  # what was not wanted says nothing of what it would have been worth
                    link.health.rows += max(0, len(messages) - link.health.opening)
            if now >= placing.open_at or now >= placing.review_at:
                placing.act(now)
            if self._publishing.on:
                looks_up = self._drafting.looks_up and len(rows) <= MAX_LOOKUP_ROWS
                self._publishing.look_ahead(rows, looks_up=looks_up)
        self._flush()
        if drafted_rows:
            self.meter.tokens_per_drafted_step.add(drafted_yield / drafted_rows)
        if dry_rows and self._drafting.looks_up:  # without it such a step yields one token
            self.meter.tokens_per_dry_step.add(dry_yield / dry_rows)

    def draft(self, requests: Sequence[str | None], limit: int) -> list[list[int]]:
        """Draft for the step to come with all that has arrived by now, waiting as configured.

        Args:
            requests: Per row the request id, None for rows that get no draft.
            limit: Most tokens to draft per row.

        Returns:
            Drafts per row, each of at most ``limit`` token ids; empty where there is no draft.
        """
        with self._arrived:
            return self._drafting.draft(self._batch(requests), limit, self._arrived)

    def draft_again(self, requests: Sequence[str | None], lengths: Sequence[int]) -> list[list[int]]:
        """The drafts that `draft` gave, or better ones where more has arrived since.

        Args:
            requests: As for `draft`.
            lengths: Most tokens to draft per row, as the target has laid the step out.
        """
        with self._arrived:
            return self._drafting.draft_again(self._batch(requests), lengths)

    def lengths(self, requests: Sequence[str | None], limit: int, *, uniform: bool) -> list[int]:
        """How many drafts each row should have room for; see `Drafting.lengths`."""
        with self._arrived:
            return self._drafting.lengths(self._batch(requests), limit, uniform=uniform)

    def place(self, request: str, slot: int | None) -> None:
        """A request has a slot of the target's, where its tree is published from now on; or none any more."""
        with self._arrived:
            live = self._sessions.get(request)
            if live is not None:
                self._publishing.place(live, slot)

    def known(self, requests: Sequence[str]) -> list[int]:
        """Tokens in requests' committed contexts; -1 of one without a session."""
        sessions = self._sessions
        found = map(sessions.get, requests)
        return [-1 if live is None else live.core.prompt_length + len(live.core.context.own) for live in found]

    def context(self, request: str) -> Sequence[int] | None:
        """A request's committed token ids, not to be changed; None where it has no session."""
        live = self._sessions.get(request)
        return None if live is None else live.core.context

    def length(self, request: str) -> int | None:
        """Tokens in a request's committed context; None where it has no session."""
        live = self._sessions.get(request)
        return None if live is None else live.core.length

    def tree(self, request: str) -> TreeSettings | None:
        """What a request asks of drafters; None where it has no session."""
        live = self._sessions.get(request)
        return None if live is None else live.tree

    def end(self, request: str) -> int:
        """The length in tokens at which a request is over."""
        live = self._sessions.get(request)
        return NO_END if live is None else live.end

    # What the link thread calls.

    def link_ready(self, link: DrafterLink) -> None:
        """Open sessions of requests that no drafter serves, a few at a time."""
        if link not in self._shorter and tell_of_shorter_context(link, self._max_model_len):
            self._shorter.add(link)
        with self._arrived:
            self._placing.ready(link, self._clock())
        self._flush()

    def link_lost(self, link: DrafterLink) -> None:
        """Move the link's sessions elsewhere, or leave them without drafts until a drafter is back."""
        with self._arrived:
            self._placing.lost(link, self._clock())
            self._arrived.notify_all()
        self._flush()

    def link_beats(self, link: DrafterLink, unanswered: int) -> None:
        """Look after the sessions, those of a link whose pings are unanswered above all."""
        with self._arrived:
            self._placing.beats(link, unanswered, self._clock())
        self._flush()

    def link_drains(self, link: DrafterLink) -> None:
        """Move its sessions while there is time."""
        with self._arrived:
            self._placing.drains(self._clock())
        self._flush()

    def link_received(self, link: DrafterLink, messages: list[Message]) -> None:
        """Give the sessions what arrived for them.

        Raises:
            RemoteProtocolError: No correct drafter sends that; the link drops the connection.
        """
        now = self._clock()
        for number, message in enumerate(messages):
            if not isinstance(message, Nodes | Reject) or message.session >= link.next_number:
                raise RemoteProtocolError(f"unexpected {type(message).__name__.lower()} message")
            # The lock is taken anew for each message, and the interpreter given away between some: a frame can be long,
            # and the serving path must not wait for all of it.
            if number % MESSAGES_AT_A_TIME == MESSAGES_AT_A_TIME - 1:
                time.sleep(0.0)
            with self._arrived:
                live = self._placing.served[link].get(message.session)
                if live is None:
                    continue
                live.core.receive(message, now)
                self._placing.received(live, link, message, now)
                self._publishing.publish(live)
                self._arrived.notify_all()

    # Below here the lock is held.

    def _batch(self, requests: Sequence[str | None]) -> list[LiveSession | None]:
        """Sessions of a batch; None for rows without a name, or without a session."""
        return list(map(self._sessions.get, requests))  # type: ignore[arg-type]  # None is no request's name

    def _take_told(self, rows: Sequence[tuple[str, Sequence[int]]], told: Sequence[Walked], now: float) -> None:
        """Have the drafts that a device made in their sessions' places."""
        for (request, _), (tokens, looked_up) in zip(rows, told, strict=True):
            live = self._sessions.get(request) if tokens else None
            if live is not None:
                match = 0 if live.guess is None else live.guess.match
                live.draft = live.core.told(tokens, looked_up, match, now)
                live.offered = True
                self.shared.counters.offered_tokens += len(tokens)
                self.shared.counters.offered_drafted += len(tokens) - looked_up

    def _add(self, request: str, context: Sequence[int], tree: TreeSettings, end: int) -> None:
        now = self._clock()
        window = Window() if self._drafting.windowed else None
        if self._sink is None:
            core = ControllerSession(context, self.shared, window)
        else:
            core = RecordedControllerSession(context, self.shared, window, key=request, sink=self._sink, now=now)
        live = self._sessions[request] = LiveSession(core, tree, end)
        self._placing.open(live, now, new=True)

    def _close(self, request: str) -> None:
        live = self._sessions.pop(request, None)
        if live is not None:
            self._publishing.place(live, None)
            self._placing.closed(live, self._clock())

    # Without the lock.

    def _flush(self) -> None:
        self._placing.tell()
        for link in self.links:
            link.flush()
