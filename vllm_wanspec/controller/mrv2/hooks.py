"""Wraps of vLLM's Model Runner V2; see `vllm_wanspec.ledger`."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal, get_args

from vllm_wanspec.config import PROPOSER
from vllm_wanspec.controller import engine
from vllm_wanspec.errors import UnsupportedError
from vllm_wanspec.ledger import Wrap, attribute, need_attributes, need_methods, need_parameters, wrap

METHOD = "custom_class"
"""vLLM's name for a proposer of somebody else's."""
WISH = "wanspec_wish"
"""Attribute of a step's output: how many drafts each request should have room for."""

_CONFIG = "vllm.config.vllm"
_RUNNER = "vllm.v1.worker.gpu.model_runner"
_SPECULATORS = "vllm.v1.worker.gpu.spec_decode"
_ASYNC_SCHEDULER = "vllm.v1.core.sched.async_scheduler"

LEDGER = (
    Wrap(
        "vllm.config.vllm.VllmConfig._get_v2_model_runner_unsupported_features",
        "Model Runner V2 refuses every custom proposer; it runs this one.",
        "Class-wide wrap: with our proposer, and every seam in place, its method is not among the unsupported ones.",
        "Model Runner V2 takes custom proposers.",
    ),
    Wrap(
        "vllm.config.vllm.VllmConfig.__post_init__",
        "vLLM 0.32 refuses async scheduling with every custom proposer, whatever the model runner.",
        "Class-wide wrap: with our proposer on Model Runner V2 the method counts as one that goes with it meanwhile; "
        "what that runner lacks for it is one line.",
        "vLLM 0.33, which asks for the model runner.",
    ),
    Wrap(
        "vllm.v1.worker.gpu.spec_decode.init_speculator (as model_runner imports it)",
        "Speculators are chosen from a list of vLLM's own.",
        "Module-level wrap: with our proposer builds `RemoteSpeculator`, else calls the original.",
        "vLLM lets a configuration name a speculator.",
    ),
    Wrap(
        "GPUModelRunner.finish_requests, .add_requests (V2)",
        "A speculator is not told of requests that come and go.",
        "Class-wide wraps: tell ours before slots are freed, and after they are given.",
        "vLLM tells speculators.",
    ),
    Wrap(
        "GPUModelRunner.prepare_inputs (V2)",
        "What a speculator proposes is a step old when it is verified; here drafts can change until the kernel that "
        "copies them into the step's input.",
        "Class-wide wrap: binds the drafts, then calls the original.",
        "vLLM asks speculators again before it prepares inputs.",
    ),
    Wrap(
        "GPUModelRunner.sample_tokens (V2), AsyncOutput.get_output",
        "What was verified is known when a step's output is, on whatever thread that is.",
        "Class-wide wraps: the step goes with its output, and is committed where that is read.",
        "vLLM tells speculators what was sampled.",
    ),
    Wrap(
        "GPUModelRunner.take_draft_token_ids (V2)",
        "Without async scheduling the scheduler can be given as many drafts for each request as there are.",
        "Class-wide wrap: calls the original, and puts our lists into its place.",
        "vLLM asks speculators for drafts when it schedules.",
    ),
    Wrap(
        "vllm.v1.core.sched.async_scheduler.AsyncScheduler.update_from_output, ._update_after_schedule",
        "With async scheduling each request has room for as many drafts as configured, whether any can come or not.",
        "Class-wide wraps: what the first rank wishes comes with a step's output, and bounds the placeholders.",
        "vLLM's scheduler asks how many drafts to expect.",
    ),
    Wrap(
        "vllm.v1.worker.gpu_worker.warmup_kernels",
        "vLLM warms its kernels up with requests of its own, which look like others.",
        "Module-level wrap: for as long as it runs, no session is opened.",
        "Requests of the warm-up can be told from others.",
    ),
)


