"""How drafts get into a step's input: from the host's trees, or by a walk of the device itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_wanspec.controller.mrv2.memory import RING, DeviceMemory
from vllm_wanspec.controller.mrv2.walk import DeviceWalk
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.core.block import Walked

FILLING = 0
"""An ordinary token, in the places of a draft that is shorter than what is verified, and of vLLM's placeholders."""


class HostBinding:
    """Writes what the host's trees hold: for a scheduler that waits for each step's output before the next step.

    What has arrived since the scheduler got its drafts replaces them where it is better and no longer.
    """

    def __init__(self, pool: DraftPool, draft_tokens: torch.Tensor) -> None:
        """Write into ``draft_tokens``: int64 [slots, most drafts]."""
        self._pool = pool
        self._draft_tokens = draft_tokens

    def bind(self, requests: Sequence[str], slots: Any, placed: Sequence[Sequence[int]], fixed: bool) -> None:
        """See `Binding.bind`."""
        drafts: Sequence[Sequence[int]] = placed
        if not fixed:
            drafts = self._pool.draft_again(requests, list(map(len, placed)))
        width = self._draft_tokens.shape[1]
        rows = torch.full((len(requests), width), FILLING, dtype=torch.int64)
        for row, draft in enumerate(drafts):
            if draft:
                rows[row, : len(draft)] = torch.tensor(draft, dtype=torch.int64)
        # Placeholders are -1. vLLM lays out a request with them whose prompt is cached but for its last token, and
        # does not accept what is verified in their place where a grammar keeps them.
        rows.clamp_(min=FILLING)
        device = self._draft_tokens.device
        self._draft_tokens[torch.as_tensor(slots, device=device)] = rows.to(device, non_blocking=True)


class WalkBinding:
    """Has the device walk the published trees: what it finds is known to the host when the step's output is there."""

    def __init__(self, walk: DeviceWalk, memory: DeviceMemory, device: torch.device) -> None:
        """Launch ``walk`` over ``memory``."""
        self._walk = walk
        self._memory = memory
        self._device = device
        self._launched = 0

    def bind(
        self, requests: Sequence[str], slots: Any, placed: Sequence[Sequence[int]], fixed: bool
    ) -> Callable[[], list[Walked]]:
        """See `Binding.bind`."""
        buffer = self._launched % RING
        self._launched += 1
        self._walk.launch(torch.as_tensor(slots, dtype=torch.int64).to(self._device, non_blocking=True), buffer)
        return lambda: self._memory.told_drafts(buffer, len(requests))
