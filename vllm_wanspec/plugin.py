"""The general plugin: what vLLM calls in each of its processes before it builds anything."""

from vllm_wanspec.bench import pacing
from vllm_wanspec.controller import hooks


def register() -> None:
    """Set the wraps of `controller.hooks`, and step pacing where ``WANSPEC_PACING`` asks for it."""
    hooks.install()
    pacing.install_from_env()