def install() -> None:
    """What the general plugin does in every vLLM process, any number of times."""
    if _CONFIG in sys.modules:
        config = import_module(_CONFIG).VllmConfig
        wrap(config, "_get_v2_model_runner_unsupported_features", _supporting_ours)
        wrap(config, "__post_init__", _keeping_async_scheduling)
        wrap(_found(_SPECULATORS), "init_speculator", _building_ours)
        wrap(sys.modules.get(_RUNNER), "init_speculator", _building_ours)  # which has imported it by name
    if "vllm.v1.engine.core" in sys.modules:
        scheduler = getattr(_found(_ASYNC_SCHEDULER), "AsyncScheduler", None)
        wrap(scheduler, "update_from_output", _hearing_wishes)
        wrap(scheduler, "_update_after_schedule", _granting_wishes)


def check() -> None:
    """Fail early where remote drafting cannot work on this model runner.

    Raises:
        UnsupportedError: vLLM lacks what the wraps need.
    """
    if not attribute("vllm.triton_utils", "HAS_TRITON"):
        raise UnsupportedError(
            "Model Runner V2 needs Triton, which is not installed: install it, or unset VLLM_USE_V2_MODEL_RUNNER"
        )
    runner = attribute(_RUNNER, "GPUModelRunner")
    need_parameters(runner, "finish_requests", ("self", "scheduler_output"))
    need_parameters(runner, "add_requests", ("self", "scheduler_output"))
    need_parameters(runner, "prepare_inputs", ("self", "scheduler_output", "batch_req_state"))
    need_methods(runner, ("sample_tokens", "take_draft_token_ids"))
    need_attributes(runner, ("req_states", "speculator", "draft_tokens_handler"))
    need_methods(attribute("vllm.v1.worker.gpu.async_utils", "AsyncOutput"), ("get_output",))
    states = attribute("vllm.v1.worker.gpu.states", "RequestState")
    need_attributes(states, ("req_id_to_index", "draft_tokens", "all_token_ids", "total_len", "last_sampled_tokens"))
    attribute(_SPECULATORS, "init_speculator")
    attribute("vllm.v1.worker.gpu.spec_decode.speculator", "BaseSpeculator")
    scheduler = attribute(_ASYNC_SCHEDULER, "AsyncScheduler")
    need_parameters(scheduler, "_update_after_schedule", ("self", "scheduler_output"))
    need_parameters(scheduler, "update_from_output", ("self", "scheduler_output", "model_runner_output"))


def is_ours(vllm_config: Any) -> bool:
    """Whether a configuration names our proposer."""
    return getattr(vllm_config.speculative_config, "model", None) == PROPOSER


@functools.cache
def missing() -> str:
    """What of vLLM's seams is missing here, as one sentence; empty where all are in place."""
    try:
        check()
    except UnsupportedError as error:
        return str(error)
    return ""


def _found(module: str) -> Any:
    """A module of vLLM's; None where this one has none: `check` says so where it matters."""
    try:
        return import_module(module)
    except ImportError:
        return None


# The configuration


def _supporting_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_v2_model_runner_unsupported_features(self: Any) -> Any:
        features = original(self)
        if not is_ours(self) or missing():
            return features
        return [feature for feature in features if METHOD not in feature]

    return _get_v2_model_runner_unsupported_features


def _keeping_async_scheduling(original: Callable[..., Any]) -> Callable[..., Any]:
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(self) or not self.use_v2_model_runner:
            return original(self, *args, **kwargs)
        if missing():  # vLLM would refuse it too, in other words and with a traceback
            raise UnsupportedError(missing())
        with _method_goes_with_async_scheduling():
            return original(self, *args, **kwargs)

    return __post_init__


@contextmanager
def _method_goes_with_async_scheduling() -> Iterator[None]:
    """Count our method among those that vLLM 0.32 runs with async scheduling."""
    module: Any = import_module(_CONFIG)
    before = getattr(module, "NgramGPUTypes", None)
    if before is None:  # later versions ask for the model runner
        yield
        return
    module.NgramGPUTypes = Literal[(*get_args(before), METHOD)]
    try:
        yield
    finally:
        module.NgramGPUTypes = before


# The runner


