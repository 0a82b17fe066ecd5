"""What the demo starts, and with which models and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.launch import (
    DRAFT_PACE,
    NAMED,
    TARGET_PACE,
    plain_command,
    vllm_spec,
    wan_spec,
    write_config,
)
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.servers import HOST, ServerSpec, wanspec_command

__all__ = ["DemoOptions", "DemoPlan", "plan_servers"]

PORTS_NEEDED = 5


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The demo's settings.

    Args:
        rtt_ms: Emulated round trip between target and drafter, milliseconds.
        prompts: How many prompts to send to each target.
        max_tokens: Tokens to generate per prompt.
        speculative_tokens: Draft tokens verified per step at most.
        models: Folder with ``target/``, ``draft/`` and ``prompts.jsonl``; None takes the checkout's.
        target_pace: Duration of a target forward.
        draft_pace: Duration of a draft forward.
        json_path: File for the result; None writes none.
        log_dir: Folder for the servers' output; None uses a temporary one.
    """

    rtt_ms: float = 20.0
    prompts: int = 8
    max_tokens: int = 96
    speculative_tokens: int = 8
    models: Path | None = None
    target_pace: Pacing = TARGET_PACE
    draft_pace: Pacing = DRAFT_PACE
    json_path: Path | None = None
    log_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """The servers of a demo run, and where to find what they write.

    Args:
        specs: Servers in the order in which to start them.
        plain: Name of the target without speculation.
        wanspec: Name of the target with remote drafts.
        metrics_url: Where the WANSpec target serves its counters.
        stats: Pacing statistics file of each paced server.
    """

    specs: tuple[ServerSpec, ...]
    plain: str
    wanspec: str
    metrics_url: str
    stats: dict[str, Path]


def plan_servers(
    options: DemoOptions, models: DemoModels, ports: Sequence[int], folder: Path, **sections: Any
) -> DemoPlan:
    """Lay out the demo's four servers; writes the WANSpec target's YAML file.

    Args:
        options: The demo's settings.
        models: What they serve.
        ports: Free ports, ``PORTS_NEEDED`` of them.
        folder: Existing folder for the YAML file and the pacing statistics.
        sections: Further ones of the YAML file.
    """
    drafter_port, wan_port, plain_port, wanspec_port, metrics_port = ports
    target_core, draft_core = machine.pin_cores()
    yaml_path = write_config(folder / "wanspec.yaml", wan_port, metrics_port, **sections)
    stats = {name: folder / f"{name}.pacing.json" for name in ("drafter", "plain", "wanspec")}

    def paced(name: str, argv: list[str], port: int, core: int | None, pace: Pacing) -> ServerSpec:
        return vllm_spec(name, argv, port, core, pace, stats[name])

    wanspec_argv = wanspec_command("serve", str(models.target), "--wanspec", str(yaml_path))
    ahead = ["--speculative-tokens", str(options.speculative_tokens)]
    drafter_argv = wanspec_command("drafter", str(models.draft))
    specs = (
        paced("drafter", drafter_argv, drafter_port, draft_core, options.draft_pace),
        wan_spec(wan_port, drafter_port, options.rtt_ms),
        paced("plain", [*plain_command(str(models.target)), *NAMED], plain_port, target_core, options.target_pace),
        paced("wanspec", [*wanspec_argv, *ahead, *NAMED], wanspec_port, target_core, options.target_pace),
    )
    return DemoPlan(specs, "plain", "wanspec", f"http://{HOST}:{metrics_port}/metrics", stats)
