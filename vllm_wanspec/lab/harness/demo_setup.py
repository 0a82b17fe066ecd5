"""What the demo starts, and with which models and prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vllm_wanspec.emulate.pacing import PACING_ENV, STATS_ENV, Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.servers import HOST, ServerSpec, wanspec_command

__all__ = [
    "DemoModels",
    "DemoOptions",
    "DemoPlan",
    "Prompt",
    "choose_prompts",
    "find_models",
    "plain_command",
    "plan_servers",
    "vllm_spec",
    "wan_spec",
    "write_config",
]

DRAFTER_NAME = "demo"
MODEL_NAME = "demo-target"
NAMED = ("--served-model-name", MODEL_NAME)
PORTS_NEEDED = 5
#: Step times like a 70B target's and a 1B draft model's (design, section 10).
TARGET_PACE = Pacing(35.0, 0.1)
DRAFT_PACE = Pacing(5.0, 0.02)


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
class DemoModels:
    """Paths of the demo's models and of the file with its prompts."""

    target: Path
    draft: Path
    prompts: Path


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and the module that it was cut from; its line in the file where that does not say."""

    module: str
    text: str


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


def find_models(folder: Path | None) -> DemoModels:
    """Return the demo's models.

    Args:
        folder: Where to look; None looks in ``examples/demo_models`` beside the package.

    Raises:
        ConfigError: Something is missing there; the message says where it was sought.
    """
    root = folder or machine.checkout() / "examples" / "demo_models"
    models = DemoModels(root / "target", root / "draft", root / "prompts.jsonl")
    wanted = [models.target / "config.json", models.draft / "config.json", models.prompts]
    missing = [str(path.relative_to(root)) for path in wanted if not path.is_file()]
    if missing:
        advice = "give a folder that has them with --models DIR, or run the demo in a checkout"
        raise ConfigError(f"demo models: {root} has no {', '.join(missing)}; {advice}")
    return models


def choose_prompts(path: Path, count: int) -> list[Prompt]:
    """Return ``count`` prompts of a JSON-lines file, spread evenly over its modules.

    The choice depends on the file alone.  Each module gives one before any gives two.

    Raises:
        ConfigError: The file is malformed, or has fewer prompts than asked for.
    """
    by_module: dict[str, list[Prompt]] = {}
    prompts = _read_prompts(path)
    if count > len(prompts):
        raise ConfigError(f"--prompts: {count} is more than the {len(prompts)} prompts in {path}")
    for prompt in prompts:
        by_module.setdefault(prompt.module, []).append(prompt)
    chosen: list[Prompt] = []
    while len(chosen) < count:
        queues = [queue for queue in by_module.values() if queue]
        wanted = min(count - len(chosen), len(queues))
        chosen += [queues[i * len(queues) // wanted].pop(0) for i in range(wanted)]
    return chosen


def _read_prompts(path: Path) -> list[Prompt]:
    prompts = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompts.append(Prompt(str(entry.get("module", f"line {number}")), str(entry["prompt"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f'prompts: {path}, line {number}: expected {{"module": …, "prompt": …}}') from None
    return prompts


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


def plain_command(target: str) -> list[str]:
    """Return the argv that serves a target by vLLM alone."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", target]


def vllm_spec(
    name: str,
    argv: Sequence[str],
    port: int,
    core: int | None,
    pace: Pacing | None,
    stats: Path,
    env: Mapping[str, str] | None = None,
) -> ServerSpec:
    """Describe a vLLM server on this machine.

    Args:
        name: What people call it.
        argv: Its command, without host, port and the flags of small machines.
        port: Where it listens.
        core: CPU number to pin it to; None does not pin.
        pace: Duration of its model's forwards; None does not pace.
        stats: Pacing statistics file; what a former run left there is removed.
        env: What its environment has besides.
    """
    stats.unlink(missing_ok=True)
    pacing = {} if pace is None else {PACING_ENV: pace.setting, STATS_ENV: str(stats)}
    argv = [*argv, "--host", HOST, *machine.server_flags(), "--port", str(port)]
    return ServerSpec(name, argv, port, machine.server_env(core) | pacing | dict(env or {}), core)


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
