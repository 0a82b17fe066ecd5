"""Is a drafter worth a session? What has happened on its link makes it healthy, suspect or broken.

`LinkHealth` is one link's: it is told what happens there, and says what that makes of the drafter, what one more
session there would cost, and when it may be probed. `Bar` is what a link's rejects of *one request* mean for that
request there. What follows for sessions is decided elsewhere. The states are a table in `core.states`.

Every number below is own judgement, with its reason; none is fitted to a measurement.
"""

from collections import Counter
from enum import StrEnum
from math import exp2, inf

from vllm_wanspec.core.learned.estimates import Smoothed
from vllm_wanspec.core.states import LINK_TABLE, LinkEvent, LinkState

FAILURES_IN_A_ROW = 3
"""Rejects and lost connections without any draft between them. One can be the request's own fault, a place that was
just taken, or a restart; three in a row are the drafter's."""
PATIENCE_S = 2.0
"""For an answer, beside two round trips and the time that a context takes. An idle drafter answers within tenths of a
second, one with a queue within one or two; after two a request has gone sixty steps without a draft."""
PATIENCE_TOKEN_S = 1e-4
"""More of it for each token of the context: 3 bytes at 0.25 Mbit/s, or a prefill of 10,000 tokens a second."""
PINGS_UNANSWERED = 3
"""One goes each second: TCP sends a lost segment again after one second at the latest, and after two more (RFC 6298),
so a path that only loses packets has answered by then."""
DOUBT_S = 10.0
"""A suspect that still fails after so long is broken. An engine's restart, or a burst of load, is over by then."""
FIRST_PROBE_S = 1.0
"""From the first failure to the first probe, and then twice as long from each to the next..."""
MAX_PROBE_S = 64.0
"""...up to this: what it may take until a drafter that is well again is known to be (where there is a request to probe
with). A probe costs one request its drafts for `PATIENCE_S` and a little: at most a thirtieth of one request's time."""
TRUST_S = 60.0
"""Who fails again within so long of being healthy is probed as rarely as before: else one that drafts once and then
fails would be asked every second."""
JUDGED_ROWS = 200
JUDGED_S = 10.0
"""What drafts add is judged over so many steps of requests at least, and so long: one request's 200 steps take six
seconds at 30 ms, and a large batch's are over before a far drafter's pace shows."""
LEAST_USE = 0.02
"""Tokens that drafts must add per step and request: below, they are not worth the 2 % that they may cost."""
FADE_S = 30.0
"""What a link was late by when it was last asked counts half as much after so long: it must be asked again to know."""
MAX_LOAD = 0.9
"""A drafter that is fuller than this is taken for ten times as slow as an idle one; queues beyond count in full."""
OPENING = 8
"""Sessions of a link that may wait for their first draft while others are to be opened again or moved there. So the
drafter's own pace bounds how many long contexts it gets at once: all of them, from a hundred controllers, would keep
its event loop busy for longer than the limit of silence."""

FIRST_BAR_S = 0.05
MAX_BAR_S = 5.0
LASTING_REJECTS = frozenset({"too_long", "vocabulary"})
"""What a drafter will say again as long as the request lives."""


class Bar:
    """What a link's rejects of one request mean for it there: asked again after a back-off that doubles, or never.

    Attributes:
        code: Of the last reject; empty before any.
    """

    __slots__ = ("_count", "_until_s", "code")

    def __init__(self) -> None:
        """Begin open."""
        self.code = ""
        self._count = 0
        self._until_s = -inf

    @property
    def lasts(self) -> bool:
        """Whether it holds as long as the request lives."""
        return self._until_s == inf

    @property
    def until_s(self) -> float:
        """When it is over, in seconds on the clock of `rejected`."""
        return self._until_s

    def holds(self, now: float) -> bool:
        """Whether the link is not to be asked."""
        return now < self._until_s

    def rejected(self, code: str, now: float) -> None:
        """The link has rejected the request."""
        self.code = code
        self._count += 1
        back_off_s = min(MAX_BAR_S, FIRST_BAR_S * 2.0 ** min(self._count, 10))
        self._until_s = inf if code in LASTING_REJECTS else now + back_off_s


class Why(StrEnum):
    """Why a link is not healthy, in words for a log line."""

    REJECTS = "it rejects sessions"
    LOSSES = "its connections are lost before it has drafted anything"
    UNANSWERED = "it drafts nothing for what it is asked"
    PINGS = "it answers no pings"
    FAULT = "it broke the protocol"
    USELESS = "hardly any of its drafts are taken"


