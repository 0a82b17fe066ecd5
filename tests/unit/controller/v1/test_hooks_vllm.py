"""The wraps and repairs on the installed vLLM."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from vllm_wanspec.controller import cpu_mends, engine, front
from vllm_wanspec.controller.v1 import hooks

pytestmark = pytest.mark.vllm


def pristine(name: str) -> ModuleType:
    """A module of vLLM as installed, whatever has been repaired in this process."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cpu() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the faults are the CPU build's")


def test_the_installed_vllm_passes_the_probe() -> None:
    hooks.check()
    front.check_requests()


def test_every_entry_of_the_ledger_is_there_in_the_installed_vllm() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for wrap in (*front.LEDGER, *cpu_mends.LEDGER, *engine.LEDGER, *hooks.LEDGER):
        target = wrap.target.split(" ")[0]
        if target.startswith("GPUModelRunner."):
            name = target.split(".")[1]
            assert hasattr(GPUModelRunner, name) or name in inspect.unwrap(GPUModelRunner.__init__).__code__.co_names
            continue
        parts = target.split(".")
        depth = next(n for n in range(len(parts), 0, -1) if _is_module(".".join(parts[:n])))
        owner: Any = importlib.import_module(".".join(parts[:depth]))
        for part in parts[depth:]:
            owner = getattr(owner, part)
        assert callable(owner)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.usefixtures("cpu")
def test_the_repair_of_expand_is_still_needed() -> None:
    """Where this fails, vLLM has mended it: take the repair and its ledger entry out."""
    assert cpu_mends.expand_is_faulty(pristine("vllm.utils.cpu_triton_utils")._expand_kernel_impl)


@pytest.mark.usefixtures("cpu")
def test_the_repair_of_top_k_is_still_needed() -> None:
    """Where this fails, vLLM has mended it: take the repair and its ledger entry out."""
    import torch

    original = pristine("vllm.v1.sample.ops.topk_topp_sampler").apply_top_k_only
    with pytest.raises((IndexError, RuntimeError)):
        original(torch.empty(0, 2), torch.empty(0, dtype=torch.int32))


def test_our_expand_is_right() -> None:
    assert not cpu_mends.expand_is_faulty(cpu_mends._expand)


def test_expand_against_a_loop() -> None:
    import torch

    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.int32, torch.int64, torch.float32):
        for _ in range(20):
            counts = torch.randint(0, 5, (6,), generator=generator)
            values = torch.randint(0, 4, (6,), generator=generator).to(dtype)
            output = torch.full((int(counts.sum()) + 3,), -9).to(dtype)
            cpu_mends._expand(output, values, counts.cumsum(0).to(torch.int32), 0, 1, MAX_NUM_TOKENS=32)
            expected = [
                1 if value == 0 else value
                for value, count in zip(values.tolist(), counts.tolist(), strict=True)
                for _ in range(count)
            ]
            assert output.tolist() == [*expected, -9, -9, -9]


def broken(*args: object, **kwargs: object) -> None:
    raise AttributeError("no such thing")


@pytest.mark.parametrize("expand", [broken, lambda *args, **kwargs: None])
def test_expands_that_fail_or_do_nothing_are_faulty(expand: Callable) -> None:
    assert cpu_mends.expand_is_faulty(expand)


@pytest.mark.usefixtures("cpu")
def test_installing_twice_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils import cpu_triton_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    # Set first as installed, so that pytest puts everything back.
    expand = pristine("vllm.utils.cpu_triton_utils")._expand_kernel_impl
    top_k = pristine("vllm.v1.sample.ops.topk_topp_sampler").apply_top_k_only
    monkeypatch.setattr(cpu_triton_utils, "_expand_kernel_impl", expand)
    monkeypatch.setattr(topk_topp_sampler, "apply_top_k_only", top_k)
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config)
    monkeypatch.setattr(GPUModelRunner, "_update_states", GPUModelRunner._update_states)
    monkeypatch.setattr(EngineCore, "post_step", EngineCore.post_step)
    front.install(lambda config: front.V1)
    hooks.install_in_engine()
    first = (
        cpu_triton_utils._expand_kernel_impl,
        topk_topp_sampler.apply_top_k_only,
        EngineArgs.create_engine_config,
        GPUModelRunner._update_states,
        EngineCore.post_step,
    )
    assert first[0] is not expand
    assert not cpu_mends.expand_is_faulty(first[0])
    assert first[1] is not top_k
    empty = torch.empty(0, 2)
    assert first[1](empty, torch.empty(0, dtype=torch.int32)) is empty
    front.install(lambda config: front.V1)
    hooks.install_in_engine()
    assert not cpu_mends.repair_cpu_expand()
    assert not cpu_mends.repair_empty_top_k()
    assert first == (
        cpu_triton_utils._expand_kernel_impl,
        topk_topp_sampler.apply_top_k_only,
        EngineArgs.create_engine_config,
        GPUModelRunner._update_states,
        EngineCore.post_step,
    )


@pytest.mark.usefixtures("cpu")
def test_top_k_with_rows_is_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler

    original = pristine("vllm.v1.sample.ops.topk_topp_sampler").apply_top_k_only
    monkeypatch.setattr(topk_topp_sampler, "apply_top_k_only", original)
    assert cpu_mends.repair_empty_top_k()
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
    k = torch.tensor([1, 2], dtype=torch.int32)
    wrapped = topk_topp_sampler.apply_top_k_only(logits.clone(), k)
    assert wrapped.tolist() == original(logits.clone(), k).tolist()


def test_the_installed_engine_core_has_what_the_wait_looks_at() -> None:
    """A step is held back only while nothing is in this queue."""
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    assert callable(EngineCore.post_step)
    assert "input_queue" in inspect.getsource(EngineCoreProc.__init__)
