"""The servers of a run: a target per kind of arm, one drafter behind the WAN proxy, one that sends nonsense."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_wanspec.emulate.pacing import DRAFT_PACING_ENV
from vllm_wanspec.lab.compare.arms import DRAFTER, RANDOM, Target
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.launch import NAMED, plain_command, vllm_spec, wan_spec, write_config
from vllm_wanspec.lab.harness.servers import HOST, ServerSpec, free_ports, service_command, wanspec_command
from vllm_wanspec.sim.proposers import ORACLE_ENV, OracleProposer

ORACLE = f"{OracleProposer.__module__}.{OracleProposer.__qualname__}"
#: Without a GPU ten servers share the memory; this is room for 40,000 of the demo target's tokens.
LEAN_FLAGS = ("--kv-cache-memory-bytes", "512M")
CACHE_ENV = "VLLM_CPU_KVCACHE_SPACE"  # which would prevail
PROMPT_LOOKUP = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}


@dataclass(frozen=True, slots=True)
class Lineup:
    """The servers of a run.

    Attributes:
        sources: What drafts for remote targets, and the WAN proxy; in the order in which to start them.
        targets: By name, without the co-located draft model's, whose γ is not known yet.
        metrics: By remote target, where its controller serves its counters.
        stats: By server, its pacing statistics file; empty where nothing is paced.
        control_url: The WAN proxy's control API; None without a proxy.
        oracle_path: File that the oracle reads.
    """

    sources: tuple[ServerSpec, ...]
    targets: dict[str, ServerSpec]
    metrics: dict[str, str]
    stats: dict[str, Path]
    control_url: str | None
    oracle_path: Path


def plan_lineup(options: Options, folder: Path) -> Lineup:
    """Lay out the servers that the arms need; writes the YAML files of remote targets.

    Args:
        options: The run's settings.
        folder: Existing folder for YAML files, statistics and what the oracle knows.
    """
    needed = {arm.target.name: arm.target for arm in options.started}
    target_core, draft_core = machine.pin_cores()
    drafter_port, wan_port, control_port, random_port, dead_port, *ports = free_ports(5 + 2 * len(needed))
    drafters = {target.drafter for target in needed.values()}
    stats: dict[str, Path] = {}
    sources: list[ServerSpec] = []
    if DRAFTER in drafters:
        stats[DRAFTER] = _stats_path(folder, DRAFTER)
        argv = [*wanspec_command("drafter", options.draft), *NAMED]
        sources = [
            _lean(vllm_spec(DRAFTER, argv, drafter_port, draft_core, options.draft_forward, stats[DRAFTER])),
            wan_spec(wan_port, drafter_port, 0.0, control_port),
        ]
    if RANDOM in drafters:
        pace = [] if options.draft_forward is None else ["--pace", options.draft_forward.setting]
        argv = service_command(random_port, "--model", options.target, *pace)
        sources.append(ServerSpec(RANDOM, argv, random_port, machine.server_env(draft_core), draft_core))
    endpoints = {DRAFTER: wan_port, RANDOM: random_port}
    oracle_path = folder / "oracle.json"
    targets, metrics = {}, {}
    for name, target in needed.items():
        port, metrics_port = ports.pop(), ports.pop()
        if target.method == "draft_model":
            continue
        stats[name] = _stats_path(folder, name)
        if target.method == "remote":
            endpoint = endpoints.get(target.drafter, dead_port)
            path = write_config(folder / f"{name}.yaml", endpoint, metrics_port, **target.sections)
            metrics[name] = f"http://{HOST}:{metrics_port}/metrics"
            ahead = ["--speculative-tokens", str(options.speculative_tokens)]
            argv = [*wanspec_command("serve", options.target, "--wanspec", str(path)), *ahead, *NAMED]
        else:
            argv = [*plain_command(options.target), *_own_flags(target, options), *NAMED]
        env = {ORACLE_ENV: str(oracle_path)} if target.method == "oracle" else {}
        targets[name] = _lean(vllm_spec(name, argv, port, target_core, options.target_forward, stats[name], env))
    control_url = f"http://{HOST}:{control_port}" if DRAFTER in drafters else None
    paced = stats if options.target_pace is not None else {}
    return Lineup(tuple(sources), targets, metrics, paced, control_url, oracle_path)


def trial_spec(options: Options, gamma: int, folder: Path, name: str = "draft_model") -> ServerSpec:
    """Describe the target with a co-located draft model of ``gamma`` draft tokens per step."""
    core, _ = machine.pin_cores()
    config = {"method": "draft_model", "model": options.draft, "num_speculative_tokens": gamma}
    argv = [*plain_command(options.target), *_speculative(config), *NAMED]
    env = {} if options.draft_forward is None else {DRAFT_PACING_ENV: options.draft_forward.setting}
    (port,) = free_ports(1)
    return _lean(vllm_spec(name, argv, port, core, options.target_forward, _stats_path(folder, name), env))


def _lean(spec: ServerSpec) -> ServerSpec:
    """The server with less memory for its KV cache, where that is the machine's own."""
    if machine.has_gpu():
        return spec
    env = {key: value for key, value in (spec.env or {}).items() if key != CACHE_ENV}
    return dataclasses.replace(spec, argv=[*spec.argv, *LEAN_FLAGS], env=env)


def _stats_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.pacing.json"


def _own_flags(target: Target, options: Options) -> list[str]:
    ahead = {"num_speculative_tokens": options.speculative_tokens}
    if target.method == "constrained":
        return ["--no-async-scheduling"]
    if target.method == "ngram":
        return _speculative({"method": "ngram", **ahead, **PROMPT_LOOKUP})
    if target.method == "oracle":
        return _speculative({"method": "custom_class", "model": ORACLE, **ahead})
    return []


def _speculative(config: dict[str, Any]) -> list[str]:
    return ["--speculative-config", json.dumps(config)]
