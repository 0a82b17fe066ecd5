"""The width bench's steady load: many branches of one session that all run, with nothing committed meanwhile.

Rounds follow one another: a session opens, its tree branches everywhere until as many branches run as were asked for,
and they run until their depth or the budget of nodes ends them.  What counts is the time while about all of them run,
found afterwards from the arrivals of the nodes.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from vllm_wanspec.core.messages import Nodes
from vllm_wanspec.lab.drafter.loads import STEADY_LOOKAHEAD, Drafter, SteadyLoad
from vllm_wanspec.lab.drafter.width_figures import NEAR, SteadyRow, cpu_shares
from vllm_wanspec.lab.harness.cpu import CORE, CpuClock
from vllm_wanspec.sim.controller import DrafterClient, playing

POLL_S = 0.02
#: Phases of fewer steps would be all edges.
SHORTEST_STEPS = 16
#: A round ends when too few branches have run for this long after enough did, or when nothing comes any more.
LULL_S = 0.1
SILENCE_S = 2.0

#: A moment, and processor time by process name.
CpuSample = tuple[float, dict[str, float]]


class Trace:
    """When the tokens of a session's branches arrived.

    Attributes:
        branches: Arrival times per branch, in the order of their tokens.
        running: Branches that have begun and are not at their end.
        last_s: When anything arrived last.
        enough_s: When about as many branches as wanted were seen running last; None until then.
    """

    def __init__(self, now: float, depth: int, width: int) -> None:
        """Begin at ``now`` with a session of ``width`` branches, the side branches ``depth`` tokens long."""
        self.branches: list[list[float]] = []
        self.running = 0
        self.last_s = now
        self.enough_s: float | None = None
        self._depth = depth
        self._wanted = _wanted(width)
        self._branch_of: dict[int, int] = {}
        self._parents: set[int] = set()

    def receive(self, message: Nodes, now: float) -> None:
        """Take nodes: a position's first child is what its branch went on with, the others are leaves."""
        self.last_s = now
        for node, parent, *_ in message.nodes:
            if parent in self._parents:
                continue
            self._parents.add(parent)
            branch = self._branch_of.get(parent)
            if branch is None:
                branch = len(self.branches)
                self.branches.append([])
                self.running += 1
            self._branch_of[node] = branch
            self.branches[branch].append(now)
            self.running -= len(self.branches[branch]) == (self._depth if branch else STEADY_LOOKAHEAD)
            if self.running >= self._wanted:
                self.enough_s = now


@dataclass(frozen=True, slots=True)
class Phase:
    """A time in which about all branches ran.

    Attributes:
        begin_s: Monotonic seconds.
        end_s: Monotonic seconds.
        branch_s: Time that branches ran in it, summed over them.
        gaps_s: Times between two successive tokens of a branch, both in it.
        tokens: Arrived in it.
        starts: Branches whose first token arrived in it.
    """

    begin_s: float
    end_s: float
    branch_s: float
    gaps_s: tuple[float, ...]
    tokens: int
    starts: int


def phases(branches: Sequence[Sequence[float]], width: int) -> list[Phase]:
    """The times in which at least nine tenths of ``width`` branches were between their first and last token."""
    wanted = _wanted(width)
    changes = sorted([(times[0], 1) for times in branches] + [(times[-1], -1) for times in branches])
    found, running, branch_s, begin_s, last_s = [], 0, 0.0, 0.0, 0.0
    for at_s, change in changes:
        if running >= wanted:
            branch_s += running * (at_s - last_s)
        was, running, last_s = running, running + change, at_s
        if was < wanted <= running:
            begin_s, branch_s = at_s, 0.0
        elif running < wanted <= was:
            found.append(_phase(branches, begin_s, at_s, branch_s))
    return [phase for phase in found if len(phase.gaps_s) >= SHORTEST_STEPS * width]


def _wanted(width: int) -> int:
    return math.ceil(NEAR * width)


