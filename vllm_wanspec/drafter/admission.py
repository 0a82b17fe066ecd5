"""Admission: which sessions a drafter takes.

What it has promised to those that it serves goes first: a new session is refused where there are too many, where the
contexts of all would no longer fit into the engine's KV cache together, and where new ones already wait too long for
their first token. Pure: no clock (``now`` in seconds comes in), no I/O.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import islice

SESSIONS_PER_PLACE = 16
"""Beyond that a session's turn comes once in sixteen, with drafts for texts that have gone on elsewhere meanwhile."""
FIRST_TOKEN_BOUND_S = 3.0
"""Longest time to a session's first token that is no overload: a request of 256 tokens at 35 ms each lives for nine
seconds, and one that gets its first draft after a third of them is better off with another drafter, or with none. The
prefill of a context of 32,000 tokens fits in at ten thousand tokens per second."""
LATE_SESSIONS = 4
"""So many late first tokens are a queue; fewer may be long contexts."""
RECENT_FIRSTS = 8
RECENT_S = 5.0
"""What was measured longer ago says nothing: without it nobody would be let in again after an overload."""
SESSION_IDLE_S = 120.0
"""A session without a commit for so long is ended: targets commit many times a second. One whose request still waits
in its target's queue loses nothing but a context that is sent once more."""

SESSIONS, CONTEXT, SLOW, DRAINING = "sessions", "context", "slow", "draining"
"""Why a session is refused as overloaded."""


@dataclass(slots=True)
class _Seat:
    """One session: the tokens of its context, and whether it waits for, or has got, its first token."""

    tokens: int
    answered: bool = False


class Admission:
    """The sessions of one drafter; they have any hashable keys.

    Attributes:
        context_tokens: In the contexts of all sessions.
        draining: No more sessions are taken.
    """

    def __init__(
        self, *, sessions: int, capacity_tokens: int | None = None, first_token_s: float = FIRST_TOKEN_BOUND_S
    ) -> None:
        """Begin without sessions.

        Args:
            sessions: Most at a time.
            capacity_tokens: What the engine's KV cache holds; None where that is not known. Contexts that have common
                beginnings take less than is counted.
            first_token_s: Bound of the time to a session's first token.
        """
        self.context_tokens = 0
        self.draining = False
        self._most = sessions
        self._capacity_tokens = capacity_tokens
        self._first_token_s = first_token_s
        self._seats: dict[Hashable, _Seat] = {}
        self._pending: dict[Hashable, float] = {}
        self._firsts: deque[tuple[float, float]] = deque(maxlen=RECENT_FIRSTS)

    @property
    def sessions(self) -> int:
        """Sessions that were admitted and are not over."""
        return len(self._seats)

    def refusal(self, tokens: int, now: float) -> str | None:
        """Why a session with so long a context is not taken now; None: it is.

        The first session is always taken: no context that the model takes is too long for its cache.
        """
        if self.draining:
            return DRAINING
        if not self._seats:
            return None
        if len(self._seats) >= self._most:
            return SESSIONS
        if self._capacity_tokens is not None and self.context_tokens + tokens > self._capacity_tokens:
            return CONTEXT
        return SLOW if self._is_slow(now) else None

    def opened(self, key: Hashable, tokens: int) -> None:
        """A session was taken, with a context of so many tokens."""
        self._seats[key] = _Seat(tokens)
        self.context_tokens += tokens

    def grew(self, key: Hashable, tokens: int) -> None:
        """A session's context has so many tokens more. It may outgrow the cache: those that are served go on."""
        seat = self._seats.get(key)
        if seat is not None:
            seat.tokens += tokens
            self.context_tokens += tokens

    def asked(self, key: Hashable, now: float) -> None:
        """A branch of a session was asked for: the wait for its first token begins with the first one."""
        seat = self._seats.get(key)
        if seat is not None and not seat.answered:
            self._pending.setdefault(key, now)

    def answered(self, key: Hashable, now: float) -> None:
        """The engine gave a token for a session."""
        asked_s = self._pending.pop(key, None)
        if asked_s is not None:
            self._seats[key].answered = True
            self._firsts.append((now, now - asked_s))

    def closed(self, key: Hashable) -> None:
        """A session is over."""
        seat = self._seats.pop(key, None)
        self._pending.pop(key, None)
        if seat is not None:
            self.context_tokens -= seat.tokens

    def _is_slow(self, now: float) -> bool:
        """Whether more first tokens are late than in time, of those that came lately and those that are due longest."""
        recent = [waited_s for at_s, waited_s in self._firsts if now - at_s <= RECENT_S]
        due = sum(now - asked_s > self._first_token_s for asked_s in islice(self._pending.values(), RECENT_FIRSTS))
        late = due + sum(waited_s > self._first_token_s for waited_s in recent)
        return late >= LATE_SESSIONS and late > len(recent) + due - late