REMEDIES = {
    Why.REJECTS: "its log says why; where it is overloaded, give it more places or add a drafter",
    Why.LOSSES: "see its log, and what stands between",
    Why.UNANSWERED: "see whether its engine still runs",
    Why.PINGS: "look at the path, and whether its process hangs",
    Why.FAULT: "run a `wanspec drafter` of our version there",
    Why.USELESS: "take a nearer drafter, or a draft model that follows this traffic",
}


class LinkHealth:
    """What is known of one drafter; ``now`` is in seconds, on one clock. A bool tells whether the state has changed.

    Attributes:
        state: Of the link.
        why: It is not healthy; None where it is.
        code: Of the last reject.
        load: As the drafter tells it: 0 idle, 1 full, above: with a queue.
        opening: Its sessions that wait for their first draft.
        probing: The number of the session that probes it; None without one.
        rows: Steps of requests that it served since it was last judged; added to, a step at a time, by who steps.
        drafted_rows: Those of them that verified a draft of its.
        drafted_tokens: What those yielded, without what prompt lookup had guessed behind the drafts.
        added: Tokens that its drafts added per step and request, when it was last judged; None before.
        rejects: Received, by code.
        moves: Sessions that were taken from it.
        probes: Sent to it.
    """

    __slots__ = (
        "_began_s",
        "_failures",
        "_faults",
        "_first",
        "_first_at",
        "_heard_s",
        "_probe_at",
        "_since_s",
        "_wait_s",
        "added",
        "code",
        "drafted_rows",
        "drafted_tokens",
        "load",
        "moves",
        "opening",
        "probes",
        "probing",
        "rejects",
        "rows",
        "state",
        "why",
    )

    def __init__(self) -> None:
        """Start healthy: nothing is known against it."""
        self.state = LinkState.HEALTHY
        self.why: Why | None = None
        self.code = ""
        self.load = 0.0
        self.opening = 0
        self.probing: int | None = None
        self.rows = self.drafted_rows = self.drafted_tokens = 0
        self.added: float | None = None
        self.rejects: Counter[str] = Counter()
        self.moves = self.probes = 0
        self._began_s = inf
        self._failures = self._faults = 0
        self._heard_s = self._since_s = -inf
        self._first, self._first_at = Smoothed(), 0.0
        self._wait_s, self._probe_at = FIRST_PROBE_S, inf

    # What happens to its sessions

    def opened(self, number: int, now: float, *, waits: bool, probe: bool) -> None:
        """A session is opened there.

        Args:
            number: The session's.
            now: Seconds.
            waits: Whether a first draft can be expected.
            probe: Whether it is the probe that was due.
        """
        self.opening += waits
        if probe:
            self.probing = number
            self.probes += 1
            self._wait_s = min(MAX_PROBE_S, 2.0 * self._wait_s)
            self._probe_at = now + self._wait_s

    def ended(self, number: int, *, waited: bool) -> None:
        """A session is over there; ``waited`` for its first draft until then."""
        self.opening -= waited
        if number == self.probing:
            self.probing = None

    def answered(self, waited_s: float, length: int, now: float) -> None:
        """A session's first draft is there, ``waited_s`` after it was opened with a context of ``length`` tokens."""
        self.opening -= 1
        self._first.add(waited_s - length * PATIENCE_TOKEN_S)
        self._first_at = now

    def drafted(self, now: float) -> bool:
        """It has drafted something for some session."""
        self._heard_s = now
        self._failures = 0
        if self.state is LinkState.HEALTHY or self.why is Why.USELESS:
            return False
        return self._become(LinkEvent.PROVE, None, now)

    def rejected(self, code: str, now: float) -> bool:
        """It has rejected a session."""
        self.code = code
        self.rejects[code] += 1
        return self._failed(Why.REJECTS, now)

    def unanswered(self, number: int, patience_s: float, now: float, *, waited: bool) -> bool:
        """It has drafted nothing for a session for ``patience_s``; ``waited`` for its first draft, and does no more.

        That is the link's fault only where it has drafted nothing for anybody.
        """
        self.opening -= waited
        if number == self.probing:
            self.probing = None
        return now - self._heard_s >= patience_s and self._fail(Why.UNANSWERED, now)

    def judge(self, dry_tokens: float, now: float) -> bool:
        """Weigh what its drafts have added, where enough is known of it.

        Args:
            dry_tokens: What a step yields a request without its drafts.
            now: Seconds.
        """
        if not self.rows or self._began_s == inf:
            self._began_s = now
        if self.rows < JUDGED_ROWS or now - self._began_s < JUDGED_S:
            return False
        self.added = (self.drafted_tokens - dry_tokens * self.drafted_rows) / self.rows
        self.rows = self.drafted_rows = self.drafted_tokens = 0
        self._began_s = now
        healthy = self.state is LinkState.HEALTHY
        if self.added < LEAST_USE:
            if self.state is LinkState.BROKEN:
                self.probing = None
            return (healthy or self.why is Why.USELESS) and self._fail(Why.USELESS, now)
        return self.why is Why.USELESS and self._become(LinkEvent.PROVE, None, now)

    # What happens to its connection

    def welcomed(self, faults: int, now: float) -> bool:
        """It has connected; one that is not healthy may soon be probed: its restart may be what was wanted.

        Args:
            faults: How often it has broken the protocol by now.
            now: Seconds.
        """
        if self.state is not LinkState.HEALTHY:
            self._probe_at = min(self._probe_at, now + FIRST_PROBE_S)
        return self._broke(faults, now)

    def lost(self, faults: int, sessions: int, now: float) -> bool:
        """Its connection is gone, and ``sessions`` with it; ``faults`` as for `welcomed`."""
        self.opening = 0
        self.probing = None
        broke = self._broke(faults, now)
        return broke or (sessions > 0 and self._failed(Why.LOSSES, now))

    def pinged(self, unanswered: int, now: float) -> bool:
        """So many pings should have been answered by now, and have not."""
        if unanswered >= PINGS_UNANSWERED:
            return self._fail(Why.PINGS, now)
        return unanswered == 0 and self.why is Why.PINGS and self._become(LinkEvent.PROVE, None, now)

    # What follows

    def probe_due(self, now: float) -> bool:
        """Whether one session may be opened there to see what it does."""
        return self.state is not LinkState.HEALTHY and self.probing is None and now >= self._probe_at

    def cost_s(self, rtt_s: float, sessions: int, now: float) -> float:
        """What a first draft is expected to take there, in seconds; own derivation.

        What it was late by beyond the round trip, fading; each session that it has of ours counting once more; and
        1 / (1 - load), by which a queue of one server is longer.
        """
        late_s = max(0.0, self._first.get(0.0) - rtt_s) * exp2(min(0.0, (self._first_at - now) / FADE_S))
        busy = max(1.0, self.load) / (1.0 - min(MAX_LOAD, max(0.0, self.load)))
        return (rtt_s + late_s) * (1 + sessions) * busy

    def _failed(self, why: Why, now: float) -> bool:
        """A failure that is the link's own only if others come with no draft between them."""
        self._failures += 1
        return self._failures >= FAILURES_IN_A_ROW and self._fail(why, now)

    def _broke(self, faults: int, now: float) -> bool:
        known, self._faults = self._faults, faults
        return faults > known and self._become(LinkEvent.BREAK, Why.FAULT, now)

    def _fail(self, why: Why, now: float) -> bool:
        if self.state is LinkState.HEALTHY:
            return self._become(LinkEvent.FAIL, why, now)
        if self.state is LinkState.BROKEN or why is Why.PINGS:  # nothing but silence ends its connection by itself
            return False
        if self.why is Why.PINGS:
            self.why = why
        return now - self._since_s >= DOUBT_S and self._become(LinkEvent.FAIL_ON, why, now)

    def _become(self, event: LinkEvent, why: Why | None, now: float) -> bool:
        before, self.state = self.state, LINK_TABLE[self.state, event]
        self.why = why
        if self.state is before:
            return False
        if before is LinkState.HEALTHY:
            if now - self._since_s >= TRUST_S:
                self._wait_s = FIRST_PROBE_S
            self._probe_at = now + self._wait_s
        if self.state is LinkState.HEALTHY:
            self.probing = None
            self.rows = self.drafted_rows = self.drafted_tokens = 0
            self._began_s = inf
        self._since_s = now
        return True


def patience(length: int, rtt_s: float) -> float:
    """How long an answer may take with a context of ``length`` tokens, over a round trip of ``rtt_s`` seconds."""
    return PATIENCE_S + 2.0 * rtt_s + length * PATIENCE_TOKEN_S
