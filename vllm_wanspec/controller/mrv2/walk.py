"""The device walk: the newest draft of each request of a batch, found where the tokens are sampled.

On a device the walk is a kernel in the stream of the step, so the host neither waits for the step before nor knows its
tokens. On a processor the walk of `core.block` runs at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_wanspec.controller.mrv2.memory import DeviceMemory
from vllm_wanspec.core.block import BLOCK_NODES, MAX_FOLLOWED, UNDER_ROOT, walk

if TYPE_CHECKING:
    import torch


class DeviceWalk:
    """Walks the published trees for the requests of a batch."""

    def __init__(
        self, memory: DeviceMemory, req_states: Any, limit: int, vocab_size: int, device: torch.device
    ) -> None:
        """Walk over a memory, for the requests of a model runner.

        Args:
            memory: Where trees are published, and drafts told.
            req_states: vLLM's `RequestState`: `all_token_ids`, `total_len`, `last_sampled_tokens` and `draft_tokens`.
            limit: Most tokens to draft; the memory's own.
            vocab_size: Ids are below this.
            device: Where the request states are.
        """
        width = req_states.draft_tokens.shape[1]
        if limit != memory.limit or limit > width:
            raise ValueError(f"a limit of {limit} tokens for memory that holds {memory.limit} and drafts of {width}")
        self._memory = memory
        self._req_states = req_states
        self._limit = limit
        self._vocab_size = vocab_size
        self._on_device = device.type != "cpu"

    def launch(self, idx_mapping: torch.Tensor, ring_index: int) -> None:
        """Write the drafts of a batch's requests, in the current stream.

        They go into `req_states.draft_tokens`, where places without a draft get the request's last sampled token, which
        is verified as any other, and into the memory's buffer `ring_index`; see `DeviceMemory.told`.

        Args:
            idx_mapping: Integers [rows], the slot of each row; a negative one has no draft.
            ring_index: Below `memory.RING`.
        """
        if idx_mapping.shape[0] == 0:
            return
        if self._on_device:
            self.run_kernel(idx_mapping, ring_index)
        else:
            self._run_here(idx_mapping, ring_index)

    def run_kernel(self, idx_mapping: torch.Tensor, ring_index: int, *, count_dropped: bool = False) -> None:
        """Enqueue the kernel; as `launch`, on a device or in Triton's interpreter.

        Args:
            idx_mapping: See `launch`; at least one row.
            ring_index: See `launch`.
            count_dropped: See `kernel.walk_kernel`.
        """
        from vllm_wanspec.controller.mrv2.kernel import walk_kernel

        memory, states = self._memory, self._req_states
        token_ids, drafts = states.all_token_ids.gpu, states.draft_tokens
        memory.refresh()
        walk_kernel[(idx_mapping.shape[0],)](
            memory.device_headers,
            memory.device_words,
            token_ids,
            token_ids.stride(0),
            states.total_len.gpu,
            states.last_sampled_tokens,
            idx_mapping,
            drafts,
            drafts.stride(0),
            memory.device_told(ring_index),
            BLOCK=BLOCK_NODES,
            UNDER_ROOT=UNDER_ROOT,
            FOLLOW=MAX_FOLLOWED,
            LIMIT=self._limit,
            COLUMNS=1 << (self._limit - 1).bit_length(),
            VOCAB=self._vocab_size,
            COUNT_DROPPED=count_dropped,
            # A warp has four words a lane, and finds their maximum without a barrier.
            num_warps=1,
        )
        memory.collect(ring_index)

    def _run_here(self, idx_mapping: torch.Tensor, ring_index: int) -> None:
        memory, states, limit = self._memory, self._req_states, self._limit
        told = memory.told(ring_index)
        token_ids, lengths = states.all_token_ids.gpu.numpy(), states.total_len.gpu.numpy()
        drafts, last_sampled = states.draft_tokens.numpy(), states.last_sampled_tokens.numpy()
        for row, slot in enumerate(idx_mapping.tolist()):
            if slot < 0:
                told[row, 0] = 0
                continue
            header = int(memory.headers[slot])
            words = memory.words[slot, header & 1].tolist()
            tokens, looked_up = walk(header, words, token_ids[slot], int(lengths[slot]), limit, self._vocab_size)
            drafts[slot, :limit] = last_sampled[slot, 0]
            drafts[slot, : len(tokens)] = tokens
            told[row, 0] = len(tokens) | looked_up << 8
            told[row, 1:] = drafts[slot, :limit]
