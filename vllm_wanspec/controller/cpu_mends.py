"""Mends two faults of vLLM's CPU build that every speculative method meets there."""

import functools
import importlib
from typing import Any

from vllm_wanspec.ledger import Wrap

LEDGER = (
    Wrap(
        "vllm.utils.cpu_triton_utils._expand_kernel_impl",
        "The CPU build's stand-in for the expand kernel loses its result, so that temperature, top-k and top-p of "
        "draft rows are uninitialised memory with every speculative method.",
        "Replaced by a correct expansion, only where the probe shows the fault.",
        "The probe finds the original correct.",
    ),
    Wrap(
        "vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_only",
        "With speculation on, a step in which no request has a draft (a prefill) passes it no rows; on the CPU it then "
        "takes the maximum of nothing, and one request with top_k ends the engine.",
        "Wrapped to return no rows for no rows, only where the probe shows the fault.",
        "The probe finds the original correct.",
    ),
)


def repair_cpu_expand() -> bool:
    """Replace the CPU build's faulty expansion of per-request sampling parameters; True where it was faulty."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    try:
        module = importlib.import_module("vllm.utils.cpu_triton_utils")
    except ImportError:
        return False
    if not hasattr(module, "_expand_kernel_impl") or not expand_is_faulty(module._expand_kernel_impl):
        return False
    setattr(module, "_expand_kernel_impl", _expand)  # noqa: B010 - not an attribute that mypy sees
    return True


def expand_is_faulty(expand: Any) -> bool:
    """Whether an expand function, tried on a tiny input, does not write what it should."""
    import torch

    output = torch.full((3,), -7)
    arguments = (torch.tensor([5, 2], dtype=torch.int32), torch.tensor([1, 3], dtype=torch.int32), 2, 4)
    integers, reals = output.to(torch.int32), output.to(torch.float32)
    try:
        expand(integers, *arguments, MAX_NUM_TOKENS=32)
        expand(reals, arguments[0].to(torch.float32), *arguments[1:], MAX_NUM_TOKENS=32)
    except (AttributeError, RuntimeError):
        return True
    return not integers.tolist() == reals.tolist() == [5, 4, 4]


def repair_empty_top_k() -> bool:
    """Keep top-k sampling from raising in steps without drafts; True where it did."""
    import torch

    try:
        module = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    except ImportError:
        return False
    original = getattr(module, "apply_top_k_only", None)
    if original is None:
        return False
    try:
        original(torch.empty(0, 2), torch.empty(0, dtype=torch.int32))
    except (IndexError, RuntimeError):

        @functools.wraps(original)
        def apply_top_k_only(logits: Any, k: Any) -> Any:
            return original(logits, k) if logits.shape[0] else logits

        module.apply_top_k_only = apply_top_k_only  # type: ignore[attr-defined]
        return True
    return False


def _expand(
    output: Any, values: Any, cumulative: Any, replace_from: Any, replace_to: Any, MAX_NUM_TOKENS: int = 0
) -> None:
    """Repeat each request's value for each of its draft rows.

    Args:
        output: [draft rows], written.
        values: [requests].
        cumulative: [requests], draft rows up to and including each request.
        replace_from: A value that is replaced while expanding...
        replace_to: ...by this one.
        MAX_NUM_TOKENS: Part of the kernel's signature; unused.
    """
    import torch

    counts = torch.diff(cumulative, prepend=torch.zeros(1, dtype=cumulative.dtype))
    replaced = torch.where(values == replace_from, torch.as_tensor(replace_to, dtype=values.dtype), values)
    rows = torch.repeat_interleave(replaced, counts.to(torch.int64))
    output[: rows.numel()] = rows.to(output.dtype)
