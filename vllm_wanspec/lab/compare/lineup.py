"""The side-by-side bench's servers: a target per arm, one drafter behind the WAN proxy, one that sends nonsense."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_wanspec.emulate.pacing import DRAFT_PACING_ENV, Pacing
from vllm_wanspec.lab.compare.oracle import ORACLE_ENV, OracleProposer
from vllm_wanspec.lab.compare.plan import BenchOptions, is_remote, uses_wan
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.launch import NAMED, plain_command, vllm_spec, wan_spec, write_config
from vllm_wanspec.lab.harness.servers import HOST, ServerSpec, free_ports, wanspec_command

__all__ = ["DRAFTER", "RANDOM", "Lineup", "plan_lineup", "reference_arm", "trial_spec"]

DRAFTER = "drafter"
RANDOM = "random drafter"
ORACLE = f"{OracleProposer.__module__}.{OracleProposer.__qualname__}"
#: Without a GPU ten servers share the memory; this is room for 40,000 of the demo target's tokens.
LEAN_FLAGS = ("--kv-cache-memory-bytes", "512M")
CACHE_ENV = "VLLM_CPU_KVCACHE_SPACE"  # which would prevail
PROMPT_LOOKUP = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}


@dataclass(frozen=True, slots=True)
class Lineup:
    """The servers of a run.

    Args:
        sources: What drafts for remote arms, and the WAN proxy; in the order in which to start them.
        targets: By arm, without the co-located draft model's, whose γ is not known yet.
        metrics: By remote arm, where its controller serves its counters.
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


def reference_arm(options: BenchOptions) -> str:
    """Return the arm whose target gives the texts that the others must repeat: a plain one if there is any.

    The co-located draft model's cannot be asked before the pre-pass, which needs the texts: it comes last.
    """
    preferred = ("none_constrained", "none", *(arm for arm in options.started if arm != "draft_model"), "draft_model")
    return next(arm for arm in preferred if arm in options.started)


def plan_lineup(options: BenchOptions, folder: Path) -> Lineup:
    """Lay out the servers that the arms need; writes the YAML files of remote arms.

    Args:
        options: The bench's settings.
        folder: Existing folder for YAML files, statistics and what the oracle knows.
    """
    arms = options.started
    target_core, draft_core = machine.pin_cores()
    drafter_port, wan_port, control_port, random_port, dead_port, *ports = free_ports(5 + 2 * len(arms))
    stats: dict[str, Path] = {}
    sources: list[ServerSpec] = []
    if any(map(uses_wan, arms)):
        stats[DRAFTER] = _stats_path(folder, DRAFTER)
        argv = [*wanspec_command("drafter", options.draft), *NAMED]
        sources = [
            _vllm_spec(DRAFTER, argv, drafter_port, draft_core, options.draft_forward, stats[DRAFTER]),
            wan_spec(wan_port, drafter_port, 0.0, control_port),
        ]
    if "wanspec_random" in arms:
        argv = [sys.executable, "-m", "vllm_wanspec.sim.service", "--model", options.target]
        pace = [] if options.draft_forward is None else ["--pace", options.draft_forward.setting]
        argv += ["--port", str(random_port), *pace]
        sources.append(ServerSpec(RANDOM, argv, random_port, machine.server_env(draft_core), draft_core))
    endpoints = {"wanspec_dead": dead_port, "wanspec_random": random_port}
    oracle_path = folder / "oracle.json"
    targets, metrics = {}, {}
    for arm in arms:
        port, metrics_port = ports.pop(), ports.pop()
        if arm == "draft_model":
            continue
        stats[arm] = _stats_path(folder, arm)
        if is_remote(arm):
            sections = {"late": {"policy": "none"}} if arm == "wanspec_no_wait" else {}
            path = write_config(folder / f"{arm}.yaml", endpoints.get(arm, wan_port), metrics_port, **sections)
            metrics[arm] = f"http://{HOST}:{metrics_port}/metrics"
            ahead = ["--speculative-tokens", str(options.speculative_tokens)]
            argv = [*wanspec_command("serve", options.target, "--wanspec", str(path)), *ahead, *NAMED]
        else:
            argv = [*plain_command(options.target), *_own_flags(arm, options), *NAMED]
        env = {ORACLE_ENV: str(oracle_path)} if arm == "oracle" else {}
        targets[arm] = _vllm_spec(arm, argv, port, target_core, options.target_forward, stats[arm], env)
    control_url = f"http://{HOST}:{control_port}" if any(map(uses_wan, arms)) else None
    paced = stats if options.target_pace is not None else {}
    return Lineup(tuple(sources), targets, metrics, paced, control_url, oracle_path)


def trial_spec(options: BenchOptions, gamma: int, folder: Path, name: str = "draft_model") -> ServerSpec:
    """Describe the target with a co-located draft model of ``gamma`` draft tokens per step."""
    core, _ = machine.pin_cores()
    config = {"method": "draft_model", "model": options.draft, "num_speculative_tokens": gamma}
    argv = [*plain_command(options.target), *_speculative(config), *NAMED]
    env = {} if options.draft_forward is None else {DRAFT_PACING_ENV: options.draft_forward.setting}
    (port,) = free_ports(1)
    return _vllm_spec(name, argv, port, core, options.target_forward, _stats_path(folder, name), env)


def _vllm_spec(
    name: str,
    argv: Sequence[str],
    port: int,
    core: int | None,
    pace: Pacing | None,
    stats: Path,
    env: Mapping[str, str] | None = None,
) -> ServerSpec:
    """As `vllm_spec`, with less memory for the KV cache where that is the machine's own."""
    if machine.has_gpu():
        return vllm_spec(name, argv, port, core, pace, stats, env)
    spec = vllm_spec(name, [*argv, *LEAN_FLAGS], port, core, pace, stats, env)
    return dataclasses.replace(spec, env={key: value for key, value in (spec.env or {}).items() if key != CACHE_ENV})


def _stats_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.pacing.json"


def _own_flags(arm: str, options: BenchOptions) -> list[str]:
    ahead = {"num_speculative_tokens": options.speculative_tokens}
    if arm == "none_constrained":
        return ["--no-async-scheduling"]
    if arm == "ngram":
        return _speculative({"method": "ngram", **ahead, **PROMPT_LOOKUP})
    if arm == "oracle":
        return _speculative({"method": "custom_class", "model": ORACLE, **ahead})
    return []


def _speculative(config: dict[str, Any]) -> list[str]:
    return ["--speculative-config", json.dumps(config)]
