"""Turns: whose branch gets the next place at the draft engine.

The engine runs so many branches at a time; the others wait here and not in the engine's own queue, which would serve
them in the order in which they came. A turn belongs to a session, not to a branch: whoever has used less of the engine
comes first, so a session whose waiting branch is replaced by another keeps its turn.

Pure: no clock (``now`` in seconds comes in), no I/O. Connections may be any hashable objects.
"""

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

CREDIT_S = 1.0
"""Place-seconds that somebody who asked for nothing can be owed: enough to come first, too few to keep others out.
A branch runs for some tenths of a second."""
TURN_TOKENS = 32
"""Tokens of a branch that begins while others wait: more than most commits leave standing, and far less than a
session may ask for at a time."""

_TURN = attrgetter("used_s", "since")


@dataclass(slots=True, eq=False)
class _Session:
    """A session's use of the engine in place-seconds, and its branches that wait, main lines apart."""

    connection: "_Connection"
    used_s: float
    since: int = 0
    mains: dict[int, None] = field(default_factory=dict)
    sides: dict[int, None] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        return bool(self.mains or self.sides)


@dataclass(slots=True, eq=False)
class _Connection:
    """A connection's use, the places that it holds, and its sessions; ``clock_s`` is the use of the last served."""

    used_s: float
    since: int = 0
    held: int = 0
    clock_s: float = 0.0
    sessions: dict[int, _Session] = field(default_factory=dict)
    waiting: dict[_Session, None] = field(default_factory=dict)
    leading: dict[_Session, None] = field(default_factory=dict)


@dataclass(slots=True)
class _Branch:
    session: _Session
    asked_s: float
    began_s: float | None = None


class Turns:
    """The places of one engine, and who waits for them.

    The next place goes, in this order, to a connection that holds less than an equal share of them; to a main line
    before a side branch; to the connection, and of it to the session, that has used less of the engine. So a
    main line goes before side branches of anybody who is not short of his share, and many sessions of one connection
    do not take the share of another's only one.

    Attributes:
        places: Branches that the engine runs at a time.
        running: Branches that have a place.
        granted: Branches that have got one so far.
        waited_s: From asking to getting, summed over these.
    """

    def __init__(self, places: int) -> None:
        """Begin with all places free."""
        self.places = places
        self.running = 0
        self.granted = 0
        self.waited_s = 0.0
        self._clock_s = 0.0
        self._numbers = itertools.count(1)
        self._connections: dict[Hashable, _Connection] = {}
        self._asking: dict[_Connection, None] = {}
        self._branches: dict[int, _Branch] = {}

    @property
    def waiting(self) -> int:
        """Branches that wait for a place."""
        return len(self._branches) - self.running

    def ask(self, handle: int, who: Hashable, session: int, *, main: bool, now: float) -> None:
        """A branch of a connection's session wants a place.

        Args:
            handle: New number of the branch.
            who: The connection.
            session: Number of its session.
            main: Whether the branch extends the session's most probable continuation.
            now: Seconds.
        """
        its = self._session(who, session)
        self._branches[handle] = _Branch(its, now)
        connection = its.connection
        if not connection.waiting:
            connection.used_s = max(connection.used_s, self._clock_s - CREDIT_S)
            connection.since = next(self._numbers)
        if not its.waits:
            its.used_s = max(its.used_s, connection.clock_s - CREDIT_S)
            its.since = its.since or next(self._numbers)
        (its.mains if main else its.sides)[handle] = None
        self._file(its)

    def lead(self, handle: int) -> None:
        """A branch, perhaps one that waits, is its session's main line now."""
        branch = self._branches.get(handle)
        if branch is not None and handle in branch.session.sides:
            del branch.session.sides[handle]
            branch.session.mains[handle] = None
            self._file(branch.session)

    def next(self, now: float) -> int | None:
        """Give a place to whoever's turn it is; None: there is no free one, or nobody waits."""
        if self.running >= self.places or not self._asking:
            return None
        share = self.places / max(1, sum(bool(one.sessions) for one in self._connections.values()))
        connection = min(self._asking, key=lambda one: (one.held >= share, not one.leading, one.used_s, one.since))
        session = min(connection.leading or connection.waiting, key=_TURN)
        waiting = session.mains or session.sides
        handle = next(iter(waiting))
        del waiting[handle]
        self._clock_s = max(self._clock_s, connection.used_s)
        connection.clock_s = max(connection.clock_s, session.used_s)
        session.since = next(self._numbers) if session.waits else 0
        self._file(session)
        branch = self._branches[handle]
        branch.began_s = now
        connection.held += 1
        self.running += 1
        self.granted += 1
        self.waited_s += now - branch.asked_s
        return handle

    def done(self, handle: int, now: float) -> None:
        """A branch has given its place back, or waits for none any more."""
        branch = self._branches.pop(handle)
        session = branch.session
        if branch.began_s is None:
            session.mains.pop(handle, None)
            session.sides.pop(handle, None)
            self._file(session)
            return
        held_s = now - branch.began_s
        session.used_s += held_s
        session.connection.used_s += held_s
        session.connection.held -= 1
        self.running -= 1

    def leave(self, who: Hashable, session: int) -> None:
        """A session is over; its branches have been, or will be, told of as `done`."""
        connection = self._connections.get(who)
        if connection is not None:
            connection.sessions.pop(session, None)

    def leave_all(self, who: Hashable) -> None:
        """A connection is over."""
        self._connections.pop(who, None)

    def _session(self, who: Hashable, session: int) -> _Session:
        connection = self._connections.get(who)
        if connection is None:
            connection = self._connections[who] = _Connection(self._clock_s)
        its = connection.sessions.get(session)
        if its is None:
            its = connection.sessions[session] = _Session(connection, connection.clock_s)
        return its

    def _file(self, session: _Session) -> None:
        """Have a session, and its connection, where its waiting branches belong."""
        connection = session.connection
        _keep(connection.waiting, session, session.waits)
        _keep(connection.leading, session, bool(session.mains))
        _keep(self._asking, connection, bool(connection.waiting))


def _keep(known: dict[Any, None], key: Any, wanted: bool) -> None:
    if wanted:
        known[key] = None
    else:
        known.pop(key, None)
