"""The general plugin: what vLLM calls in each of its processes before it builds anything."""

import os

from vllm_wanspec.controller.v1 import hooks
from vllm_wanspec.drafter import inside, startup

PACING_VARIABLES = ("WANSPEC_PACING", "WANSPEC_DRAFT_PACING")
"""Those by which `emulate.pacing` is asked for; spelled here, so that a process without them imports none of it."""


def register() -> None:
    """Set the wraps of `controller.v1.hooks`, the calls of `drafter.inside`, and step pacing where it is asked for."""
    hooks.install(startup.check)
    inside.install()
    if any(os.environ.get(name) for name in PACING_VARIABLES):
        from vllm_wanspec.emulate import pacing

        pacing.install_from_env()
