"""What lost segments cost: TCP repeats them, so that they are seen as delay.  Pure: times and chance come in.

The model, in one direction of one connection:

- A chunk of n bytes is n / 1,460 segments, rounded up and at least one: the end of a stream and a reset are one each.
  Each is lost with probability ``loss``, independently of the others.
- The first later segment that arrives tells the sender of what is missing before it.  What is missing is then sent
  again (fast retransmit) and arrives one round trip R after that segment.
- What nothing follows is sent again after a time-out: RTO = SRTT + max(200 ms, 4 · RTTVAR), which is RFC 6298 with the
  floor where Linux has it.  A connection that has seen many round trips knows SRTT = R + jitter and RTTVAR =
  jitter / 3, the mean deviation of the sum of both directions' jitters.
- What is sent again can be lost again, which takes a time-out, each twice as long as the one before, 120 s at most.
  What was lost 15 times arrives the next time; there Linux would give the connection up.
- What follows waits (head-of-line blocking).  A chunk arrives as a whole: its first segments wait for its last.

It leaves out: the reaction of the congestion window, so that transfers of many segments are slowed less than by TCP;
that one timer per connection serves all segments, and Linux's probe (TLP) of a tail after two round trips, where more
than one segment is under way; bandwidth used by repeats; losses in bursts; a loss while a connection is set up, which
costs TCP a second.  Lost acknowledgements cost nothing, as the next one says the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from vllm_wanspec.emulate.wan_settings import WanSettings

SEGMENT_BYTES = 1460
MAX_TIMEOUT_S = 120.0  # Linux: TCP_RTO_MAX
MAX_LOSSES = 15  # of the same segment; Linux: tcp_retries2


@dataclass(frozen=True, slots=True)
class _Repeats:
    """What happens to the segments of a chunk that are sent again; seconds."""

    sent_s: float
    lost_again: int
    timeout_s: float
    one_way_s: float

    @property
    def timed_out_s(self) -> float:
        """When the first time-out is over."""
        return self.sent_s + self.timeout_s

    def arrival_s(self, repeated_s: float, *, timeouts: int) -> float:
        """When they have arrived that are sent again at this time, after so many time-outs."""
        doublings = range(timeouts, timeouts + self.lost_again)
        waits_s = sum(min(MAX_TIMEOUT_S, self.timeout_s * 2.0**count) for count in doublings)
        return repeated_s + waits_s + self.one_way_s


@dataclass(slots=True)
class Transit:
    """A chunk on its way.

    ``due_s``: when all of it has arrived, by what is known so far.  ``lost``: segments lost, each as often as it was.
    """

    due_s: float
    lost: int
    _tail: _Repeats | None = None  # its last segments, where they are lost and nothing has followed
    _rest_due_s: float = 0.0

    @property
    def waits(self) -> bool:
        """Whether what follows can bring ``due_s`` forward."""
        return self._tail is not None

    def lose_tail(self, tail: _Repeats) -> None:
        """Its last segments are lost; a time-out repeats them."""
        self._tail, self._rest_due_s = tail, self.due_s
        self.due_s = max(self.due_s, tail.arrival_s(tail.timed_out_s, timeouts=1))

    def acknowledged(self, now_s: float) -> None:
        """From this time on the sender knows that something sent later has arrived."""
        if self._tail is not None and now_s < self._tail.timed_out_s:
            self.due_s = max(self._rest_due_s, self._tail.arrival_s(now_s, timeouts=0))
        self._tail = None


class LossyPath:
    """One direction of one connection; ``rng``: source of jitter and losses."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._waiting: list[Transit] = []

    def send(self, size: int, sent_s: float, wan: WanSettings) -> Transit:
        """Put a chunk of ``size`` bytes on its way, whose last byte leaves at ``sent_s``.

        Those before it that wait for something to follow may become due earlier.
        """
        arrival_s = sent_s + wan.one_way_s(self._rng)
        losses = [self._losses(wan.loss) for _ in range(max(1, math.ceil(size / SEGMENT_BYTES)))]
        end = max((index + 1 for index, count in enumerate(losses) if count == 0), default=0)
        inner, tail = losses[:end], losses[end:]
        transit = Transit(arrival_s if inner else sent_s, sum(losses))
        if inner and (any(inner) or self._waiting):
            known_s = arrival_s + wan.one_way_s(self._rng)
            self._acknowledge(known_s)
            if any(inner):
                transit.due_s = self._repeats(inner, sent_s, wan).arrival_s(known_s, timeouts=0)
        if tail:
            transit.lose_tail(self._repeats(tail, sent_s, wan))
            self._waiting.append(transit)
        return transit

    def _acknowledge(self, now_s: float) -> None:
        for earlier in self._waiting:
            earlier.acknowledged(now_s)
        self._waiting.clear()

    def _repeats(self, losses: Sequence[int], sent_s: float, wan: WanSettings) -> _Repeats:
        return _Repeats(sent_s, max(losses) - 1, wan.retransmission_timeout_s, wan.one_way_s(self._rng))

    def _losses(self, loss: float) -> int:
        """How often a segment is lost before it arrives."""
        count = 0
        while loss and count < MAX_LOSSES and self._rng.random() < loss:
            count += 1
        return count