def _building_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_speculator(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(vllm_config):
            return original(vllm_config, *args, **kwargs)
        check()
        install_in_runner()
        from vllm_wanspec.controller.mrv2.speculator import make_speculator

        return make_speculator(vllm_config, *args, **kwargs)

    return init_speculator


def install_in_runner() -> None:
    """Set the wraps of the model runner; called when the speculator is built."""
    runner = attribute(_RUNNER, "GPUModelRunner")
    wrap(runner, "finish_requests", _telling_who_goes)
    wrap(runner, "add_requests", _telling_who_comes)
    wrap(runner, "prepare_inputs", _binding)
    wrap(runner, "sample_tokens", _sending_the_step_along)
    wrap(runner, "take_draft_token_ids", _giving_our_drafts)
    wrap(attribute("vllm.v1.worker.gpu.async_utils", "AsyncOutput"), "get_output", _committing)
    engine.install()
    worker = sys.modules.get("vllm.v1.worker.gpu_worker")
    if worker is not None:
        wrap(worker, "warmup_kernels", _warming_up)


def _remote(runner: Any) -> Any:
    """Our side of a model runner; None of one with another speculator, or none."""
    return getattr(getattr(runner, "speculator", None), "remote", None)


def _telling_who_goes(original: Callable[..., Any]) -> Callable[..., Any]:
    def finish_requests(self: Any, scheduler_output: Any) -> Any:
        remote = _remote(self)
        if remote is not None:
            remote.finished(scheduler_output)
        return original(self, scheduler_output)

    return finish_requests


def _telling_who_comes(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_requests(self: Any, scheduler_output: Any) -> Any:
        result = original(self, scheduler_output)
        remote = _remote(self)
        if remote is not None and scheduler_output.scheduled_new_reqs:
            remote.added(scheduler_output, self.req_states.req_id_to_index)
        return result

    return add_requests


def _binding(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, scheduler_output: Any, batch_req_state: Any, *args: Any, **kwargs: Any) -> Any:
        remote = _remote(self)
        if remote is not None:
            remote.bind(scheduler_output, batch_req_state.req_ids, batch_req_state.idx_mapping_np)
        return original(self, scheduler_output, batch_req_state, *args, **kwargs)

    return prepare_inputs


def _sending_the_step_along(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        remote = _remote(self)
        step = None if remote is None else remote.take_step()
        if step is not None and output is not None:
            output.wanspec = (remote, step)
        return output

    return sample_tokens


def _committing(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_output(self: Any) -> Any:
        output = original(self)
        sent = self.__dict__.pop("wanspec", None)
        if sent is not None:
            remote, step = sent
            wish = remote.ended(step, output.sampled_token_ids)
            if wish is not None:
                setattr(output, WISH, wish)
        return output

    return get_output


def _giving_our_drafts(original: Callable[..., Any]) -> Callable[..., Any]:
    def take_draft_token_ids(self: Any) -> Any:
        taken = original(self)
        remote = _remote(self)
        drafts = None if remote is None or taken is None else remote.laid_out(taken.req_ids)
        return taken if drafts is None else type(taken)(taken.req_ids, drafts)

    return take_draft_token_ids


def _warming_up(original: Callable[..., Any]) -> Callable[..., Any]:
    def warmup_kernels(model_runner: Any, *args: Any, **kwargs: Any) -> Any:
        remote = _remote(model_runner)
        if remote is None:
            return original(model_runner, *args, **kwargs)
        remote.warming_up = True
        try:
            return original(model_runner, *args, **kwargs)
        finally:
            remote.warming_up = False

    return warmup_kernels


# The scheduler


def _hearing_wishes(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any) -> Any:
        wish = getattr(model_runner_output, WISH, None)
        result = original(self, scheduler_output, model_runner_output, *args)
        if wish is not None:
            self.wanspec_wish = wish
            _grant(self, wish, wish)  # of the step that comes next, which has its placeholders already
        return result

    return update_from_output


def _granting_wishes(original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_after_schedule(self: Any, scheduler_output: Any) -> Any:
        result = original(self, scheduler_output)
        wish = getattr(self, "wanspec_wish", None)
        if wish:
            _grant(self, wish, scheduler_output.num_scheduled_tokens)
        return result

    return _update_after_schedule


def _grant(scheduler: Any, wish: Mapping[str, int], names: Iterable[str]) -> None:
    """Bound the placeholders of some requests."""
    for name in names:
        most, request = wish.get(name), scheduler.requests.get(name)
        if most is not None and request is not None and len(request.spec_token_ids) > most:
            request.spec_token_ids = request.spec_token_ids[:most]
