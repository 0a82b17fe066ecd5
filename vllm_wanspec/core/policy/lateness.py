"""Whether to hold a step back for drafts that will arrive in a moment.

The wait stops the whole engine, so it must be worth more than the tokens that all requests would yield meanwhile.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_wanspec.core.learned.meter import Pace
from vllm_wanspec.core.turnaround import Coming


@dataclass(frozen=True, slots=True)
class Wait:
    """Hold the next step back for at most ``seconds``, or until each request waited for has ``drafts`` drafts."""

    seconds: float
    drafts: int


def worthwhile_wait(coming: Iterable[Coming], pace: Pace, *, now: float, max_wait_s: float) -> Wait | None:
    """How long to hold the next step back; None for not at all.

    A step held back by w costs what the whole batch yields in that time: ``rows * y * w / t_v`` tokens, where y is the
    mean yield of a request per step. A request for which j drafts have arrived by then gains: without the wait it
    makes a step without (F tokens, 1 if nothing falls back on prompt lookup) and a step with drafts follows (D tokens),
    with it the step yields E_j at once. Over the renewal cycle the difference is ``(y - F) - (D - E_j)`` tokens,
    E_j = 1 + a + ... + a^j being the expected yield with j drafts at agreement a, D the mean yield of steps with
    drafts. For one request, F = 1 and E_j = D this is the design's ``w < t_v - 1/r``. (Own derivation, first order.)

    Args:
        coming: Requests without a draft.
        pace: Of the batch.
        now: Seconds.
        max_wait_s: Never more than this.
    """
    requests = list(coming)
    if not requests:
        return None
    cost, values = pace.yield_per_s, _values(pace)
    farthest_s = min(max_wait_s, pace.longest_wait_s(sum(request.chance for request in requests)))
    arrivals: list[tuple[float, int, float]] = []
    for request in requests:
        wait_s, before = max(0.0, request.at_s - now), 0.0
        for drafts, value in enumerate(values, start=1):
            if wait_s > farthest_s:
                break
            arrivals.append((wait_s, drafts, request.chance * (value - before)))
            wait_s, before = wait_s + request.gap_s, value
    best, best_gain, gathered = None, 0.0, 0.0
    for wait_s, drafts, gain in sorted(arrivals):
        gathered += gain
        if gathered - cost * wait_s > best_gain:
            best, best_gain = Wait(wait_s, drafts), gathered - cost * wait_s
    return best


def _values(pace: Pace) -> list[float]:
    """What a request gains in tokens by having 1, 2, … drafts instead of none."""
    values: list[float] = []
    yielded, chance = 1.0, 1.0
    for _ in range(pace.limit):
        chance *= pace.agreement
        yielded += chance
        loss = max(0.0, pace.tokens_per_drafted_step - yielded)
        values.append(pace.tokens_per_step - pace.tokens_per_dry_step - loss)
    return values
