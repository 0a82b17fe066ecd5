"""The width bench's churning load: one session whose text moves on while the drafter is watched."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from random import Random

from vllm_wanspec.lab.drafter.loads import COMMIT_INTERVAL_S, LONGEST_LEAD, ChurningLoad, Drafter
from vllm_wanspec.lab.drafter.width_figures import ChurnRow, cpu_shares
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.scrape import read_samples
from vllm_wanspec.lab.stats import divided
from vllm_wanspec.sim.controller import Tally, keep_committing, playing

#: The text's end keeps this far from the model's longest context: a branch near it would be cut short.
MARGIN_TOKENS = 40
WATCHED = ("drafted_tokens", "branches_started", "branch_seconds", "gap_seconds", "first_seconds", "first_tokens")


@dataclass(frozen=True, slots=True)
class Reading:
    """A drafter at one moment.

    Attributes:
        at_s: Monotonic seconds.
        counters: Its own.
        cpu_s: Processor time by process name, and that of all programs on the drafter's core.
        tally: What the controller's side has received and committed.
    """

    at_s: float
    counters: Counters = field(default_factory=Counters)
    cpu_s: dict[str, float] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)


def churn_row(width: int, before: Reading, after: Reading) -> ChurnRow:
    """The figures of what happened between two readings; what the drafter does not count is 0."""
    seconds = after.at_s - before.at_s
    grown = after.counters.since(before.counters).values
    drafted, started, running_s, gap_s, first_s, firsts = (grown.get(name, 0.0) for name in WATCHED)
    used_s = {name: now_s - before.cpu_s.get(name, 0.0) for name, now_s in after.cpu_s.items()}
    return ChurnRow(
        width=width,
        running=running_s / seconds,
        step_ms=divided(1e3 * running_s, drafted) or 0.0,
        gap_ms=divided(1e3 * gap_s, drafted - firsts) or 0.0,
        first_ms=divided(1e3 * first_s, firsts) or 0.0,
        events_per_s=drafted / seconds,
        starts_per_s=started / seconds,
        bytes_per_s=(after.tally.received_bytes - before.tally.received_bytes) / seconds,
        committed_per_s=(after.tally.committed - before.tally.committed) / seconds,
        **cpu_shares(used_s, seconds),
    )


class ChurningWorkload:
    """One session after another at one drafter, as wide as its text has candidates for.

    Attributes:
        tally: What they received and committed.
    """

    def __init__(self, drafter: Drafter, load: ChurningLoad, seed: int, warm_up_s: float) -> None:
        """Ask for ``load``; ``seed`` draws what is committed, and a window begins after ``warm_up_s`` of it."""
        self.tally = Tally()
        self._drafter, self._load, self._warm_up_s = drafter, load, warm_up_s
        self._rng = Random(seed)

    async def window(self, width: int, seconds: float) -> ChurnRow:
        """Watch for some seconds.

        Raises:
            ClientError: The metrics cannot be read.
            DrafterError: The drafter cannot be reached or has ended a session.
        """
        async with playing(self.play(width)):
            await asyncio.sleep(self._warm_up_s)
            before = await self.read()
            await asyncio.sleep(seconds)
            return churn_row(width, before, await self.read())

    async def play(self, width: int) -> None:
        """Keep a session going for ever."""
        while True:
            # The drafter learns per connection which alternatives are worth a branch: a fresh one for each session
            # keeps what is asked of the engine the same in all windows.
            async with self._drafter.connect(self.tally) as client:
                stream = await client.open(next(self._drafter.texts), self._load.limits(width), self._rng)
                longest = client.welcome.max_context - MARGIN_TOKENS
                await keep_committing(stream, COMMIT_INTERVAL_S, self._load.commit_tokens, LONGEST_LEAD, longest)
                await stream.close()

    async def read(self) -> Reading:
        """Read the drafter's counters, and its processes' time.

        Raises:
            ClientError: The metrics cannot be read.
        """
        samples = await read_samples(self._drafter.http, f"{self._drafter.url}/metrics")
        cpu_s = self._drafter.cpu.read()
        return Reading(time.monotonic(), Counters.of(samples, WATCHED), cpu_s, replace(self.tally))
