"""The general plugin: what vLLM calls in each of its processes before it builds anything."""

from vllm_wanspec.controller.v1 import hooks
from vllm_wanspec.drafter import inside
from vllm_wanspec.emulate import pacing


def register() -> None:
    """Set the wraps of `controller.hooks`, the calls of `drafter.inside`, and step pacing where it is asked for."""
    hooks.install()
    inside.install()
    pacing.install_from_env()
