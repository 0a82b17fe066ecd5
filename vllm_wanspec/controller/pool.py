"""DraftPool: all requests' sessions, and the drafters that serve them.

Two threads meet here under one lock. The model runner's thread opens, commits and takes drafts; the link thread
delivers what arrived. The lock is held for a batch or for a message, never over I/O.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence

from vllm_wanspec.config import Settings, TreeSettings
from vllm_wanspec.controller.link import DrafterLink, LinkThread
from vllm_wanspec.controller.live import LiveSession, limits_for
from vllm_wanspec.core.controller import ControllerSession, Counters, Shared
from vllm_wanspec.core.draft import NO_DRAFT, Draft
from vllm_wanspec.core.events import RecordedControllerSession, Sink
from vllm_wanspec.core.learned.meter import StepMeter
from vllm_wanspec.core.messages import MAX_CONTEXT_TOKENS, Limits, Message, Nodes, Reject
from vllm_wanspec.core.policy.expansion import lookahead_tokens
from vllm_wanspec.core.policy.lateness import Wait, worthwhile_wait
from vllm_wanspec.core.policy.length import Payoff, Plan, StepCost, Window, length_policy
from vllm_wanspec.errors import RemoteProtocolError

logger = logging.getLogger("vllm.wanspec.pool")

MAX_LOOKUP_ROWS = 16
"""Larger batches do not fall back on prompt lookup: a bound on what it adds to the serving path."""
WAIT_SLICE_S = 0.002
"""While it holds a step back, the pool looks this often whether new requests have come."""


class DraftPool:
    """Sessions by request id, over the links to the configured drafters."""

    def __init__(
        self,
        settings: Settings,
        *,
        fingerprint: str,
        vocab_size: int,
        speculation_length: int,
        clock: Callable[[], float] = time.monotonic,
        queued: Callable[[], int | None] = lambda: 0,
        sink: Sink | None = None,
        seed: int | None = None,
    ) -> None:
        """Prepare the links; `start` connects them.

        Args:
            settings: The configuration.
            fingerprint: Of the target's vocabulary.
            vocab_size: Ids that the target's tokenizer really has are below this.
            speculation_length: Most tokens that vLLM verifies per step.
            clock: Seconds, monotonic.
            queued: How many requests and aborts wait for the engine, which no step is held back for; while it gives
                None, not known, no step is held back adaptively.
            sink: Takes the event log's records.
            seed: For the jitter of back-offs.
        """
        self.shared = Shared()
        self._settings = settings
        self._policy = length_policy(settings.length.policy)
        self._payoff = Payoff(self.shared.times)
        self._fallback = "ngram" in settings.fallback
        self._vocab_size = vocab_size
        self._speculation_length = min(speculation_length, settings.length.max)
        self.meter = StepMeter(self.shared.times, self._speculation_length)
        self._clock = clock
        self._queued = queued
        self._sink = sink
        self._arrived = threading.Condition(threading.Lock())
        self._sessions: dict[str, LiveSession] = {}
        rng = random.Random(seed)
        self.links = [DrafterLink(e, fingerprint, self, rng) for e in settings.draft_endpoints]
        self._by_link: dict[DrafterLink, dict[int, LiveSession]] = {link: {} for link in self.links}
        self._thread = LinkThread(self.links)

    @property
    def counters(self) -> Counters:
        """What the sessions count."""
        return self.shared.counters

    def start(self) -> None:
        """Connect to the drafters."""
        self._thread.start()

    def stop(self) -> None:
        """Close the connections."""
        self._thread.stop()

    # What the model runner's thread calls.

    def step_begins(self, tokens: int = 0, drafts: int = 0) -> None:
        """The target begins a step, of which ``drafts`` among ``tokens`` as in `StepMeter`; `step` ends it."""
        self.meter.begins(self._clock(), tokens, drafts)

    def begin(
        self,
        finished: Sequence[str],
        new: Sequence[tuple[str, Sequence[int]]],
        trees: Sequence[TreeSettings | None] = (),
    ) -> None:
        """Close finished requests' sessions, then open those of ``new`` (request id, context token ids).

        Finished come first: an id can return. ``trees`` gives requests settings of their own.
        """
        with self._arrived:
            for request in finished:
                self._close(request)
            for index, (request, context) in enumerate(new):
                self._close(request)
                tree = trees[index] if index < len(trees) else None
                self._add(request, context, tree or self._settings.tree)
        self._flush()

    def step(self, rows: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Commit what a step yielded.

        Args:
            rows: Per batch row the request id and the tokens that were verified; none for rows still in prefill.
        """
        now = self._clock()
        if self.meter.ends(now, len(rows), sum(len(tokens) for _, tokens in rows)) and self._policy.windowed:
            self.shared.cost = StepCost.of(self.shared.times)
        sessions = self._sessions
        drafted_rows = drafted_yield = dry_rows = dry_yield = 0
        with self._arrived:
            for request, tokens in rows:
                live = sessions.get(request)
                if live is None or not tokens:
                    continue
                if live.offered and live.draft.drafted:
                    drafted_rows += 1
                    drafted_yield += len(tokens)
                else:
                    dry_rows += 1
                    dry_yield += len(tokens)
                self._commit(live, tokens, now)
        self._flush()
        if drafted_rows:
            self.meter.tokens_per_drafted_step.add(drafted_yield / drafted_rows)
        if dry_rows and self._fallback:  # without it such a step yields one token
            self.meter.tokens_per_dry_step.add(dry_yield / dry_rows)

    def draft(self, requests: Sequence[str | None], limit: int) -> list[list[int]]:
        """Draft for the step to come with all that has arrived by now, waiting as configured.

        Args:
            requests: Per row the request id, None for rows that get no draft.
            limit: Most tokens to draft per row.

        Returns:
            Drafts per row, each of at most ``limit`` token ids; empty where there is no draft.
        """
        drafts: list[list[int]] = [[] for _ in requests]
        rows: list[tuple[int, LiveSession]] = []
        dry: list[LiveSession] = []
        with self._arrived:
            sessions, plan, now = self._sessions, self._plan(limit), self._clock()
            for row, request in enumerate(requests):
                live = sessions.get(request) if request is not None else None
                if live is None:
                    continue
                rows.append((row, live))
                live.draft = self._draft(live, plan, now)
                if not live.draft.drafted and live.link is not None:
                    dry.append(live)
            if dry and self._settings.late.policy != "none" and self._hold_back(dry, limit):
                now = self._clock()
                for _, live in rows:
                    if live.core.changed:
                        live.draft = self._draft(live, plan, now)
            offered, expected = 0, 0.0
            lookup = self._fallback and len(requests) <= MAX_LOOKUP_ROWS
            for row, live in rows:
                draft = live.draft
                if lookup and len(draft.drafted) < plan.limit:
                    draft = live.draft = self._look_up(live, plan, now)
                tokens = drafts[row] = draft.tokens
                live.offered = bool(tokens)
                offered += len(tokens)
                expected += draft.expected
            full = offered == self._speculation_length * len(requests)
            judged = offered > 0 and self._settings.length.shut_off
            if judged and not self._payoff.pays(rows=len(requests), drafts=offered, expected=expected, full=full):
                self.counters.unpaid_steps += 1
                for row, live in rows:
                    drafts[row], live.offered = [], False
                offered = 0
            self.counters.offered_tokens += offered
        return drafts

    def length(self, request: str) -> int | None:
        """Tokens in a request's committed context; None where it has no session."""
        live = self._sessions.get(request)
        return None if live is None else live.core.length

    def tree(self, request: str) -> TreeSettings | None:
        """What a request asks of drafters; None where it has no session."""
        live = self._sessions.get(request)
        return None if live is None else live.tree

    # What the link thread calls.

    def link_ready(self, link: DrafterLink) -> None:
        """Open the sessions of requests that no drafter serves."""
        with self._arrived:
            now = self._clock()
            for live in self._sessions.values():
                if live.core.wants_link(now):
                    self._open(live, now)
        self._flush()

    def link_lost(self, link: DrafterLink) -> None:
        """Move the link's sessions elsewhere, or leave them without drafts until a drafter is back."""
        with self._arrived:
            now = self._clock()
            orphans = list(self._by_link[link].values())
            self._by_link[link] = {}
            for live in orphans:
                live.core.link_lost(now)
                live.link = None
                self._open(live, now)
            self._arrived.notify_all()
        self._flush()

    def link_received(self, link: DrafterLink, messages: list[Message]) -> None:
        """Give the sessions what arrived for them.

        Raises:
            RemoteProtocolError: No correct drafter sends that; the link drops the connection.
        """
        now = self._clock()
        for message in messages:
            if not isinstance(message, Nodes | Reject) or message.session >= link.next_number:
                raise RemoteProtocolError(f"unexpected {type(message).__name__.lower()} message")
            # Taken anew for each message: a frame can be long, and the serving path must not wait for all of it.
            with self._arrived:
                live = self._by_link[link].get(message.session)
                if live is None:
                    continue
                live.core.receive(message, now)
                if isinstance(message, Reject):
                    del self._by_link[link][message.session]
                    live.link = None
                self._arrived.notify_all()

    # Below here the lock is held.

    def _add(self, request: str, context: Sequence[int], tree: TreeSettings) -> None:
        now = self._clock()
        window = Window() if self._policy.windowed else None
        if self._sink is None:
            core = ControllerSession(context, self.shared, window)
        else:
            core = RecordedControllerSession(context, self.shared, window, key=request, sink=self._sink, now=now)
        live = self._sessions[request] = LiveSession(core, tree)
        self._open(live, now)

    def _commit(self, live: LiveSession, tokens: Sequence[int], now: float) -> None:
        message = live.core.commit(tokens, now, live.draft)
        live.draft = NO_DRAFT
        if live.link is not None and message is not None:
            live.link.send(message)
        elif live.core.wants_link(now):
            self._open(live, now)

    def _plan(self, limit: int) -> Plan:
        """The plan of all requests; with a windowed policy only the limit that theirs start from."""
        return Plan(limit) if self._policy.windowed else self._policy.plan(limit, None, self.meter.token_worth())

    def _draft(self, live: LiveSession, plan: Plan, now: float) -> Draft:
        own = self._own_plan(live, plan)
        return live.core.draft(own.limit, own.least, now)

    def _look_up(self, live: LiveSession, plan: Plan, now: float) -> Draft:
        own = self._own_plan(live, plan)
        return live.core.fall_back(live.draft, own.limit, own.least, now)

    def _own_plan(self, live: LiveSession, plan: Plan) -> Plan:
        return self._policy.plan(plan.limit, live.core.window, 0.0) if self._policy.windowed else plan

    def _open(self, live: LiveSession, now: float) -> None:
        ready = [
            (link.rtt_s * (1 + len(self._by_link[link])), link, welcome)
            for link in self.links
            if (welcome := link.welcome) is not None  # read once: the link thread clears it without our lock
            and len(self._by_link[link]) < welcome.max_sessions
            and live.core.length <= min(welcome.max_context, MAX_CONTEXT_TOKENS)
        ]
        if not ready:
            return
        _, link, welcome = min(ready, key=lambda item: item[0])
        number = link.next_number
        if isinstance(live.core, RecordedControllerSession):
            live.core.note("link", now, drafter=link.name, peer=f"{link.client}#{number}")
        message = live.core.open(
            number,
            self._limits(live.tree, link, welcome.max_nodes),
            now,
            vocab_size=min(self._vocab_size, welcome.vocab_size),
            turnaround=link.turnaround,
        )
        link.next_number += 1
        live.link, live.number = link, number
        self._by_link[link][number] = live
        link.send(message)

    def _limits(self, tree: TreeSettings, link: DrafterLink, max_nodes: int) -> Limits:
        lookahead = lookahead_tokens(link.rtt_s, self.meter.seconds, self._speculation_length)
        return limits_for(tree, max_nodes, lookahead)

    def _hold_back(self, dry: Sequence[LiveSession], limit: int) -> bool:
        """Wait for drafts about to arrive, as configured; gives the lock free meanwhile. Whether it waited."""
        late, began_s = self._settings.late, self._clock()
        adaptive = late.policy == "adaptive"
        if adaptive:
            wait, waiting = self._worthwhile(dry, limit, began_s)
        else:
            wait, waiting = Wait(late.max_wait_ms / 1000.0, 1), dry
        if wait is None or all(_has_drafts(live, wait.drafts) for live in waiting):
            return False
        began_s = self._clock()
        while not all(_has_drafts(live, wait.drafts) for live in waiting):
            left_s = began_s + wait.seconds - self._clock()
            if left_s <= 0.0 or (adaptive and self._queued() != 0):
                break
            self._arrived.wait(min(left_s, WAIT_SLICE_S))
        ended_s = self._clock()
        self.counters.waits += 1
        self.counters.wait_seconds += ended_s - began_s
        for live in waiting:
            if isinstance(live.core, RecordedControllerSession):
                live.core.note("wait", ended_s, waited_s=ended_s - began_s)
        return True

    def _worthwhile(
        self, dry: Sequence[LiveSession], limit: int, now: float
    ) -> tuple[Wait | None, Sequence[LiveSession]]:
        """The wait that pays, if any, and the sessions that it is for."""
        if self._queued() != 0:
            return None, ()
        agreement = self.shared.calibration.agreement()
        pace = self.meter.pace(agreement, limit)
        max_wait_s = min(self._settings.late.max_wait_ms / 1000.0, pace.longest_wait_s(len(dry)))
        until = now + max_wait_s
        expected = [(live, coming) for live in dry if (coming := live.core.coming(now, agreement, until)) is not None]
        wait = worthwhile_wait([coming for _, coming in expected], pace, now=now, max_wait_s=max_wait_s)
        if wait is None:
            return None, ()
        return wait, [live for live, coming in expected if coming.at_s <= now + wait.seconds]

    def _close(self, request: str) -> None:
        live = self._sessions.pop(request, None)
        if live is None:
            return
        message = live.core.close(self._clock())
        if live.link is not None and message is not None:
            del self._by_link[live.link][live.number]
            live.link.send(message)

    def _flush(self) -> None:
        for link in self.links:
            link.flush()


def _has_drafts(live: LiveSession, count: int) -> bool:
    tree = live.core.tree
    return tree is None or len(tree.best_path(count)) == count
