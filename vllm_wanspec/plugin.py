"""The general plugin: what vLLM calls in each of its processes before it builds anything."""

from vllm_wanspec.controller.v1 import hooks
from vllm_wanspec.drafter import inside, startup
from vllm_wanspec.emulate import pacing


def register() -> None:
    """Set the wraps of `controller.hooks`, the calls of `drafter.inside`, and step pacing where it is asked for."""
    hooks.install(startup.check)
    inside.install()
    pacing.install_from_env()
