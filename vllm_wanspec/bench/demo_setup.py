"""What the demo starts, and with which models and prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

import vllm_wanspec
from vllm_wanspec.bench import machine
from vllm_wanspec.bench.pacing import PACING_ENV, STATS_ENV, Pacing
from vllm_wanspec.bench.servers import HOST, ServerSpec, wanspec_command
from vllm_wanspec.errors import ConfigError

__all__ = ["DemoModels", "DemoOptions", "DemoPlan", "Prompt", "choose_prompts", "find_models", "plan_servers"]

DRAFTER_NAME = "demo"
MODEL_NAME = "demo-target"
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
    """A prompt and the module that it was cut from."""

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
    root = folder or Path(vllm_wanspec.__file__).resolve().parents[1] / "examples" / "demo_models"
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
            prompts.append(Prompt(str(entry["module"]), str(entry["prompt"])))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f'prompts: {path}, line {number}: expected {{"module": …, "prompt": …}}') from None
    return prompts


def plan_servers(options: DemoOptions, models: DemoModels, ports: Sequence[int], folder: Path) -> DemoPlan:
    """Lay out the demo's four servers; writes the WANSpec target's YAML file.

    Args:
        options: The demo's settings.
        models: What they serve.
        ports: Free ports, ``PORTS_NEEDED`` of them.
        folder: Existing folder for the YAML file and the pacing statistics.
    """
    drafter_port, wan_port, plain_port, wanspec_port, metrics_port = ports
    target_core, draft_core = machine.pin_cores()
    yaml_path = folder / "wanspec.yaml"
    yaml_path.write_text(_config_text(wan_port, metrics_port), "utf-8")
    stats = {name: folder / f"{name}.pacing.json" for name in ("drafter", "plain", "wanspec")}
    for path in stats.values():
        path.unlink(missing_ok=True)  # a former run's, where the folder was given
    common = ["--host", HOST, *machine.server_flags()]
    named = ["--served-model-name", MODEL_NAME, *common]
    plain_argv = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(models.target)]
    wanspec_argv = wanspec_command("serve", str(models.target), "--wanspec", str(yaml_path))
    ahead = ["--speculative-tokens", str(options.speculative_tokens)]

    def paced(name: str, argv: list[str], port: int, core: int | None, pace: Pacing) -> ServerSpec:
        env = machine.server_env(core) | {PACING_ENV: pace.setting, STATS_ENV: str(stats[name])}
        return ServerSpec(name, [*argv, "--port", str(port)], port, env, core)

    drafter_argv = [*wanspec_command("drafter", str(models.draft)), *common]
    wan_argv = wanspec_command("wan", "--listen", f"{HOST}:{wan_port}", "--to", f"{HOST}:{drafter_port}")
    wan = ServerSpec("wan", [*wan_argv, "--rtt-ms", f"{options.rtt_ms:g}"], wan_port, health_path=None)
    specs = (
        paced("drafter", drafter_argv, drafter_port, draft_core, options.draft_pace),
        wan,
        paced("plain", [*plain_argv, *named], plain_port, target_core, options.target_pace),
        paced("wanspec", [*wanspec_argv, *ahead, *named], wanspec_port, target_core, options.target_pace),
    )
    return DemoPlan(specs, "plain", "wanspec", f"http://{HOST}:{metrics_port}/metrics", stats)


def _config_text(wan_port: int, metrics_port: int) -> str:
    config = {
        "draft_endpoints": [{"name": DRAFTER_NAME, "url": f"http://{HOST}:{wan_port}"}],
        "metrics": {"port": metrics_port},
    }
    return yaml.safe_dump(config, sort_keys=False)
