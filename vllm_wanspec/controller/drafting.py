"""What the drafts of a step are: taken from the sessions' trees, waited for, gone on with by prompt lookup, weighed.

Runs in the model runner's thread with the pool's lock held. It sets each request's ``draft`` and ``offered`` and owns
the length policy and the pay-off rule; sessions open, commit and close elsewhere.
"""

import threading
from collections.abc import Callable, Sequence

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.live import LiveSession
from vllm_wanspec.controller.waiting import LateDrafts
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.draft import NO_DRAFT
from vllm_wanspec.core.learned.meter import StepMeter
from vllm_wanspec.core.policy.length import Payoff, Plan, length_policy

MAX_LOOKUP_ROWS = 16
"""Larger batches do not fall back on prompt lookup: a bound on what it adds to the serving path."""


class Drafting:
    """Makes the drafts of one step after the other.

    Attributes:
        windowed: Whether requests have adaptive windows, which the length policy reads.
        looks_up: Whether prompt lookup helps out.
        withheld: Whether the last step's drafts were not wanted: held back, not looked at, or of no length.
    """

    def __init__(
        self,
        settings: Settings,
        meter: StepMeter,
        shared: Shared,
        late: LateDrafts,
        *,
        speculation_length: int,
        clock: Callable[[], float],
        recorded: bool = False,
    ) -> None:
        """Draft as configured.

        Args:
            settings: The configuration.
            meter: What the target's steps cost and yield.
            shared: What sessions count and learn.
            late: Waits for drafts that are late.
            speculation_length: Most drafts that a request can have.
            clock: Seconds, monotonic.
            recorded: Whether the sessions tell an event log of each draft.
        """
        self._recorded = recorded
        self._policy = length_policy(settings.length.policy)
        self.windowed = self._policy.windowed
        self.looks_up = "ngram" in settings.fallback
        self.withheld = False
        self._payoff = Payoff(shared.times) if settings.length.shut_off else None
        self._meter = meter
        self._counters = shared.counters
        self._late = late
        self._speculation_length = speculation_length
        self._clock = clock

    def draft(self, batch: Sequence[LiveSession | None], limit: int, arrived: threading.Condition) -> list[list[int]]:
        """The drafts for the step to come.

        Args:
            batch: Per row its session; None for rows that get no draft.
            limit: Most tokens per row.
            arrived: See `LateDrafts.hold_back`.

        Returns:
            Drafts per row; empty where there is none.
        """
        if self._sits_out(batch):
            return [[] for _ in batch]
        plan, now = self._plan(limit), self._clock()
        self.withheld = plan.limit == 0
        dry = self._take(batch, plan, now)
        if dry and self._late.hold_back(dry, limit, arrived):
            now = self._clock()
            self._take([live for live in batch if live is not None and live.has_news], plan, now)
        if self.looks_up and len(batch) <= MAX_LOOKUP_ROWS:
            self._look_up(batch, plan, now)
        return self._handed_out(batch)

    def draft_again(self, batch: Sequence[LiveSession | None], lengths: Sequence[int]) -> list[list[int]]:
        """The drafts of a step that has been laid out, where more has arrived since: better ones of the same length.

        Args:
            batch: As `draft` got it.
            lengths: Most tokens per row.
        """
        now = self._clock()
        drafts: list[list[int]] = []
        for live, length in zip(batch, lengths, strict=True):
            if live is None or not length:
                drafts.append([])
                continue
            if live.has_news:
                draft = live.core.draft(length, 0.0, now)
                if draft.expected > live.draft.expected:
                    live.draft = draft
            drafts.append(live.draft.tokens[:length])
        return drafts

    def lengths(self, batch: Sequence[LiveSession | None], limit: int, *, uniform: bool) -> list[int]:
        """How many drafts each row should have room for in a step that is laid out before they are known.

        Args:
            batch: Per row its session; None for rows that get no draft.
            limit: Most tokens per row.
            uniform: Whether a step has the same room in all rows, or none.

        Returns:
            ``limit`` where a drafter serves the row or prompt lookup has something, else 0; 0 for all where drafts do
            not pay.
        """
        if self._sits_out(batch):
            return [0] * len(batch)
        lengths = [0 if live is None or live.link is None is live.guess else limit for live in batch]
        if uniform and any(lengths):
            lengths = [limit] * len(batch)
        places = sum(lengths)
        if places and self._payoff is not None:
            expected = sum(live.core.expected(limit) for live in batch if live is not None)
            full = places == self._speculation_length * len(batch)
            if not self._payoff.pays(rows=len(batch), drafts=places, expected=expected, full=full):
                self._counters.unpaid_steps += 1
                self.withheld = True
                return [0] * len(batch)
        return lengths

    def _sits_out(self, batch: Sequence[LiveSession | None]) -> bool:
        """Whether drafts have not paid for so long that this step does not look at any."""
        self.withheld = self._payoff is not None and not self._payoff.looks()
        if not self.withheld:
            return False
        self._counters.unpaid_steps += any(live is not None and live.link is not None for live in batch)
        return True

    def _plan(self, limit: int) -> Plan:
        """The plan of all requests; with a windowed policy only the limit that theirs start from."""
        return Plan(limit) if self.windowed else self._policy.plan(limit, None, self._meter.token_worth())

    def _own_plan(self, live: LiveSession, plan: Plan) -> Plan:
        return self._policy.plan(plan.limit, live.core.window, 0.0) if self.windowed else plan

    def _take(self, batch: Sequence[LiveSession | None], plan: Plan, now: float) -> list[LiveSession]:
        """Draft with all that has arrived by now; those for which nothing has that a drafter serves."""
        own, windowed, recorded = plan, self.windowed, self._recorded
        dry: list[LiveSession] = []
        for live in batch:
            if live is None:
                continue
            if windowed:
                own = self._own_plan(live, plan)
            tree = live.core.tree
            if tree is None:
                live.draft = live.core.draft(own.limit, own.least, now) if recorded else NO_DRAFT
                continue
            draft = live.core.draft(own.limit, own.least, now) if recorded else tree.draft(own.limit, own.least)
            live.draft = draft
            if not draft.drafted:
                dry.append(live)
        return dry

    def _look_up(self, batch: Sequence[LiveSession | None], plan: Plan, now: float) -> None:
        """Go on with prompt lookup where a draft is short."""
        for live in batch:
            if live is not None and len(live.draft.drafted) < plan.limit:
                own = self._own_plan(live, plan)
                live.draft = live.core.fall_back(live.draft, own.limit, own.least, now)

    def _handed_out(self, batch: Sequence[LiveSession | None]) -> list[list[int]]:
        """The drafts as the target gets them: all of them, or none where they do not pay."""
        offered = offered_drafted = 0
        expected = 0.0
        drafts: list[list[int]] = [[] for _ in batch]
        for row, live in enumerate(batch):
            if live is not None and live.draft is not NO_DRAFT:
                drafted, worth, _, guess, _, _ = live.draft
                count = len(drafted) + len(guess)
                live.offered = count > 0
                if count:
                    drafts[row] = [*drafted, *guess]
                    offered += count
                    offered_drafted += len(drafted)
                    expected += worth
        if offered and self._payoff is not None:
            full = offered == self._speculation_length * len(batch)
            if not self._payoff.pays(rows=len(batch), drafts=offered, expected=expected, full=full):
                self._counters.unpaid_steps += 1
                self.withheld = True
                for live in batch:
                    if live is not None:
                        live.offered = False
                return [[] for _ in batch]
        self._counters.offered_tokens += offered
        self._counters.offered_drafted += offered_drafted
        return drafts
