"""The general plugin: what vLLM calls in each of its processes before it builds anything."""

from vllm_wanspec.bench import pacing
from vllm_wanspec.controller import hooks
from vllm_wanspec.drafter import inside


def register() -> None:
    """Set the wraps of `controller.hooks`, the calls of `drafter.inside`, and step pacing where it is asked for."""
    hooks.install()
    inside.install()
    pacing.install_from_env()
