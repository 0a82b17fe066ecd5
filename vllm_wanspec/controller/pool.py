"""DraftPool: all requests' sessions, and the drafters that serve them.

Two threads meet here under one lock. The model runner's thread opens, commits and takes drafts; the link thread
delivers what arrived. The lock is held for a batch or for a frame, never over I/O.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.link import DrafterLink, LinkThread
from vllm_wanspec.core.controller import ControllerSession, Counters
from vllm_wanspec.core.estimates import Smoothed
from vllm_wanspec.core.expansion import lookahead_tokens
from vllm_wanspec.core.messages import MAX_CONTEXT_TOKENS, Message, Nodes, Reject
from vllm_wanspec.errors import RemoteProtocolError

logger = logging.getLogger("vllm.wanspec.pool")

ASSUMED_STEP_S = 0.030


class LiveSession:
    """A request's session and the link that serves it now."""

    __slots__ = ("core", "link", "number")

    def __init__(self, core: ControllerSession) -> None:
        self.core = core
        self.link: DrafterLink | None = None
        self.number = 0


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
        seed: int | None = None,
    ) -> None:
        """Prepare the links; `start` connects them.

        Args:
            settings: The configuration.
            fingerprint: Of the target's vocabulary.
            vocab_size: Ids that the target's tokenizer really has are below this.
            speculation_length: Most tokens that vLLM verifies per step.
            clock: Seconds, monotonic.
            seed: For the jitter of back-offs.
        """
        self.counters = Counters()
        self.step_s = Smoothed()
        self._settings = settings
        self._vocab_size = vocab_size
        self._speculation_length = min(speculation_length, settings.length.max)
        self._clock = clock
        self._arrived = threading.Condition(threading.Lock())
        self._sessions: dict[str, LiveSession] = {}
        rng = random.Random(seed)
        self.links = [DrafterLink(e, fingerprint, self, rng) for e in settings.draft_endpoints]
        self._by_link: dict[DrafterLink, dict[int, LiveSession]] = {link: {} for link in self.links}
        self._thread = LinkThread(self.links)
        self._began_s: float | None = None

    def start(self) -> None:
        """Connect to the drafters."""
        self._thread.start()

    def stop(self) -> None:
        """Close the connections."""
        self._thread.stop()

    # What the model runner's thread calls.

    def step_begins(self) -> None:
        """The target begins a step; `step` ends it, and the time between is the step time t_v."""
        self._began_s = self._clock()

    def begin(self, finished: Sequence[str], new: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Close finished requests' sessions, then open those of ``new`` (request id, context token ids).

        Finished come first: an id can return.
        """
        with self._arrived:
            for request in finished:
                self._close(request)
            for request, context in new:
                self._close(request)
                self._add(request, context)
        self._flush()

    def step(self, rows: Sequence[tuple[str, Sequence[int]]], limit: int) -> list[list[int]]:
        """Commit what a step yielded and draft for the next one.

        Args:
            rows: Per batch row the request id and the tokens that were verified; none for rows still in prefill.
            limit: Most tokens to draft per row.

        Returns:
            Drafts per row, each of at most ``limit`` token ids; empty where there is no draft.
        """
        now = self._clock()
        if self._began_s is not None:
            self.step_s.add(now - self._began_s)
            self._began_s = None
        drafts: list[list[int]] = []
        with self._arrived:
            for request, tokens in rows:
                live = self._sessions.get(request)
                if live is None or not tokens:
                    drafts.append([])
                    continue
                self._commit(live, tokens, now)
                drafts.append(live.core.draft(limit))
        self._flush()
        return drafts

    def redraft(self, requests: Sequence[str | None], drafts: list[list[int]], limit: int) -> None:
        """Replace drafts in place by the best that has arrived meanwhile, waiting as configured.

        Args:
            requests: Per row the request id, None for rows that get no draft.
            drafts: What `step` returned.
            limit: As for `step`.
        """
        late = self._settings.late
        with self._arrived:
            rows = [(row, self._sessions.get(request)) for row, request in enumerate(requests) if request is not None]
            if late.policy == "fixed":
                served = [live for _, live in rows if live is not None and live.link is not None]
                self._arrived.wait_for(lambda: all(map(_has_draft, served)), late.max_wait_ms / 1000.0)
            for row, live in rows:
                if live is not None:
                    drafts[row] = live.core.draft(limit)
                    self.counters.offered_tokens += len(drafts[row])

    def length(self, request: str) -> int | None:
        """Tokens in a request's committed context; None where it has no session."""
        live = self._sessions.get(request)
        return None if live is None else live.core.length

    # What the link thread calls.

    def link_ready(self, link: DrafterLink) -> None:
        """Open the sessions of requests that no drafter serves."""
        with self._arrived:
            now = self._clock()
            for live in self._sessions.values():
                if live.core.wants_link(now):
                    self._open(live)
        self._flush()

    def link_lost(self, link: DrafterLink) -> None:
        """Move the link's sessions elsewhere, or leave them without drafts until a drafter is back."""
        with self._arrived:
            orphans = list(self._by_link[link].values())
            self._by_link[link] = {}
            for live in orphans:
                live.core.link_lost()
                live.link = None
                self._open(live)
            self._arrived.notify_all()
        self._flush()

    def link_received(self, link: DrafterLink, messages: list[Message]) -> None:
        """Give the sessions what arrived for them.

        Raises:
            RemoteProtocolError: No correct drafter sends that; the link drops the connection.
        """
        with self._arrived:
            now = self._clock()
            for message in messages:
                if not isinstance(message, Nodes | Reject) or message.session >= link.next_number:
                    raise RemoteProtocolError(f"unexpected {type(message).__name__.lower()} message")
                live = self._by_link[link].get(message.session)
                if live is None:
                    continue
                live.core.receive(message, now)
                if isinstance(message, Reject):
                    del self._by_link[link][message.session]
                    live.link = None
            self._arrived.notify_all()

    # Below here the lock is held.

    def _add(self, request: str, context: Sequence[int]) -> None:
        tree = self._settings.tree
        core = ControllerSession(context, self.counters, max_nodes=tree.max_nodes, alternatives=tree.max_branches)
        live = self._sessions[request] = LiveSession(core)
        self._open(live)

    def _commit(self, live: LiveSession, tokens: Sequence[int], now: float) -> None:
        message = live.core.commit(tokens)
        if live.link is not None and message is not None:
            live.link.send(message)
        elif live.core.wants_link(now):
            self._open(live)

    def _open(self, live: LiveSession) -> None:
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
        message = live.core.open(
            number,
            vocab_size=min(self._vocab_size, welcome.vocab_size),
            max_nodes=welcome.max_nodes,
            lookahead=self._lookahead(link),
        )
        link.next_number += 1
        live.link, live.number = link, number
        self._by_link[link][number] = live
        link.send(message)

    def _lookahead(self, link: DrafterLink) -> int:
        configured = self._settings.tree.lookahead_tokens
        if configured != "auto":
            return configured
        return lookahead_tokens(link.rtt_s, self.step_s.get(ASSUMED_STEP_S), self._speculation_length)

    def _close(self, request: str) -> None:
        live = self._sessions.pop(request, None)
        if live is None:
            return
        message = live.core.close()
        if live.link is not None and message is not None:
            del self._by_link[live.link][live.number]
            live.link.send(message)

    def _flush(self) -> None:
        for link in self.links:
            link.flush()


def _has_draft(live: LiveSession) -> bool:
    tree = live.core.tree
    return tree is None or bool(tree.best_path(1))
