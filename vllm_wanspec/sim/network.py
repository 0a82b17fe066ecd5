"""The virtual network: what one side sends arrives at the other on the caller's clock.

A wire owns the frames that are on it; the sender puts them on, the receiver takes them off. Its delay and jitter may be
changed at any moment, and hold for what is sent afterwards. Times are in whatever unit the clock counts, as long as
delay and jitter are in the same one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from random import Random

__all__ = ["Wire"]


class Wire:
    """One direction: frames arrive in order, ``delay`` to ``delay + jitter`` after they were sent.

    Later than that only where a frame before them does: as on TCP, nothing overtakes.

    Attributes:
        delay: One way.
        jitter: What is added to it at most, drawn for each frame; whole units.
        last: The frame sent last, whether it has arrived or not.
    """

    def __init__(self, delay: int, jitter: int, rng: Random) -> None:
        """Begin without frames; ``rng`` draws the jitter."""
        self.delay = delay
        self.jitter = jitter
        self.last = b""
        self._rng = rng
        self._frames: deque[tuple[int, bytes]] = deque()

    @property
    def in_flight(self) -> int:
        """Frames that have not arrived."""
        return len(self._frames)

    def send(self, now: int, frames: Iterable[bytes]) -> None:
        """Put frames on the wire."""
        for frame in frames:
            due = now + self.delay + (self._rng.randint(0, self.jitter) if self.jitter else 0)
            if self._frames:
                due = max(due, self._frames[-1][0])
            self._frames.append((due, frame))
            self.last = frame

    def arrived(self, now: int) -> list[bytes]:
        """Take off what has arrived by now."""
        found = []
        while self._frames and self._frames[0][0] <= now:
            found.append(self._frames.popleft()[1])
        return found

    def cut(self) -> None:
        """Lose all that is in flight."""
        self._frames.clear()
