"""What vLLM must do otherwise where its kernels are interpreted on a CPU.

An entry point of ``vllm.general_plugins``, since vLLM calls those in each of its processes, however it started them,
and before it makes a configuration. A ``sitecustomize`` would run in every Python below the test, would have to wait
for vLLM's import by a hook of its own, and would hide one that the system has. The price: ``VLLM_PLUGINS``, where it is
set, has to name this one too.
"""

import os
from typing import Any

ASYNC_ENV = "WANSPEC_TEST_ASYNC"


def register() -> None:
    """Set all patches; what they replace has to be there."""
    _store_under_masks_of_any_type()
    _mask_logits_in_torch()
    _leave_async_scheduling_alone()


def _store_under_masks_of_any_type() -> None:
    """Make a mask boolean: a scalar and a block of booleans with `&` between them give the interpreter integers.

    vLLM's kernel that applies a grammar has such a mask.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_masked_store

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
        boolean = interpreter.TensorHandle(mask.data.astype(bool), tl.int1)
        return original(self, ptrs, value, boolean, cache_policy)

    interpreter.InterpreterBuilder.create_masked_store = create_masked_store


def _mask_logits_in_torch() -> None:
    """Top-k and top-p by vLLM's own PyTorch function: the interpreter fails in their kernel."""
    from vllm.v1.sample.ops import topk_topp_sampler as sampler

    assert callable(sampler.apply_top_k_top_p_triton)
    sampler.apply_top_k_top_p_triton = sampler.apply_top_k_top_p_pytorch


def _leave_async_scheduling_alone() -> None:
    """Keep asynchronous scheduling as it was decided on before, which the CPU's platform switches off.

    Only where ``WANSPEC_TEST_ASYNC`` is 1. What vLLM refuses for other reasons stays refused.
    """
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type[CpuPlatform], vllm_config: Any) -> None:
        scheduler_config = vllm_config.scheduler_config
        wanted = scheduler_config.async_scheduling
        original(cls, vllm_config)
        if os.environ.get(ASYNC_ENV) == "1":
            scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
