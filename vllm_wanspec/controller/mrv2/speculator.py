"""RemoteSpeculator: Model Runner V2's speculator without a model, and how it is put together."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_wanspec.controller.mrv2.binding import HostBinding, WalkBinding
from vllm_wanspec.controller.mrv2.memory import DeviceMemory
from vllm_wanspec.controller.mrv2.steps import Binding, RemoteDrafts
from vllm_wanspec.controller.mrv2.walk import DeviceWalk
from vllm_wanspec.controller.service import read_settings, start_requests
from vllm_wanspec.core.block import Publication

logger = logging.getLogger("vllm.wanspec.proposer")


class RemoteSpeculator(BaseSpeculator):  # type: ignore[misc]  # vLLM's types are not looked at
    """Stands where vLLM's speculators stand, and drafts nothing: drafts are bound later, by the wraps of `hooks`.

    Attributes:
        remote: What the wraps call.
    """

    supports_mm_inputs = False
    draft_logits = None  # a draft's distribution is its token alone

    def __init__(self, remote: RemoteDrafts, draft_tokens: torch.Tensor) -> None:
        """Give out what is in ``draft_tokens``: int64 [slots, most drafts]."""
        self.remote = remote
        self._draft_tokens = draft_tokens

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Part of vLLM's contract; nothing of it is captured."""

    def capture(self) -> None:
        """Part of vLLM's contract; nothing of it is captured."""

    def propose(self, input_batch: Any, *args: Any, dummy_run: bool = False, **kwargs: Any) -> torch.Tensor:
        """What is in the slots of a batch, int64 [rows, most drafts]: `RemoteDrafts.bind` replaces it in time.

        Where the grammar is held against it, it is replaced now.
        """
        if not dummy_run and input_batch.has_structured_output_reqs:
            self.remote.bind_early(input_batch.req_ids, input_batch.idx_mapping_np)
        with torch.inference_mode():
            if dummy_run:
                return self._draft_tokens[: input_batch.num_reqs]
            return self._draft_tokens[input_batch.idx_mapping]


def make_speculator(vllm_config: Any, device: torch.device, req_states: Any) -> RemoteSpeculator:
    """The speculator of one model runner; connects to the drafters on tensor-parallel rank 0.

    Args:
        vllm_config: vLLM's.
        device: That the model runs on.
        req_states: The runner's ``RequestState``.

    Raises:
        ConfigError: The configuration file is missing or wrong.
    """
    asynchronous = bool(vllm_config.scheduler_config.async_scheduling)
    settings, limit = read_settings(vllm_config)
    memory = DeviceMemory.allocate(req_states.max_num_reqs, limit, device) if asynchronous else None
    publication = None if memory is None else Publication(memory.headers, memory.words)
    requests = start_requests(vllm_config, settings, limit, publication)
    binding: Binding | None = None
    if requests is not None and memory is not None:
        walk = DeviceWalk(memory, req_states, limit, requests.pool.shared.vocab_size, device)
        walk.launch(torch.full((1,), -1, device=device), 0)  # compiles the kernel, before anybody waits for it
        binding = WalkBinding(walk, memory, device)
        if requests.pool.waits:
            logger.info("late: no step is held back for drafts with async scheduling; what arrives in time counts")
    elif requests is not None:
        binding = HostBinding(requests.pool, req_states.draft_tokens)
    remote = RemoteDrafts(
        requests,
        binding,
        limit,
        share=_sharing(req_states.draft_tokens) if get_tp_group().world_size > 1 else None,
        wishes=asynchronous,
        uniform=asynchronous and vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs(),
    )
    return RemoteSpeculator(remote, req_states.draft_tokens)


def _sharing(draft_tokens: torch.Tensor) -> Any:
    """Gives the first rank's drafts of some slots to all ranks, in the stream."""
    group = get_tp_group()

    def share(slots: Any) -> None:
        places = torch.as_tensor(slots, device=draft_tokens.device)
        draft_tokens[places] = group.broadcast(draft_tokens[places], src=0)

    return share
