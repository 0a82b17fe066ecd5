"""Stand-ins for the servers of a run, as real processes."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from vllm_wanspec.lab.compare import prepass, run
from vllm_wanspec.lab.compare.arms import DRAFTER, Arm
from vllm_wanspec.lab.compare.lineup import Lineup, TargetPlan, server_name
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.harness import launch, machine, probes
from vllm_wanspec.lab.harness.servers import ServerSpec, free_ports
from vllm_wanspec.lab.records import Setting

FAKE = Path(__file__).parents[1] / "fake_vllm.py"


class Stage:
    """Lays out stand-ins in place of the servers, and remembers which were asked for.

    Attributes:
        started: What was laid out.
        extra: Further arguments by server, such as ``--differ-at 3``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[str] = []
        self.extra: dict[str, list[str]] = {}
        self.screen = Console(file=io.StringIO(), width=160)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of real servers, on a machine that has vLLM and needs no time to settle."""
        monkeypatch.setattr(machine, "missing_vllm", lambda: None)
        monkeypatch.setattr(run, "plan_lineup", self.plan_lineup)
        for module in (run, prepass):
            monkeypatch.setattr(module, "tuned_target", self.tuned_target)
        monkeypatch.setattr(launch, "DYING_S", 1.0)
        for name in ("SETTLE_MIN_S", "SETTLE_POLL_S"):
            monkeypatch.setattr(probes, name, 0.0)
        monkeypatch.setattr(tempfile, "tempdir", str(self.folder))

    def server(self, name: str, *extra: str) -> ServerSpec:
        """A stand-in."""
        (port,) = free_ports(1)
        stats = self.folder / f"{name}.pacing.json"
        argv = [sys.executable, str(FAKE), "--port", str(port), "--stats", str(stats)]
        return ServerSpec(name, [*argv, *extra, *self.extra.get(name, [])], port)

    def plan_lineup(self, options: Options, folder: Path) -> Lineup:
        """A drafter without a WAN where one is needed, and the targets."""
        self.started.append("lineup")
        needed = {arm.target.name: arm.target for arm in options.started if not arm.is_tuned}
        targets = {name: self.target(name, target.method == "remote") for name, target in needed.items()}
        sources = [self.server(DRAFTER)] if any(arm.uses_wan for arm in options.started) else []
        stats = self.folder / f"{DRAFTER}.pacing.json" if sources else None
        return Lineup(tuple(sources), targets, stats, None, folder / "oracle.json")

    def target(self, name: str, remote: bool = False) -> TargetPlan:
        """A stand-in for a target."""
        (port,) = free_ports(1)
        spec = self.server(name, *(["--metrics-port", str(port)] if remote else []))
        metrics = f"http://127.0.0.1:{port}/metrics" if remote else None
        return TargetPlan(spec, self.folder / f"{name}.pacing.json", metrics)

    def tuned_target(self, options: Options, arm: Arm, setting: Setting, folder: Path) -> TargetPlan:
        """That of an arm that the pre-pass tunes."""
        self.started.append(server_name(arm, setting))
        return self.target(server_name(arm, setting))

    @property
    def printed(self) -> str:
        """What was shown, in one line."""
        assert isinstance(self.screen.file, io.StringIO)
        return " ".join(self.screen.file.getvalue().split())


def write_models(root: Path, modules: str, each: int = 1) -> Path:
    """A folder with the files of the demo models, and prompts of some modules."""
    for name in ("target", "draft"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    lines = [json.dumps({"module": name, "prompt": f"def {name}{i}("}) for name in modules for i in range(each)]
    for name in ("prompts.jsonl", "bench_prompts.jsonl"):
        (root / name).write_text("\n".join(lines) + "\n\n")
    return root
