"""The servers of a run: a target per kind of arm, one drafter behind the WAN proxy, one that sends nonsense."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_wanspec.config import load_settings
from vllm_wanspec.emulate.pacing import DRAFT_PACING_ENV
from vllm_wanspec.lab.compare.arms import DRAFTER, RANDOM, Arm, Target
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.launch import NAMED, lean, plain_command, vllm_spec, wan_spec, write_config
from vllm_wanspec.lab.harness.servers import HOST, ServerSpec, free_ports, service_command, wanspec_command
from vllm_wanspec.lab.records import Setting
from vllm_wanspec.lab.target.colocated import COLOCATED_ENV, colocated_flags, set_gamma
from vllm_wanspec.sim.proposers import ORACLE_ENV, OracleProposer

ORACLE = f"{OracleProposer.__module__}.{OracleProposer.__qualname__}"
OUR_ENV = ("WANSPEC_", "VLLM_")


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """A target to be started.

    Attributes:
        spec: Its process.
        stats: Where its pacer keeps its counts.
        metrics: Where its controller serves its counters; None without one.
        config: Its YAML file; None without one.
        control: File that tells the co-located draft model with lookup how many tokens to draft; None elsewhere.
    """

    spec: ServerSpec
    stats: Path
    metrics: str | None = None
    config: Path | None = None
    control: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What it is started with, as JSON values: command, its own environment, all of our settings in effect."""
        folder, env = self.stats.parent, sorted((self.spec.env or {}).items())
        settings = None if self.config is None else load_settings(self.config).model_dump(mode="json")
        command = ["python" if part == sys.executable else machine.portable(part, folder) for part in self.spec.argv]
        shown = {name: machine.portable(value, folder) for name, value in env if name.startswith(OUR_ENV)}
        return {"command": command, "environment": shown, "settings": settings}


@dataclass(frozen=True, slots=True)
class Lineup:
    """The servers of a run.

    Attributes:
        sources: What drafts for remote targets, and the WAN proxy; in the order in which to start them.
        targets: By name, those that the pre-pass does not tune.
        drafter_stats: Where the drafter's pacer keeps its counts; None without a drafter.
        control_url: The WAN proxy's control API; None without a proxy.
        oracle_path: File that the oracle reads.
    """

    sources: tuple[ServerSpec, ...]
    targets: dict[str, TargetPlan]
    drafter_stats: Path | None
    control_url: str | None
    oracle_path: Path


def plan_lineup(options: Options, folder: Path) -> Lineup:
    """Lay out the servers that the arms need, but for those that are tuned; writes the YAML files of remote targets.

    Args:
        options: The run's settings.
        folder: Existing folder for YAML files, statistics and what the oracle knows.
    """
    needed = {arm.target.name: arm.target for arm in options.started if not arm.is_tuned}
    _, core = machine.pin_cores()
    drafter_port, wan_port, control_port, random_port, dead_port, *ports = free_ports(5 + 2 * len(needed))
    drafters = {target.drafter for target in needed.values()}
    sources: list[ServerSpec] = []
    drafter_stats = _stats_path(folder, DRAFTER) if DRAFTER in drafters else None
    if drafter_stats is not None:
        argv = [*wanspec_command("drafter", options.draft), *NAMED]
        sources = [
            lean(vllm_spec(DRAFTER, argv, drafter_port, core, options.draft_forward, drafter_stats)),
            wan_spec(wan_port, drafter_port, 0.0, control_port),
        ]
    if RANDOM in drafters:
        pacing = [] if options.draft_forward is None else ["--pace", options.draft_forward.setting]
        argv = service_command(random_port, "--model", options.target, *pacing)
        sources.append(ServerSpec(RANDOM, argv, random_port, machine.server_env(core), core))
    endpoints = {DRAFTER: wan_port, RANDOM: random_port}
    oracle_path = folder / "oracle.json"
    targets = {}
    for name, target in needed.items():
        port, metrics_port = ports.pop(), ports.pop()
        if target.method == "remote":
            endpoint = endpoints.get(target.drafter, dead_port)
            config = write_config(folder / f"{name}.yaml", endpoint, metrics_port, **target.sections)
            ahead = ["--speculative-tokens", str(options.speculative_tokens)]
            argv = [*wanspec_command("serve", options.target, "--wanspec", str(config)), *ahead, *NAMED]
            plan = _target(options, name, argv, port, folder)
            metrics = f"http://{HOST}:{metrics_port}/metrics"
            targets[name] = dataclasses.replace(plan, metrics=metrics, config=config)
        else:
            argv = [*plain_command(options.target), *_own_flags(target, options), *NAMED]
            env = {ORACLE_ENV: str(oracle_path)} if target.method == "oracle" else {}
            targets[name] = _target(options, name, argv, port, folder, env)
    control_url = f"http://{HOST}:{control_port}" if DRAFTER in drafters else None
    return Lineup(tuple(sources), targets, drafter_stats, control_url, oracle_path)


def server_name(arm: Arm, setting: Setting | None) -> str:
    """Name the server of an arm with a setting of the pre-pass; some settings share one."""
    if setting is None or arm.target.method == "draft_model_lookup":
        return arm.target.name
    ngrams = f"-{setting.ngram_min}-{setting.ngram_max}" if setting.ngram_max else ""
    sampling = f"-{setting.sampling}" if setting.sampling else ""
    return f"{arm.target.name}-{setting.draft_tokens}{ngrams}{sampling}"


def tuned_target(options: Options, arm: Arm, setting: Setting, folder: Path) -> TargetPlan:
    """Lay out the target of an arm that the pre-pass tunes, with one of its settings.

    That of the co-located draft model with lookup serves all settings of its arm, by its control file.
    """
    (port,) = free_ports(1)
    name, argv = server_name(arm, setting), [*plain_command(options.target), *NAMED]
    if arm.target.method == "draft_model_lookup":
        control = folder / f"{name}.json"
        set_gamma(control, setting.draft_tokens)
        argv += colocated_flags(options.draft, options.speculative_tokens)
        plan = _target(options, name, argv, port, folder, {COLOCATED_ENV: str(control)})
        return dataclasses.replace(plan, control=control)
    config: dict[str, Any] = {"method": arm.target.method, "num_speculative_tokens": setting.draft_tokens}
    if arm.target.method == "draft_model":
        config["model"] = options.draft
        config |= {"draft_sample_method": setting.sampling} if setting.sampling else {}
    else:
        config |= {"prompt_lookup_min": setting.ngram_min, "prompt_lookup_max": setting.ngram_max}
    return _target(options, name, [*argv, *_speculative(config)], port, folder)


def _target(
    options: Options, name: str, argv: list[str], port: int, folder: Path, env: Mapping[str, str] | None = None
) -> TargetPlan:
    """A target, whose forwards are paced or at least counted, and those of a draft model beside it."""
    core, _ = machine.pin_cores()
    stats = _stats_path(folder, name)
    pacing = {} if options.draft_forward is None else {DRAFT_PACING_ENV: options.draft_forward.setting}
    spec = vllm_spec(name, argv, port, core, options.target_forward, stats, pacing | dict(env or {}))
    return TargetPlan(lean(spec), stats)


def _stats_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.pacing.json"


def _own_flags(target: Target, options: Options) -> list[str]:
    ahead = {"num_speculative_tokens": options.speculative_tokens}
    if target.method == "constrained":
        return ["--no-async-scheduling"]
    if target.method == "oracle":
        return _speculative({"method": "custom_class", "model": ORACLE, **ahead})
    return []


def _speculative(config: dict[str, Any]) -> list[str]:
    return ["--speculative-config", json.dumps(config)]
