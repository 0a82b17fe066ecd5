"""What host and device share: the draft trees that the device walks, and what it tells of its drafts.

Where the platform has unified addressing, a device reads and writes pinned memory of the host. Where it has not, and is
not the host's processor itself, it has copies, which `DeviceMemory.refresh` and `DeviceMemory.collect` keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_wanspec.core.block import BLOCK_NODES, NO_WALK, Walked, Words

if TYPE_CHECKING:
    import torch

RING = 4
"""Buffers for what steps tell: more than there are steps that the host has not read yet."""


class _Shared:
    """Zeros of 64 bits that host and device know."""

    def __init__(
        self, shape: tuple[int, ...], device: torch.device, view: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> None:
        import torch

        self._copied = view is None
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=view is not None and device.type != "cpu")
        self.array: Words = self._host.numpy()
        self.tensor = torch.zeros(shape, dtype=torch.int64, device=device) if view is None else view(self._host)

    def refresh(self) -> None:
        """Bring what the host wrote to the device, in the current stream."""
        if self._copied:
            self.tensor.copy_(self._host, non_blocking=True)

    def collect(self) -> None:
        """Bring what the device wrote to the host; done when the current stream is."""
        if self._copied:
            self._host.copy_(self.tensor, non_blocking=True)


class DeviceMemory:
    """Headers and words of all slots, for one `Publication`, and a ring of buffers in which walks tell their drafts.

    The ring is there because a step's buffer is read after the next steps have been enqueued. It has separate tensors:
    all begin at addresses of the same alignment, for which Triton compiles the kernel once.

    Attributes:
        slots: Requests at most; a batch has no more rows.
        limit: Most tokens that a walk drafts.
        headers: [slots], of the host.
        words: [slots, 2, BLOCK_NODES], of the host.
        device_headers: The same as the device has them, int64.
        device_words: The same as the device has them, int64.
    """

    def __init__(
        self,
        slots: int,
        limit: int,
        device: torch.device,
        view: Callable[[torch.Tensor], torch.Tensor] | None,
        ring: int = RING,
    ) -> None:
        """Allocate.

        Args:
            slots: Most requests at a time.
            limit: Most tokens to draft, below 256.
            device: Whose streams walk.
            view: Makes the device's tensor for a pinned tensor of the host; None gives the device copies.
            ring: Buffers for what walks tell.
        """
        if not 0 < limit < 256:
            raise ValueError(f"a limit of {limit} tokens is outside 1..255")
        self.slots, self.limit = slots, limit
        self._headers = _Shared((slots,), device, view)
        self._words = _Shared((slots, 2, BLOCK_NODES), device, view)
        self._told = [_Shared((slots, 1 + limit), device, view) for _ in range(ring)]
        self.headers, self.words = self._headers.array, self._words.array
        self.device_headers, self.device_words = self._headers.tensor, self._words.tensor

    @classmethod
    def allocate(cls, slots: int, limit: int, device: torch.device) -> DeviceMemory:
        """Allocate in the way of vLLM's platform."""
        if device.type == "cpu":
            return cls(slots, limit, device, _itself)
        from vllm.utils.platform_utils import is_uva_available
        from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

        return cls(slots, limit, device, get_accelerator_view_from_cpu_tensor if is_uva_available() else None)

    def refresh(self) -> None:
        """Have the device see what has been published, where it has copies; before a walk, in its stream.

        The headers go first, as a reader loads them: see `core.block`.
        """
        self._headers.refresh()
        self._words.refresh()

    def collect(self, ring_index: int) -> None:
        """Have the host see what a walk told, where the device has copies; after the walk, in its stream."""
        self._told[ring_index].collect()

    def told(self, ring_index: int) -> Words:
        """What walks told: [slots, 1 + limit] of the host, a row for each of the batch.

        Valid once the walk's stream has passed it, for instance when an event after it has been synchronised with.
        """
        return self._told[ring_index].array

    def device_told(self, ring_index: int) -> torch.Tensor:
        """The same as the device has it, int64."""
        return self._told[ring_index].tensor

    def told_drafts(self, ring_index: int, rows: int) -> list[Walked]:
        """The drafts of the batch's first ``rows`` rows; valid when `told` is."""
        told = self._told[ring_index].array[:rows].tolist()
        return [Walked(row[1 : 1 + (row[0] & 0xFF)], row[0] >> 8 & 0xFF) if row[0] else NO_WALK for row in told]


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