def _phase(branches: Sequence[Sequence[float]], begin_s: float, end_s: float, branch_s: float) -> Phase:
    gaps: list[float] = []
    tokens = starts = 0
    for times in branches:
        inside = times[bisect.bisect_left(times, begin_s) : bisect.bisect_right(times, end_s)]
        gaps += [later - earlier for earlier, later in itertools.pairwise(inside)]
        tokens += sum(at_s > begin_s for at_s in inside)
        starts += begin_s < times[0] <= end_s
    return Phase(begin_s, end_s, branch_s, tuple(gaps), tokens, starts)


def cpu_between(samples: Sequence[CpuSample], name: str, begin_s: float, end_s: float) -> float:
    """Processor seconds that ``name`` used between two moments, from samples taken now and then."""
    if not samples:
        return 0.0
    moments, used_s = zip(*((at_s, cpu_s.get(name, 0.0)) for at_s, cpu_s in samples), strict=True)
    begin, end = np.interp((begin_s, end_s), moments, used_s)
    return float(end - begin)


def summary(width: int, rounds: int, found: Sequence[Phase], samples: Sequence[CpuSample]) -> SteadyRow:
    """The figures of a window's phases; all 0 where it had none."""
    seconds = sum(phase.end_s - phase.begin_s for phase in found)
    gaps = [gap for phase in found for gap in phase.gaps_s]
    per_s = 1.0 / seconds if seconds else 0.0
    used_s = {
        name: sum(cpu_between(samples, name, phase.begin_s, phase.end_s) for phase in found)
        for name in ("api", "engine", CORE)
    }
    return SteadyRow(
        width=width,
        running=per_s * sum(phase.branch_s for phase in found),
        step_ms=1e3 * sum(gaps) / len(gaps) if gaps else 0.0,
        events_per_s=per_s * sum(phase.tokens for phase in found),
        starts_per_s=per_s * sum(phase.starts for phase in found),
        rounds=rounds,
        measured_s=seconds,
        **cpu_shares(used_s, seconds),
    )


async def measured_rounds(
    play: Callable[[], Awaitable[list[list[float]]]], cpu: CpuClock, width: int, seconds: float
) -> SteadyRow:
    """Play rounds for some seconds and measure them; ``play`` plays one, and returns when its branches' tokens came."""
    samples: list[CpuSample] = []
    found: list[Phase] = []
    rounds, end_s = 0, time.monotonic() + seconds
    async with playing(_sample(cpu, samples)):
        while time.monotonic() < end_s:
            found += phases(await play(), width)
            rounds += 1
    return summary(width, rounds, found, samples)


async def _sample(cpu: CpuClock, samples: list[CpuSample]) -> None:
    while True:
        samples.append((time.monotonic(), cpu.read()))
        await asyncio.sleep(POLL_S)


class SteadyWorkload:
    """Rounds at one drafter, each with another context."""

    def __init__(self, drafter: Drafter, load: SteadyLoad) -> None:
        self._drafter, self._load = drafter, load

    async def window(self, width: int, seconds: float) -> SteadyRow:
        """Play rounds for some seconds and measure them.

        Raises:
            DrafterError: The drafter cannot be reached or has ended a session.
        """
        async with self._drafter.connect() as client:
            return await measured_rounds(lambda: self._round(client, width), self._drafter.cpu, width, seconds)

    async def play(self, width: int) -> None:
        """Play rounds for ever."""
        await self.window(width, math.inf)

    async def _round(self, client: DrafterClient, width: int) -> list[list[float]]:
        trace = Trace(time.monotonic(), self._load.branch_depth, width)
        context, limits = next(self._drafter.texts), self._load.limits(width)
        stream = await client.open(context, limits, Random(0), watch=trace.receive)
        lull_s = silence_s = 0.0
        while lull_s < LULL_S and silence_s < SILENCE_S:
            await asyncio.sleep(POLL_S)
            now = time.monotonic()
            client.check_alive()
            lull_s = 0.0 if trace.enough_s is None else now - trace.enough_s
            silence_s = now - trace.last_s
        await stream.close()
        return trace.branches
