"""Holding a step back for drafts that are about to arrive.

Runs in the model runner's thread with the pool's lock held, which it gives free while it waits; owns nothing. It reads
the sessions and what was measured, and counts its waits.
"""

import threading
from collections.abc import Callable, Sequence

from vllm_wanspec.config import LateSettings
from vllm_wanspec.controller.live import LiveSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.events import RecordedControllerSession
from vllm_wanspec.core.learned.meter import StepMeter
from vllm_wanspec.core.policy.lateness import Wait, worthwhile_wait

WAIT_SLICE_S = 0.002
"""While it holds a step back, it looks this often whether new requests have come."""


class LateDrafts:
    """The configured policy for drafts that are late."""

    def __init__(
        self,
        settings: LateSettings,
        meter: StepMeter,
        shared: Shared,
        *,
        clock: Callable[[], float],
        queued: Callable[[], int | None],
    ) -> None:
        """Wait as ``settings`` say.

        Args:
            settings: The policy, and the longest wait.
            meter: What the target's steps cost and yield.
            shared: What sessions count and learn.
            clock: Seconds, monotonic.
            queued: How many requests and aborts wait for the engine; None where that is not known.
        """
        self._policy = settings.policy
        self._max_wait_s = settings.max_wait_ms / 1000.0
        self._meter = meter
        self._shared = shared
        self._clock = clock
        self._queued = queued

    def hold_back(self, dry: Sequence[LiveSession], limit: int, arrived: threading.Condition) -> bool:
        """Wait for drafts about to arrive, if that is the policy; whether it waited.

        Args:
            dry: Requests that a drafter serves and that have no draft.
            limit: Most drafts per request.
            arrived: Held; notified when something has come or a link is lost.
        """
        if self._policy == "none":
            return False
        adaptive = self._policy == "adaptive"
        if adaptive:
            wait, waiting = self._worthwhile(dry, limit, self._clock())
        else:
            wait, waiting = Wait(self._max_wait_s, 1), dry
        if wait is None or all(live.has_drafts(wait.drafts) for live in waiting):
            return False
        began_s = self._clock()
        while not all(live.has_drafts(wait.drafts) for live in waiting):
            left_s = began_s + wait.seconds - self._clock()
            if left_s <= 0.0 or (adaptive and self._queued() != 0):
                break
            arrived.wait(min(left_s, WAIT_SLICE_S))
        ended_s = self._clock()
        self._shared.counters.waits += 1
        self._shared.counters.wait_seconds += ended_s - began_s
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
        agreement = self._shared.calibration.agreement()
        pace = self._meter.pace(agreement, limit)
        max_wait_s = min(self._max_wait_s, pace.longest_wait_s(len(dry)))
        until = now + max_wait_s
        expected = [(live, coming) for live in dry if (coming := live.core.coming(now, agreement, until)) is not None]
        wait = worthwhile_wait([coming for _, coming in expected], pace, now=now, max_wait_s=max_wait_s)
        if wait is None:
            return None, ()
        return wait, [live for live, coming in expected if coming.at_s <= now + wait.seconds]
