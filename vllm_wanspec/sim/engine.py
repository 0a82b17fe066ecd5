"""The draft engine without a model on a device: continuous batching over an invented one, at a pace or by hand.

The engine owns its branches; a model's `step` alone decides what they say. Whoever drives it chooses one way: requests
that stream (`Engine.draft`, on an event loop, which then owns the engine), or `begin`, `give` and `end` by hand, where
time is what the caller says it is. ``held`` and ``fault`` may be set from any thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.sim.models import tail

__all__ = ["Branch", "Engine", "Model"]

HELD_POLL_S = 0.001
"""How often an engine without a pace looks whether it is still held back."""


class Model(Protocol):
    """A draft model: all that an engine needs."""

    def step(self, context: Sequence[int]) -> DraftStep:
        """What it says after a context, of which only the last tokens are given."""
        ...


class Branch:
    """One request of an engine: the tokens that count for the next one, and what has not been fetched yet."""

    __slots__ = ("left", "ready", "tail", "wake")

    def __init__(self, tokens: Sequence[int], max_tokens: int) -> None:
        """Go on after ``tokens``, for at most ``max_tokens``."""
        self.tail = tail(tokens)
        self.left = max_tokens
        self.ready: list[DraftStep] = []
        self.wake = asyncio.Event()


class Engine:
    """A draft engine; see `vllm_wanspec.drafter.engines.DraftEngine`.

    With a pace every step gives each running branch one token, and takes as long as the pace says for their number. Its
    tokens are made at its end in one go; tokens that a branch has not fetched by then come together, as from vLLM's
    front end. Without a pace a branch gives its next token in the event loop's next turn after it is asked.

    Attributes:
        model: What the branches say.
        held: No branch gives a token while this is set.
        fault: Raised in every branch that should give a token.
        started: Branches so far.
        tokens: Tokens given so far.
    """

    def __init__(self, model: Model, pace: Pacing | None = None) -> None:
        """Draft with ``model``; ``pace`` is the duration of a step by the branches in it."""
        self.model = model
        self.held = False
        self.fault: Exception | None = None
        self.started = 0
        self.tokens = 0
        self._pace = pace
        self._branches: dict[Branch, None] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._steps = 0
        self._busy_s = 0.0
        self._paced_s = 0.0

    @property
    def running(self) -> int:
        """Branches that have neither ended nor been dropped."""
        return len(self._branches)

    # By hand

    def begin(self, tokens: Sequence[int], max_tokens: int) -> Branch:
        """A branch that goes on after ``tokens``."""
        branch = Branch(tokens, max_tokens)
        self._branches[branch] = None
        self.started += 1
        return branch

    def give(self, branch: Branch, count: int = 1) -> list[DraftStep]:
        """The branch's next tokens, ``count`` of them or as many as are left."""
        return [self._next(branch) for _ in range(min(count, branch.left))]

    def end(self, branch: Branch) -> None:
        """Drop a branch, whether it has given all its tokens or not."""
        self._branches.pop(branch, None)

    # On an event loop

    async def draft(self, tokens: Sequence[int], max_tokens: int) -> AsyncGenerator[list[DraftStep], None]:
        """Stream the greedy continuation; closing it drops the branch."""
        branch = self.begin(tokens, max_tokens)
        try:
            while branch.left or branch.ready:
                steps = await (self._asked(branch) if self._pace is None else self._fetched(branch, self._pace))
                if steps:
                    yield steps
        finally:
            self.end(branch)

    async def _asked(self, branch: Branch) -> list[DraftStep]:
        """The next token, as fast as it is asked for; none while the engine is held back."""
        await asyncio.sleep(HELD_POLL_S if self.held else 0.0)
        if self.held:
            return []
        if self.fault is not None:
            raise self.fault
        return self.give(branch)

    async def _fetched(self, branch: Branch, pace: Pacing) -> list[DraftStep]:
        """What steps have given the branch since the last time."""
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step_on(pace))
        await branch.wake.wait()
        branch.wake.clear()
        if self.fault is not None:
            raise self.fault
        steps, branch.ready = branch.ready, []
        return steps

    async def _step_on(self, pace: Pacing) -> None:
        """Step while there are branches."""
        loop = asyncio.get_running_loop()
        due_s = ended_s = loop.time()
        while batch := list(self._branches):
            pace_s = pace.step_ms(len(batch)) / 1e3
            due_s += pace_s
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            if not self.held:
                self._step(batch)
            now_s = loop.time()
            # Against the clock, so that late timers do not add up; but time lost by overload stays lost.
            due_s = max(due_s, now_s - pace.base_ms / 2e3)
            self._steps += 1
            self._busy_s += now_s - ended_s
            self._paced_s += pace_s
            ended_s = now_s

    def _step(self, batch: list[Branch]) -> None:
        for branch in batch:
            if branch in self._branches and branch.left:
                if self.fault is None:
                    branch.ready.append(self._next(branch))
                branch.wake.set()

    def _next(self, branch: Branch) -> DraftStep:
        step = self.model.step(branch.tail)
        branch.tail = [*branch.tail[1:], step.token]
        branch.left -= 1
        self.tokens += 1
        return step

    def stats(self) -> dict[str, float]:
        """What was done so far; differences of two calls are what counts.

        ``busy_s`` is the time in steps, ``paced_s`` what it should have been; ``cpu_s`` is the process's.
        """
        return {
            "steps": self._steps,
            "tokens": self.tokens,
            "busy_s": self._busy_s,
            "paced_s": self._paced_s,
            "cpu_s": time.process_time(),
        }
