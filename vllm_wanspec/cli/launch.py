"""Turning into ``vllm serve``: what `wanspec serve` and `wanspec drafter` have in common."""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import NoReturn

from vllm_wanspec.errors import ConfigError

PLUGIN = "wanspec"


def require_vllm() -> None:
    """Check that vLLM is there.

    Raises:
        ConfigError: It is not.
    """
    if find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here: pip install 'vllm-wanspec[vllm]' (without a GPU: make install)")


def plugin_list(environment: Mapping[str, str]) -> str:
    """``VLLM_PLUGINS`` with ours in it.

    vLLM loads endpoint plugins only if that variable names them, and then only named plugins of every other kind; so
    where it is not set, all that are installed are named, and nothing else changes.
    """
    given = environment.get("VLLM_PLUGINS")
    if given is not None:
        names = [name for name in given.split(",") if name]
    else:
        groups = ("general", "platform", "io_processor", "stat_logger")
        names = [entry.name for group in groups for entry in entry_points(group=f"vllm.{group}_plugins")]
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def become_vllm_serve(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by ``vllm serve``, so that signals and the exit status are its own."""
    environment = {**os.environ, "VLLM_PLUGINS": plugin_list(os.environ)}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)
