"""Turning into ``vllm serve``: what `wanspec serve` and `wanspec drafter` have in common."""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import NoReturn

from vllm_wanspec.drafter.environment import API_KEY_ENV, api_key
from vllm_wanspec.errors import ConfigError

PLUGIN = "wanspec"


def require_vllm() -> None:
    """Check that vLLM is there.

    Raises:
        ConfigError: It is not.
    """
    if find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here: pip install 'vllm-wanspec[vllm]' (without a GPU: make install)")


def plugin_list(environment: Mapping[str, str], *, routes: bool) -> str | None:
    """``VLLM_PLUGINS`` with ours in it; None to leave it unset, which loads ours without its routes.

    vLLM loads endpoint plugins (``routes``) only if that variable names them, and then only named plugins of every
    other kind; so where it is not set, all that are installed are named, and nothing else changes.
    """
    given = environment.get("VLLM_PLUGINS")
    if given is not None:
        names = [name for name in given.split(",") if name]
    elif not routes:
        return None
    else:
        groups = ("general", "platform", "io_processor", "stat_logger")
        names = [entry.name for group in groups for entry in entry_points(group=f"vllm.{group}_plugins")]
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def become_vllm_serve(arguments: Sequence[str], *, routes: bool) -> NoReturn:
    """Replace this process by ``vllm serve``, so that signals and the exit status are its own.

    Args:
        arguments: What follows ``vllm serve``.
        routes: Whether the server is to have the drafter's route; its API then asks for the drafter's token.
    """
    environment = dict(os.environ)
    plugins = plugin_list(os.environ, routes=routes)
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    key = api_key(os.environ) if routes else None
    if key is not None:
        environment[API_KEY_ENV] = key
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)
