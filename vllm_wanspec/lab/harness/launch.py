"""How measurements start servers: a target, a drafter, the WAN proxy between them, and the links that must come up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from rich.console import Console

from vllm_wanspec.config import WIDTH_ENV
from vllm_wanspec.emulate.pacing import COUNT_ONLY, PACING_ENV, STATS_ENV, Pacing
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.scrape import link_is_up
from vllm_wanspec.lab.harness.servers import (
    HOST,
    Server,
    ServerError,
    ServerGroup,
    ServerSpec,
    free_ports,
    wanspec_command,
)
from vllm_wanspec.lab.harness.view import starting
from vllm_wanspec.sim.controller import DrafterError

#: The drafter's name in targets' configurations, and the model's in requests.
DRAFTER_NAME = "demo"
MODEL_NAME = "demo-target"
NAMED = ("--served-model-name", MODEL_NAME)
#: Step times like a 70B target's and a 1B draft model's (design, section 10).
TARGET_PACE = Pacing(35.0, 0.1)
DRAFT_PACE = Pacing(5.0, 0.02)
#: Without a GPU many servers share the memory; this is room for 40,000 of the demo target's tokens.
LEAN_FLAGS = ("--kv-cache-memory-bytes", "512M")
CACHE_ENV = "VLLM_CPU_KVCACHE_SPACE"  # which would prevail
START_DEADLINE_S = 300.0
LINK_DEADLINE_S = 60.0
LINK_POLL_S = 0.2
DYING_S = 3.0


@contextlib.contextmanager
def serving(
    specs: Sequence[ServerSpec],
    folder: Path,
    console: Console,
    *,
    in_turn: bool = False,
    deadline_s: float = START_DEADLINE_S,
) -> Iterator[dict[str, Server]]:
    """Start servers and wait until all are ready; stop them when the block ends, whatever happens.

    Args:
        specs: Servers in the order in which to start them.
        folder: Existing folder for their logs.
        console: Where to show progress.
        in_turn: Start each when the one before is ready: many that share a core would all be late together.
        deadline_s: Seconds within which each must be ready.

    Yields:
        The servers by name.

    Raises:
        ServerError: One of them did not start, or had died when the block ended.
    """
    with ServerGroup(folder) as group:
        servers: dict[str, Server] = {}
        for some in [[spec] for spec in specs] if in_turn else [specs]:
            servers |= start(group, some, console, deadline_s)
        with dying_servers_explain(group):
            yield servers
        console.print("stopping the servers", style="dim")


def start(
    group: ServerGroup, specs: Sequence[ServerSpec], console: Console, deadline_s: float = START_DEADLINE_S
) -> dict[str, Server]:
    """Start servers of a group and wait until all are ready, each within ``deadline_s`` seconds; by name."""
    servers = [group.start(spec) for spec in specs]
    with starting(console, servers) as ready:
        group.wait_ready(servers, deadline_s, on_ready=ready)
    return {server.name: server for server in servers}


@contextlib.contextmanager
def dying_servers_explain(group: ServerGroup) -> Iterator[None]:
    """Let a dying server explain a failed request, which it does better than the request."""
    try:
        yield
    except (ClientError, DrafterError):
        group.check_alive(within_s=DYING_S)
        raise
    group.check_alive()


async def wait_for_link(http: aiohttp.ClientSession, metrics_url: str, target: Server, console: Console) -> None:
    """Wait until a target's controller has been welcomed by its drafter.

    Raises:
        ServerError: It was not, within a minute.
    """
    with console.status(f"waiting for {target.name}'s link to its drafter"):
        end_s = time.monotonic() + LINK_DEADLINE_S
        while not await link_is_up(http, metrics_url, DRAFTER_NAME):
            target.check_alive()
            if time.monotonic() > end_s:
                problem = f"{target.name}'s link to its drafter was not up after {LINK_DEADLINE_S:.0f} s"
                raise ServerError(f"{problem}{target.log_hint()}")
            await asyncio.sleep(LINK_POLL_S)


def plain_command(target: str) -> list[str]:
    """Return the argv that serves a target by vLLM alone."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", target]


def vllm_spec(
    name: str,
    argv: Sequence[str],
    port: int,
    core: int | None,
    pace: Pacing | None,
    stats: Path | None,
    env: Mapping[str, str] | None = None,
) -> ServerSpec:
    """Describe a vLLM server on this machine.

    Args:
        name: What people call it.
        argv: Its command, without host, port and the flags of small machines.
        port: Where it listens.
        core: CPU number to pin it to; None does not pin.
        pace: Duration of its model's forwards; None does not pace.
        stats: File for the counts of its forwards, paced or not; what a former run left there is removed.  None counts
            nothing.
        env: What its environment has besides.
    """
    pacing = {} if pace is None else {PACING_ENV: pace.setting}
    if stats is not None:
        stats.unlink(missing_ok=True)
        pacing = {PACING_ENV: (pace or COUNT_ONLY).setting, STATS_ENV: str(stats)}
    argv = [*argv, "--host", HOST, *machine.server_flags(), "--port", str(port)]
    return ServerSpec(name, argv, port, machine.server_env(core) | pacing | dict(env or {}), core)


def lean(spec: ServerSpec) -> ServerSpec:
    """Return the server with less memory for its KV cache, where that is the machine's own."""
    if machine.has_gpu():
        return spec
    env = {key: value for key, value in (spec.env or {}).items() if key != CACHE_ENV}
    return dataclasses.replace(spec, argv=[*spec.argv, *LEAN_FLAGS], env=env)


def wan_spec(port: int, drafter_port: int, rtt_ms: float, control_port: int | None = None) -> ServerSpec:
    """Describe the WAN proxy before a drafter; ``control_port`` lets it be changed while it runs."""
    argv = wanspec_command("wan", "--listen", f"{HOST}:{port}", "--to", f"{HOST}:{drafter_port}")
    control = [] if control_port is None else ["--control", f"{HOST}:{control_port}"]
    return ServerSpec("wan", [*argv, "--rtt-ms", f"{rtt_ms:g}", *control], port, health_path=None)


def write_config(path: Path, drafter_port: int, metrics_port: int, **sections: Any) -> Path:
    """Write a target's YAML file and return its path; ``sections`` are further ones of the file."""
    config: dict[str, Any] = {
        "draft_endpoints": [{"name": DRAFTER_NAME, "url": f"http://{HOST}:{drafter_port}"}],
        "metrics": {"port": metrics_port},
    }
    path.write_text(yaml.safe_dump(config | sections, sort_keys=False), "utf-8")
    return path


def drafter_spec(draft: Path, places: int, pace: Pacing | None) -> ServerSpec:
    """The drafter's server, on the core that the demo's has, with ``places`` for running branches."""
    (port,) = free_ports(1)
    name, argv = "drafter-paced" if pace else "drafter", wanspec_command("drafter", str(draft))
    return vllm_spec(name, argv, port, machine.pin_cores()[1], pace, None, {WIDTH_ENV: str(places)})
