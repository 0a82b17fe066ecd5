"""The targets that benches start beside plain vLLM: with co-located speculation, and with remote drafting."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from vllm_wanspec.lab.harness.launch import dying_servers_explain, plain_command, start
from vllm_wanspec.lab.harness.servers import Server, ServerGroup, ServerSpec, wanspec_command

PLAIN, COLOCATED, REMOTE = "plain", "draft_model", "remote"


def colocated_command(target: Path, draft: Path, gamma: int) -> list[str]:
    """Return the argv that serves a target with vLLM's own draft model beside it, ``gamma`` draft tokens per step."""
    config = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": gamma}
    return [*plain_command(str(target)), "--speculative-config", json.dumps(config)]


def remote_command(target: Path, config: Path, gamma: int) -> list[str]:
    """Return the argv that serves a target with remote drafts, at most ``gamma`` per step."""
    serve = wanspec_command("serve", str(target), "--wanspec", str(config))
    return [*serve, "--speculative-tokens", str(gamma)]


@contextlib.contextmanager
def started_in_turn(specs: Sequence[ServerSpec], folder: Path, console: Console) -> Iterator[dict[str, Server]]:
    """Start servers one after the other, each with its deadline to itself; stop them when the block ends.

    Many that share a core would all be late together.

    Args:
        specs: Servers in the order in which to start them.
        folder: Existing folder for their logs.
        console: Where to show progress.

    Yields:
        The servers by name.

    Raises:
        ServerError: One of them did not start, or had died when the block ended.
    """
    with ServerGroup(folder) as group:
        servers: dict[str, Server] = {}
        with dying_servers_explain(group):
            for spec in specs:
                servers |= start(group, [spec], console)
            yield servers
        console.print("stopping the servers", style="dim")
