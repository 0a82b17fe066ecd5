"""How many draft tokens to verify per step: policies fixed, marginal and awc, and whether drafts pay at all.

A policy turns what is known of the batch into a `Plan` per request. `Payoff` then decides for the whole step.
"""

from dataclasses import dataclass

from vllm_wanspec.core.learned.estimates import Smoothed, StepTimes

AWC_MAX = 12
AWC_WEIGHT = 0.4
AWC_ROUNDS = 2
PROBE_STEPS = 128
"""After that many steps without drafts, because they did not pay, one with drafts measures again what they cost."""
LOOK_STEPS = 8
"""After that many steps in a row whose drafts did not pay, only every so many-th step looks whether they would."""
LEARNING_STEPS = 16
"""While too few steps without drafts have been timed, every so many-th step with drafts goes without them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Verify at most ``limit`` tokens, and none that the target is less likely than ``least`` to come by."""

    limit: int
    least: float = 0.0


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a request's step takes at present, in seconds: without drafts, with drafts, and per draft token."""

    plain_s: float
    drafted_s: float
    token_s: float

    @classmethod
    def of(cls, times: StepTimes) -> "StepCost":
        """From measured times of one request's steps; all equal 1 and tokens free while nothing is known."""
        plain_s = times.plain.at(1.0) or times.drafted.at(1.0) or 1.0
        return cls(plain_s, max(plain_s, times.drafted.at(1.0)), times.token_s)


class Window:
    """Adaptive window control (AWC) of one request (DSD, arXiv 2511.21669).

    The paper's stabiliser: clamp to 1..12, moving average with weight 0.4, round; two rounds at the floor switch
    remote drafting off ("fused", here: no drafts). Its learned predictor is not to be had; here the raw window is the
    one with the highest expected tokens per second at the measured acceptance (own derivation). While off, agreement
    is still seen in the tree, and two rounds with a raw window above the floor switch back on (hysteresis).
    """

    def __init__(self) -> None:
        """Start with the widest window."""
        self._acceptance = Smoothed(0.1)
        self._average = Smoothed(AWC_WEIGHT)
        self._rounds = 0
        self._off = False
        self.size = AWC_MAX

    def observe(self, followed: int, missed: bool, cost: StepCost) -> None:
        """Take one round: ``followed`` tokens that were the draft's best, and whether another then was not."""
        for _ in range(followed):
            self._acceptance.add(1.0)
        if missed:
            self._acceptance.add(0.0)
        raw = best_window(self._acceptance.get(1.0), cost)
        self._average.add(float(min(AWC_MAX, max(1, raw))))
        rounded = round(self._average.get(AWC_MAX))
        turning = raw > 1 if self._off else rounded <= 1
        self._rounds = self._rounds + 1 if turning else 0
        if self._rounds >= AWC_ROUNDS:
            self._off, self._rounds = not self._off, 0
        self.size = 0 if self._off else rounded


def best_window(acceptance: float, cost: StepCost) -> int:
    """The number of drafts (at most `AWC_MAX`) with the highest expected tokens per second; 0: better none.

    Args:
        acceptance: Chance that the next draft token is taken, the same at each position.
        cost: What steps cost.
    """
    best, best_rate = 0, 1.0 / cost.plain_s
    expected, chance = 1.0, 1.0
    for window in range(1, AWC_MAX + 1):
        chance *= acceptance
        expected += chance
        rate = expected / (cost.drafted_s + window * cost.token_s)
        if rate > best_rate * (1.0 + 1e-9):
            best, best_rate = window, rate
    return best


class FixedLength:
    """Verify whatever is there."""

    windowed = False

    def plan(self, limit: int, window: Window | None, token_worth: float) -> Plan:
        """See `MarginalLength.plan`."""
        return Plan(limit)


class MarginalLength:
    """Verify the i-th token iff P(all of 1..i accepted) x (time a token is worth) > (extra step time of a token)."""

    windowed = False

    def plan(self, limit: int, window: Window | None, token_worth: float) -> Plan:
        """The plan of one request.

        Args:
            limit: Most tokens that vLLM takes.
            window: The request's adaptive window, with the policy that has one.
            token_worth: Extra step time of one token divided by the time that a token is worth.
        """
        return Plan(limit, token_worth)


class WindowLength:
    """Verify as many as the request's adaptive window allows: the only policy whose plan differs between requests."""

    windowed = True

    def plan(self, limit: int, window: Window | None, token_worth: float) -> Plan:
        """See `MarginalLength.plan`."""
        return Plan(limit if window is None else min(limit, window.size))


LengthPolicy = FixedLength | MarginalLength | WindowLength


def length_policy(name: str) -> LengthPolicy:
    """The policy called ``fixed``, ``marginal`` or ``awc``."""
    policies: dict[str, LengthPolicy] = {"fixed": FixedLength(), "marginal": MarginalLength(), "awc": WindowLength()}
    return policies[name]


class Payoff:
    """Switches drafts off for steps in which they would cost more than they yield, and probes now and then.

    Drafts pay iff (rows + accepted) / time with drafts > rows / time without, so iff accepted > rows x overhead. What
    will be accepted comes from the calibrated tree, which learns from every commit, offered or not: only what steps
    cost must be probed, those with drafts while they are off, those without until a few have been seen. (Own
    derivation.)
    """

    def __init__(self, times: StepTimes) -> None:
        """Decide by ``times``."""
        self._times = times
        self._off_steps = 0
        self._steps = 0

    def looks(self) -> bool:
        """Whether to ask at all what this step's drafts are worth; called once per step, before `pays`."""
        if self._off_steps < LOOK_STEPS or self._off_steps % LOOK_STEPS == 0:
            return True
        self._off_steps += 1
        return False

    def pays(self, *, rows: int, drafts: int, expected: float, full: bool) -> bool:
        """Whether to hand the target the drafts of this step.

        Args:
            rows: Requests in the step.
            drafts: Draft tokens of all of them, > 0.
            expected: How many of those the target can be expected to take.
            full: Whether every row has all the drafts that vLLM takes.
        """
        self._steps += 1
        if self._steps % LEARNING_STEPS == 0 and self._times.plain.samples < self._times.MIN_SAMPLES:
            return False
        if expected > rows * self._times.overhead(rows, rows + drafts, full=full):
            self._off_steps = 0
            return True
        self._off_steps += 1
        if self._off_steps < PROBE_STEPS:
            return False
        self._off_steps = 0
        return True
