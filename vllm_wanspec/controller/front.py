"""The front door: configurations and requests are looked at in every vLLM process, before an engine sees them."""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from vllm_wanspec.config import PROPOSER
from vllm_wanspec.controller.cpu_mends import repair_cpu_expand
from vllm_wanspec.controller.request_settings import check_request
from vllm_wanspec.controller.startup import check_target
from vllm_wanspec.errors import ConfigError, UnsupportedError
from vllm_wanspec.ledger import SUPPORTED, Wrap, attribute, need_methods, vllm_version, wrap

LEDGER = (
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
        "vllm.sampling_params.SamplingParams._validate_spec_decode",
        "vLLM refuses min_p and logit_bias with any speculation, since the V1 model runner drops them on drafted rows; "
        "Model Runner V2's rejection sampler applies them.",
        "Class-wide wrap: returns without a word for our proposer on Model Runner V2, else calls the original.",
        "vLLM refuses them on the V1 model runner alone.",
    ),
)

Check = Callable[[Any], str]
"""Checks a configuration with our proposer, and says on which model runner it will run."""
CheckOthers = Callable[[Any, Any], None]
RUNNER = "wanspec_runner"
"""Attribute of vLLM's speculative configuration: which model runner the target has. Requests are verified with that
part of the configuration alone."""
V1, MRV2 = "v1", "mrv2"


def _no_check(vllm_config: Any, usage: Any) -> None:
    """Of a process without our proposer."""


def install(check: Check, check_others: CheckOthers = _no_check) -> None:
    """What the general plugin does in every vLLM process, any number of times: mend the CPU fault, check early.

    A process that has not imported vLLM's arguments creates no configuration, and importing them there would only
    cost start-up time.

    Args:
        check: May raise `ConfigError` and `UnsupportedError`.
        check_others: Looks at configurations without our proposer; may raise `ConfigError`.
    """
    repair_cpu_expand()
    if "vllm.engine.arg_utils" in sys.modules:
        arguments = attribute("vllm.engine.arg_utils", "EngineArgs")
        wrap(arguments, "create_engine_config", partial(_checking, check=check, check_others=check_others))
        wrap(_params(), "verify", _verifying)
        wrap(_params(), "_validate_spec_decode", _letting_through_what_the_runner_applies)


def check_requests() -> None:
    """Fail early where requests cannot be checked when they come in.

    Raises:
        UnsupportedError: vLLM verifies them in another way.
    """
    params = _params()
    need_methods(params, ["verify"])
    if "speculative_config" not in inspect.signature(params.verify).parameters:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has another SamplingParams.verify than remote drafting wraps; use vLLM {SUPPORTED}"
        )


def request_fault() -> type[Exception]:
    """What vLLM answers with HTTP 400: its own error where it has one, since it takes others for the server's."""
    try:
        fault: type[Exception] = importlib.import_module("vllm.exceptions").VLLMValidationError
    except (ImportError, AttributeError):
        return ValueError
    return fault


def _params() -> Any:
    return attribute("vllm.sampling_params", "SamplingParams")


def _verifying(original: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(original).parameters)
    if "speculative_config" not in names:
        return original  # `check_requests` says so
    place, fault = names.index("speculative_config") - 1, request_fault()

    def verify(self: Any, *args: Any, **kwargs: Any) -> Any:
        speculative = args[place] if len(args) > place else kwargs.get("speculative_config")
        if getattr(speculative, "model", None) == PROPOSER:
            try:
                check_request(self.extra_args)
            except ConfigError as error:
                raise fault(f"vllm_xargs: {error}") from None
        return original(self, *args, **kwargs)

    return verify


def _letting_through_what_the_runner_applies(original: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_spec_decode(self: Any, speculative_config: Any) -> Any:
        ours = getattr(speculative_config, "model", None) == PROPOSER
        if ours and getattr(speculative_config, RUNNER, None) == MRV2:
            return None
        return original(self, speculative_config)

    return _validate_spec_decode


def _checking(original: Callable[..., Any], check: Check, check_others: CheckOthers) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            vllm_config = original(self, *args, **kwargs)
            if getattr(vllm_config.speculative_config, "model", None) == PROPOSER:
                check_target(vllm_config)
                runner = check(vllm_config)
                check_requests()
                object.__setattr__(vllm_config.speculative_config, RUNNER, runner)
            else:
                check_others(vllm_config, args[0] if args else kwargs.get("usage_context"))
        except (ConfigError, UnsupportedError) as error:
            sys.stderr.write(f"wanspec: {error}\n")
            raise SystemExit(2) from None
        return vllm_config

    return create_engine_config
