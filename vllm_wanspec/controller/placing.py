"""Which session is on which link: opened, moved, taken off. What happens on a link is told to its `LinkHealth`.

Works with the pool's lock held, in the model runner's thread and in the links'. `choice` decides which drafter takes a
session, `core.health` what a drafter is worth; here both are asked, and done what follows. Looking after sessions that
wait for a link or for a draft happens now and then (`act`), never for each row of a step.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import inf

from vllm_wanspec.controller.choice import Chosen, choose, choose_other, limits_for
from vllm_wanspec.controller.link import DrafterLink
from vllm_wanspec.controller.live import LiveSession, last_use
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.events import RecordedControllerSession
from vllm_wanspec.core.health import REMEDIES, Bar, Why, patience
from vllm_wanspec.core.learned.meter import StepMeter
from vllm_wanspec.core.messages import MAX_COMMIT_TOKENS, MAX_CONTEXT_TOKENS, Close, Nodes, Reject, Resumed
from vllm_wanspec.core.policy.expansion import lookahead_tokens
from vllm_wanspec.core.states import LinkState

logger = logging.getLogger("vllm.wanspec.pool")

REVIEW_INTERVAL_S = 0.5
"""So often all sessions are looked at, which takes a fraction of a microsecond each: far below what is waited for
(`core.health`: seconds), and far above a step."""
PLAIN_TOKENS = 1.0
"""What a step yields without drafts. Prompt lookup's yield is known of steps that happened to have no draft, whose
texts repeat more than others: held against it, good drafters were found useless."""
STALLED = "stalled"
"""The code of a bar that no reject has set: the drafter serves others, and not this request."""


class Placing:
    """Puts sessions on links.

    Attributes:
        served: The sessions on each link, by their numbers there. Read only.
        open_at: When a session that waits for a link should be tried again: `act` is due then...
        review_at: ...and then.
    """

    def __init__(
        self,
        links: Sequence[DrafterLink],
        sessions: Mapping[str, LiveSession],
        shared: Shared,
        meter: StepMeter,
        *,
        vocab_size: int,
        speculation_length: int,
        publish: Callable[[LiveSession], None],
    ) -> None:
        """Begin without sessions on any link.

        Args:
            links: To the drafters.
            sessions: By request; the pool's.
            shared: What sessions count.
            meter: What the target's steps take and yield.
            vocab_size: Ids that the target's tokenizer really has are below this.
            speculation_length: Most drafts that a request can have in a step.
            publish: Told of a session whose tree has changed.
        """
        self.served: dict[DrafterLink, dict[int, LiveSession]] = {link: {} for link in links}
        self.open_at = self.review_at = inf
        self._sessions = sessions
        self._counters = shared.counters
        self._meter = meter
        self._vocab_size = vocab_size
        self._speculation_length = speculation_length
        self._publish = publish
        self._short = False  # whether a session wants a link and has got none
        self._failed = False  # by a fault of ours
        self._news: deque[tuple[DrafterLink, LinkState, Why | None, str]] = deque()

    # Sessions come and go

    def open(self, live: LiveSession, now: float, *, new: bool = False) -> None:
        """Put a session that wants a link on one, if there is one for it; ``new`` as for `choose`."""
        if live.core.length > last_use(live.end):
            return
        chosen = choose(self.served, live.core.length, now, live.bars, new=new)
        if chosen is None:
            self._short = True
        else:
            self._put(live, chosen, now)

    def leave(self, live: LiveSession, link: DrafterLink, now: float) -> None:
        """Take a session off its link, whose drafter has it yet."""
        self._off(live, link)
        link.send(Close(live.number))
        if isinstance(live.core, RecordedControllerSession):
            live.core.note("leave", now)
        live.core.link_lost(now)

    def closed(self, live: LiveSession, now: float) -> None:
        """A session's request is over."""
        link, message = live.link, live.core.close(now)
        if link is not None and message is not None:
            self._off(live, link)
            link.send(message)

    # Links come and go

    def ready(self, link: DrafterLink, now: float) -> None:
        """A drafter has welcomed us: sessions without a link may go there."""
        self.review_at = min(self.review_at, now + REVIEW_INTERVAL_S)
        self._note(link, link.health.welcomed(link.faults, now))
        self._open_waiting(now)

    def lost(self, link: DrafterLink, now: float) -> None:
        """A link's sessions go elsewhere, or stay without drafts until there is a drafter for them."""
        orphans, self.served[link] = sorted(self.served[link].values(), key=_urgency), {}
        self._note(link, link.health.lost(link.faults, len(orphans), now))
        for live in orphans:
            live.core.link_lost(now)
            live.broken = link, Resumed(link.client, live.number)
            self._forget(live)
        for live in orphans:
            self.open(live, now)
            self._publish(live)

    def drains(self, now: float) -> None:
        """A drafter takes no new sessions: those that it has move, where there is another for them."""
        self.review_at = now
        self.act(now)

    def beats(self, link: DrafterLink, unanswered: int, now: float) -> None:
        """A link is alive, with so many pings ``unanswered`` that should not be."""
        changed = link.health.pinged(unanswered, now)
        self._note(link, changed)
        if changed or now >= self.review_at:
            self.review_at = now
            self.act(now)

    # Messages arrive

    def received(self, live: LiveSession, link: DrafterLink, message: Nodes | Reject, now: float) -> None:
        """A session has taken what its drafter sent."""
        if isinstance(message, Reject):
            self._off(live, link)
            live.bars.setdefault(link, Bar()).rejected(message.code, now)
            self._note(link, link.health.rejected(message.code, now))
            return
        if not message.nodes:
            return
        live.due_s = inf
        if live.opening:
            live.opening = False
            live.bars.pop(link, None)
            link.health.answered(now - live.opened_s, len(live.core.context), now)
            if self._short:
                self.open_at = -inf
        if link.health.drafted(now):
            self._note(link, True)

    # Now and then

    def act(self, now: float) -> None:
        """Do what is due by ``open_at`` and ``review_at``. Never raises: it is called on the serving path."""
        if self._failed:
            return
        try:
            if now >= self.review_at:
                self._review(now)
            self._open_waiting(now)
        except Exception:
            self._failed = True
            logger.exception("sessions stay on their links from now on by a fault of ours; requests are served on")

    def tell(self) -> None:
        """Log what has become of links; without the lock."""
        while self._news:
            with suppress(IndexError):  # another thread was faster
                _log(*self._news.popleft())

    def _review(self, now: float) -> None:
        self.review_at = now + REVIEW_INTERVAL_S
        for link, served in self.served.items():
            for live in list(served.values()):
                self._look_after(live, link, now)
            self._note(link, link.health.judge(PLAIN_TOKENS, now))
        for link in self.served:
            self._move_from(link, now)

    def _look_after(self, live: LiveSession, link: DrafterLink, now: float) -> None:
        """See whether a session has been owed a draft for too long."""
        length, before, live.looked = live.core.length, live.looked, live.core.length
        if live.due_s == inf:
            if length != before and self._can_grow(live) and not live.has_drafts(1):
                live.due_s = now
            return
        patience_s = patience(length, link.rtt_s)
        if now - live.due_s < patience_s:
            return
        live.due_s = now
        waited, live.opening = live.opening, False
        self._note(link, link.health.unanswered(live.number, patience_s, now, waited=waited))
        if link.health.state is LinkState.HEALTHY:  # others have their drafts
            self._move(live, link, now, barred=True)

    def _move_from(self, link: DrafterLink, now: float) -> None:
        """Move a link's sessions, as far as its state says so: those first that have the fewest drafts left."""
        health = link.health
        if health.state is LinkState.HEALTHY and not link.draining:
            return
        broken = health.state is LinkState.BROKEN
        leaving = [live for number, live in self.served[link].items() if number != health.probing]
        for live in sorted(leaving, key=_urgency):
            if not self._move(live, link, now) and broken:
                health.moves += 1
                self.leave(live, link, now)
                self._publish(live)

    def _move(self, live: LiveSession, link: DrafterLink, now: float, *, barred: bool = False) -> bool:
        """Move a session to another drafter, if a healthy one takes it now; whether it has gone."""
        chosen = choose_other(self.served, live.core.length, now, live.bars, link)
        if chosen is None:
            return False
        if barred:
            live.bars.setdefault(link, Bar()).rejected(STALLED, now)
        link.health.moves += 1
        self.leave(live, link, now)
        self._put(live, chosen, now)
        self._publish(live)
        return True

    def _open_waiting(self, now: float) -> None:
        """Open the sessions that wait for a drafter with room, or for a reject to be over."""
        self._short = False
        waiting = [live for live in self._sessions.values() if live.link is None]
        for live in waiting:
            if live.core.wants_link:
                self.open(live, now)
        ends = [bar.until_s for live in waiting if live.bars for bar in live.bars.values()]
        self.open_at = min([until_s for until_s in ends if until_s > now], default=inf)

    # What the others share

    def _put(self, live: LiveSession, chosen: Chosen, now: float) -> None:
        link, welcome, probe = chosen
        number = link.next_number
        lookahead = lookahead_tokens(link.rtt_s, self._meter.seconds, self._speculation_length)
        if isinstance(live.core, RecordedControllerSession):
            live.core.note("link", now, drafter=link.name, peer=f"{link.client}#{number}")
        broken, live.broken = live.broken, None
        resumes = broken is not None and broken[0] is link and live.core.length > MAX_COMMIT_TOKENS
        message = live.core.open(
            number,
            limits_for(live.tree, welcome.max_nodes, lookahead),
            now,
            vocab_size=min(self._vocab_size, welcome.vocab_size),
            turnaround=link.turnaround,
            resumes=broken[1] if broken is not None and resumes else None,
        )
        link.next_number += 1
        live.link, live.number = link, number
        live.room = min(last_use(live.end), welcome.max_context, MAX_CONTEXT_TOKENS)
        live.opened_s = now
        live.looked = live.core.length
        live.opening = self._can_grow(live)
        live.due_s = now if live.opening else inf
        link.health.opened(number, now, waits=live.opening, probe=probe)
        self.served[link][number] = live
        self.review_at = min(self.review_at, now + REVIEW_INTERVAL_S)
        link.send(message)

    def _can_grow(self, live: LiveSession) -> bool:
        """Whether its drafter has room for more than a step's drafts: it need not answer for the rest."""
        return live.core.length + self._speculation_length < live.room

    def _off(self, live: LiveSession, link: DrafterLink) -> None:
        """A link has one session less, and may have had no room for more."""
        del self.served[link][live.number]
        link.health.ended(live.number, waited=live.opening)
        self._forget(live)
        self.open_at = -inf

    def _forget(self, live: LiveSession) -> None:
        live.link = None
        live.opening = False
        live.due_s = inf

    def _note(self, link: DrafterLink, changed: bool) -> None:
        if changed:
            self.open_at = -inf
            self._news.append((link, link.health.state, link.health.why, link.health.code))


def _urgency(live: LiveSession) -> int:
    """How many tokens have been drafted for a session and not used yet."""
    tree = live.core.tree
    return 0 if tree is None else len(tree.path) - tree.at


def _log(link: DrafterLink, state: LinkState, why: Why | None, code: str) -> None:
    """One line for a link that has changed its state."""
    if why is None:
        logger.info("drafter %s: healthy again, it gets sessions as before", link.name)
        return
    said = f"{why}, the last as `{code}`" if why is Why.REJECTS else str(why)
    if state is LinkState.SUSPECT:
        logger.warning(
            "drafter %s: suspect, its sessions move to healthy drafters, if there are any: %s; %s",
            link.name,
            said,
            REMEDIES[why],
        )
    else:
        logger.warning(
            "drafter %s: broken, it gets no session but a probe now and then: %s; %s", link.name, said, REMEDIES[why]
        )
