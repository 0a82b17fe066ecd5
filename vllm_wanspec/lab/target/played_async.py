"""The played target as Model Runner V2 steps it with async scheduling: drafts are bound when a step is laid out.

What a device would do, the walk of the published trees, runs here too, off the clock: the host's part is measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_wanspec.config import Settings, TreeSettings
from vllm_wanspec.controller.mrv2.binding import WalkBinding
from vllm_wanspec.controller.mrv2.memory import DeviceMemory
from vllm_wanspec.controller.mrv2.steps import PLACEHOLDER, RemoteDrafts
from vllm_wanspec.controller.mrv2.walk import DeviceWalk
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.controller.requests import Requests
from vllm_wanspec.core.block import Publication
from vllm_wanspec.lab.target.played import make_pool
from vllm_wanspec.sim.models import Language
from vllm_wanspec.sim.target import PlayedTarget, Timing, Workload

HERE = torch.device("cpu")


class AsyncProposer:
    """What the wraps of Model Runner V2 call in a step, in the form of a proposer."""

    def __init__(self, pool: DraftPool, tree: TreeSettings, memory: DeviceMemory) -> None:
        """Serve from a pool that publishes into ``memory``."""
        self._requests = Requests(pool, tree)
        self._pool, self._memory = pool, memory
        self._walk: _OffClock | None = None
        self._remote: RemoteDrafts | None = None
        self._slots = np.arange(memory.slots)
        self._step: Any = None

    @property
    def failed(self) -> bool:
        """Whether a fault of ours has ended drafting."""
        return self._requests.failed

    @property
    def off_clock(self) -> Timing:
        """What the device's part has taken so far."""
        return Timing(0, 0) if self._walk is None else Timing(self._walk.wall_ns, self._walk.cpu_ns)

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        """A step is laid out: requests go and come, and drafts are bound."""
        remote = self._remote or self._attach(runner)
        names = runner.input_batch.req_ids
        remote.finished(scheduler_output)
        if scheduler_output.scheduled_new_reqs:
            remote.added(scheduler_output, {name: row for row, name in enumerate(names)})
        remote.bind(scheduler_output, names, self._slots)
        self._step = remote.take_step()

    def bound(self) -> list[list[int]]:
        """Per row what the device found for the step that was laid out."""
        if self._step.told is None:
            return [[] for _ in self._slots]
        return [walked.tokens for walked in self._step.told()]

    def propose(self, sampled_token_ids: list[list[int]], lengths: Any, contexts: Any) -> list[list[int]]:
        """The step's output is there; per row the placeholders that the scheduler is to lay out."""
        assert self._remote is not None, "no step has begun"
        wish = self._remote.ended(self._step, sampled_token_ids) or {}
        return [[PLACEHOLDER] * wish.get(name, 0) for name in self._step.requests]

    def _attach(self, runner: Any) -> RemoteDrafts:
        rows, limit = runner.contexts.shape[0], self._memory.limit
        states = SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=torch.from_numpy(runner.contexts)),
            total_len=SimpleNamespace(gpu=torch.from_numpy(runner.lengths)),
            draft_tokens=torch.zeros((rows, limit), dtype=torch.int64),
            last_sampled_tokens=torch.zeros((rows, 1), dtype=torch.int64),
        )
        vocab_size = self._pool.shared.vocab_size
        self._walk = _OffClock(self._memory, states, limit, vocab_size, HERE)
        binding = WalkBinding(self._walk, self._memory, HERE)
        self._remote = RemoteDrafts(self._requests, binding, limit, wishes=True)
        return self._remote


class _OffClock(DeviceWalk):
    """A walk that notes how long it takes, in nanoseconds: on the clock, and on the thread's processor."""

    wall_ns = cpu_ns = 0

    def launch(self, idx_mapping: torch.Tensor, ring_index: int) -> None:
        """See `DeviceWalk.launch`."""
        cpu_ns, began_ns = time.thread_time_ns(), time.perf_counter_ns()
        super().launch(idx_mapping, ring_index)
        self.wall_ns += time.perf_counter_ns() - began_ns
        self.cpu_ns += time.thread_time_ns() - cpu_ns


class PlayedAsyncTarget(PlayedTarget):
    """Verifies what the device has found; steps come one after the other, so that each is laid out with all tokens."""

    def __init__(self, proposer: AsyncProposer, language: Language, workload: Workload) -> None:
        """As `PlayedTarget`."""
        super().__init__(proposer, language, workload, off_clock=lambda: proposer.off_clock)
        self._async = proposer

    def _drafts(self, laid_out: Sequence[Sequence[int]]) -> list[list[int]]:
        return [found[: len(places)] for found, places in zip(self._async.bound(), laid_out, strict=True)]


def make_async(
    settings: Settings, language: Language, workload: Workload
) -> tuple[DraftPool, AsyncProposer, PlayedAsyncTarget]:
    """A pool that publishes for a device, what serves from it, and the target; nothing has been started."""
    memory = DeviceMemory.allocate(workload.rows, workload.limit, HERE)
    pool = make_pool(settings, language, workload.limit, Publication(memory.headers, memory.words))
    proposer = AsyncProposer(pool, settings.tree, memory)
    return pool, proposer, PlayedAsyncTarget(proposer, language, workload)
