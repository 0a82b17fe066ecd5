"""What the target's steps cost and yield, as measured: what a draft token, or waiting for one, is held against."""

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from vllm_wanspec.core.learned.estimates import Smoothed, StepTimes

ASSUMED_STEP_S = 0.030


@dataclass(frozen=True, slots=True)
class Pace:
    """How the batch does at present.

    Attributes:
        rows: Requests in it.
        step_s: Time of one verification step.
        tokens_per_step: Mean tokens that one request gets per step.
        tokens_per_drafted_step: The same over steps for which the request had a draft.
        agreement: Chance that the target takes the draft model's best token.
        limit: Most drafts per request and step.
        tokens_per_dry_step: Mean tokens of steps for which the request had no draft, prompt lookup included.
    """

    rows: int
    step_s: float
    tokens_per_step: float
    tokens_per_drafted_step: float
    agreement: float
    limit: int
    tokens_per_dry_step: float = 1.0

    @property
    def yield_per_s(self) -> float:
        """Tokens per second of the whole batch: what each second of waiting costs."""
        return self.rows * self.tokens_per_step / self.step_s

    def longest_wait_s(self, chances: float) -> float:
        """No wait gains more than all that the requests without a draft could gain; ``chances``: the sum of theirs."""
        yield_per_s = self.yield_per_s
        gain = max(0.0, self.tokens_per_step - self.tokens_per_dry_step)
        return gain * chances / yield_per_s if yield_per_s > 0.0 else inf


class Began(NamedTuple):
    """The beginning of a step; see `StepMeter.begins`."""

    at_s: float
    tokens: int
    drafts: int


class StepMeter:
    """Times the target's steps, and averages what they yield.

    Attributes:
        step_s: Time of a step in seconds.
        tokens_per_step: That one request gets, whether or not it had a draft.
        tokens_per_drafted_step: The same over requests that had one.
        tokens_per_dry_step: The same over requests that had none, or what prompt lookup guessed.
    """

    def __init__(self, times: StepTimes, speculation_length: int) -> None:
        """Start without measurements.

        Args:
            times: Learns what steps cost.
            speculation_length: Most drafts that a request can have.
        """
        self.step_s = Smoothed()
        self.tokens_per_step = Smoothed(0.05)
        self.tokens_per_drafted_step = Smoothed(0.05)
        self.tokens_per_dry_step = Smoothed(0.05)
        self._times = times
        self._speculation_length = speculation_length
        self._began: Began | None = None
        self._ended_s = -inf
        self._rows = 1

    @property
    def seconds(self) -> float:
        """Time of a step; a usual one before the first is measured."""
        return self.step_s.get(ASSUMED_STEP_S)

    def begins(self, now: float, tokens: int, drafts: int) -> Began:
        """A step begins; what is returned may be given to `ends`, where steps begin before others have ended.

        Args:
            now: Seconds.
            tokens: Tokens in the step, where all of its rows decode; 0 for a step whose time is no example.
            drafts: How many of them are drafts.
        """
        self._began = Began(now, tokens, drafts)
        return self._began

    def ends(self, now: float, rows: int, yielded: int, began: Began | None = None) -> bool:
        """The step ends, with ``yielded`` tokens for ``rows`` requests; whether its time was an example.

        Its time counts from its beginning, or from the end of the step before where that came later.
        """
        if began is None:
            began, self._began = self._began, None
        if began is None:
            return False
        began_s, tokens, drafts = began
        began_s, self._ended_s = max(began_s, self._ended_s), now
        self.step_s.add(now - began_s)
        if not tokens:
            return False
        self._rows = rows
        full = drafts == self._speculation_length * rows
        self._times.add(tokens, drafts=drafts, full=full, seconds=now - began_s)
        self.tokens_per_step.add(yielded / max(1, rows))
        return True

    def token_worth(self) -> float:
        """Extra step time of one token divided by the time that a token is worth to the whole batch."""
        return self._times.token_s * self._rows * self.tokens_per_step.get(1.0) / self.seconds

    def pace(self, agreement: float, limit: int) -> Pace:
        """How the batch does; ``agreement`` and ``limit`` as in `Pace`."""
        return Pace(
            rows=self._rows,
            step_s=self.seconds,
            tokens_per_step=self.tokens_per_step.get(1.0),
            tokens_per_drafted_step=self.tokens_per_drafted_step.get(1.0),
            agreement=agreement,
            limit=limit,
            tokens_per_dry_step=self.tokens_per_dry_step.get(1.0),
        )
