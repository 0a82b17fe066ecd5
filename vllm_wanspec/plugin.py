"""The general plugin: what vLLM calls in each of its processes before it builds anything."""

import logging
import os
from typing import Any

from vllm_wanspec.controller import front
from vllm_wanspec.controller.mrv2 import hooks as mrv2
from vllm_wanspec.controller.v1 import hooks as v1
from vllm_wanspec.drafter import inside, startup

PACING_VARIABLES = ("WANSPEC_PACING", "WANSPEC_DRAFT_PACING")
"""Those by which `emulate.pacing` is asked for; spelled here, so that a process without them imports none of it."""
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"

logger = logging.getLogger("vllm.wanspec.proposer")


def register() -> None:
    """Set the wraps of both model runners, the calls of `drafter.inside`, and step pacing where it is asked for."""
    front.install(check, startup.check)
    mrv2.install()
    inside.install()
    if any(os.environ.get(name) for name in PACING_VARIABLES):
        from vllm_wanspec.emulate import pacing

        pacing.install_from_env()


def check(vllm_config: Any) -> str:
    """See that the model runner that vLLM will use is one that drafts can be had for, and say which it is.

    Raises:
        UnsupportedError: vLLM lacks what the wraps need.
    """
    chosen = os.environ.get(RUNNER_VARIABLE)
    why = f"by {RUNNER_VARIABLE}={chosen}" if chosen else "as vLLM chooses"
    if getattr(vllm_config, "use_v2_model_runner", False):
        mrv2.check()
        waiting = "async" if vllm_config.scheduler_config.async_scheduling else "no async"
        logger.info("remote drafting on Model Runner V2 with %s scheduling, %s", waiting, why)
        return front.MRV2
    v1.check()
    lacking = mrv2.missing() if not chosen and hasattr(vllm_config, "use_v2_model_runner") else ""
    logger.info("remote drafting on the V1 model runner, %s%s", why, f" ({lacking})" if lacking else "")
    return front.V1
