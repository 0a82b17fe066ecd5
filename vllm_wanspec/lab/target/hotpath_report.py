"""What the measurement of the hot path found: its figures, their JSON form, and the table."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_wanspec.drafter.host import DEFAULT_RUNNING_BRANCHES
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.sim.target import StepTimes, Workload

__all__ = ["BARS", "Frames", "Options", "Report", "Run", "percentile", "print_report", "write_json"]

#: What the hot path may cost.
BARS = {"propose_take_ms": {"p50": 0.6, "p99": 2.0}, "frame_us": {"p50": 150.0}}
QUANTILES = {"p50": 0.50, "p99": 0.99}
#: Above this the drafter did not keep its pace, so frames came more slowly than from one that does.
MAX_ENGINE_STRETCH = 1.10
#: Above this share of a core other programs disturbed the measurement.
MAX_OTHERS_SHARE = 0.10
GIT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured.

    Attributes:
        workload: The target's.
        steps: Measured steps in a run.
        runs: Runs, each with a connection and sessions of its own.
        frames: Frames that are decoded and applied.
        switch_interval_ms: Of the interpreter (`sys.setswitchinterval`); None leaves it as it is.
        tree: What to ask of the drafter instead of the defaults, such as ``max_branches=8``.
        late: Policy for late drafts; None takes the default one.
        running_branches: The drafter's places for branches, over all sessions.
    """

    workload: Workload = field(default_factory=Workload)
    steps: int = 400
    runs: int = 3
    frames: int = 3000
    switch_interval_ms: float | None = None
    tree: str = ""
    late: str | None = None
    running_branches: int = DEFAULT_RUNNING_BRANCHES


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


@dataclass(frozen=True, slots=True)
class Frames:
    """Times of single frames.

    Attributes:
        nodes: Nodes in each...
        sessions: ...which belong to so many sessions.
        times_ns: Decoding and applying.
        mean_bytes: Size on the wire.
    """

    nodes: int
    sessions: int
    times_ns: tuple[int, ...]
    mean_bytes: float

    def figures(self) -> dict[str, float]:
        """Quantiles of the time in microseconds."""
        return _quantiles([time_ns / 1e3 for time_ns in self.times_ns])


@dataclass(frozen=True, slots=True)
class Run:
    """One run of steps.

    Attributes:
        steps: Their times.
        mean_tree_nodes: Live nodes per session as `propose` finds them, mean.
        nodes_per_s: Nodes that arrived, in time or stale.
        elapsed_s: Of the steps.
        engine: What the drafter's engine did meanwhile; see `SteppedEngine.stats`.
        gc_pauses_ms: The garbage collector's.
        others_share: Of one core, used by other programs on the two that are measured on.
    """

    steps: tuple[StepTimes, ...]
    mean_tree_nodes: float
    nodes_per_s: float
    elapsed_s: float
    engine: dict[str, float]
    gc_pauses_ms: tuple[float, ...]
    others_share: float

    def figures(self) -> dict[str, Any]:
        """The run's own figures."""
        steps, engine = self.steps, self.engine
        decoding = sum(step.decoding for step in steps)
        return {
            "propose_take_ms": _quantiles([(step.propose_ns + step.take_ns) / 1e6 for step in steps]),
            "propose_ms": _quantiles([step.propose_ns / 1e6 for step in steps]),
            "take_ms": _quantiles([step.take_ns / 1e6 for step in steps]),
            "cpu_ms": _quantiles([step.cpu_ns / 1e6 for step in steps]),
            "waited_ms": _quantiles([step.wait_ns / 1e6 for step in steps]),
            "waited_steps": sum(step.wait_ns > 0 for step in steps),
            "begin_step_ms": _quantiles([step.begin_ns / 1e6 for step in steps]),
            "mean_tree_nodes": round(self.mean_tree_nodes, 1),
            "nodes_per_s": round(self.nodes_per_s),
            "accepted_per_step": round((sum(s.yielded for s in steps) - decoding) / max(1, decoding), 3),
            "offered_per_step": round(sum(s.offered for s in steps) / max(1, decoding), 3),
            "step_ms": round(1e3 * self.elapsed_s / len(steps), 2),
            "engine_step_ms": round(1e3 * engine["busy_s"] / max(1.0, engine["steps"]), 3),
            "engine_paced_ms": round(1e3 * engine["paced_s"] / max(1.0, engine["steps"]), 3),
            "engine_branches": round(engine["tokens"] / max(1.0, engine["steps"]), 1),
            "engine_cpu_share": round(engine["cpu_s"] / self.elapsed_s, 3),
            "gc": {"pauses": len(self.gc_pauses_ms), "longest_ms": round(max(self.gc_pauses_ms, default=0.0), 3)},
            "others_share": round(self.others_share, 3),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All of it; `figures` is the JSON form.

    Attributes:
        options: What was measured; see `Options`.
        runs: The runs.
        frames: Single frames, those first for which there is a bar.
        switch_interval_ms: The interpreter's.
        elapsed_s: Warm-up included.
    """

    options: dict[str, Any]
    runs: Sequence[Run]
    frames: Sequence[Frames]
    switch_interval_ms: float
    elapsed_s: float

    def figures(self) -> dict[str, Any]:
        """Medians over the runs, what they were measured with, and the runs themselves."""
        runs = [run.figures() for run in self.runs]
        found: dict[str, Any] = {"sessions": self.options["workload"]["rows"], **_medians(runs)}
        found["frame_us"] = self.frames[0].figures()
        return {
            **found,
            "held": all(found[name][key] <= bar for name, bars in BARS.items() for key, bar in bars.items()),
            "bars": BARS,
            "frames": {
                f"{frames.nodes} nodes of {frames.sessions} session{'s' * (frames.sessions > 1)}": {
                    "us": frames.figures(),
                    "bytes": round(frames.mean_bytes),
                    "count": len(frames.times_ns),
                }
                for frames in self.frames
            },
            "steps": self.options["steps"],
            "runs": runs,
            "options": self.options,
            "switch_interval_ms": self.switch_interval_ms,
            "elapsed_s": round(self.elapsed_s, 1),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "commit": commit(),
        }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {name: round(percentile(values, share), 4) for name, share in QUANTILES.items()}


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median over runs of each figure."""
    return {
        name: _medians([run[name] for run in runs])
        if isinstance(value, dict)
        else round(statistics.median(run[name] for run in runs), 4)
        for name, value in runs[0].items()
    }


def commit() -> str | None:
    """The checkout's commit, with ``+`` where files differ from it; None outside of a checkout."""
    root = Path(__file__).resolve().parents[3]
    try:
        words = [
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "-uno"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return words[0] + ("+" if words[1] else "")


def print_report(figures: dict[str, Any], console: Console) -> None:
    """Show the figures against their bars, and what the measurement itself suffered from."""
    table = Table(title=f"hot path, {figures['sessions']} sessions", title_justify="left")
    for column in ("", "p50", "p99", "may be"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in (
        ("propose_take_ms", "propose + take, ms"),
        ("propose_ms", "  propose"),
        ("take_ms", "  take"),
        ("cpu_ms", "  processor time, waits' included"),
        ("begin_step_ms", "begin_step, ms"),
    ):
        _row(table, label, figures[name], BARS.get(name, {}), digits=3)
    for index, (name, frames) in enumerate(figures["frames"].items()):
        _row(table, f"frame of {name}, µs", frames["us"], {} if index else BARS["frame_us"], digits=0)
    console.print(table)
    console.print(
        f"{figures['mean_tree_nodes']:.0f} nodes per tree, {figures['nodes_per_s']:.0f} nodes/s, "
        f"{figures['accepted_per_step']:.2f} accepted of {figures['offered_per_step']:.2f} drafts per row and step; "
        f"target's step {figures['step_ms']:.0f} ms; engine's {figures['engine_step_ms']:.1f} ms "
        f"(pace {figures['engine_paced_ms']:.1f}) at {figures['engine_branches']:.0f} branches, "
        f"{figures['engine_cpu_share']:.0%} of a core",
        highlight=False,
    )
    console.print(
        f"{len(figures['runs'])} runs of {figures['steps']} steps, medians of runs; switch interval "
        f"{figures['switch_interval_ms']:g} ms; garbage collector's longest pause {figures['gc']['longest_ms']:.1f} "
        f"ms; waits on purpose in {figures['waited_steps']:.0f} steps of a run, not counted",
        highlight=False,
    )
    if figures["others_share"] > MAX_OTHERS_SHARE:
        console.print(f"[yellow]other programs took {figures['others_share']:.0%} of a core: measure again[/]")
    if figures["engine_step_ms"] > MAX_ENGINE_STRETCH * figures["engine_paced_ms"]:
        console.print("[yellow]the drafter did not keep its pace: frames came more slowly than they would[/]")
    console.print("[green]all bars held[/]" if figures["held"] else "[red]a bar was missed[/]")


def _row(table: Table, label: str, values: dict[str, float], bars: dict[str, float], digits: int) -> None:
    cells = [_cell(values[name], bars.get(name), digits) for name in QUANTILES]
    table.add_row(label, *cells, " / ".join(f"{bar:g}" for bar in bars.values()))


def _cell(value: float, bar: float | None, digits: int) -> str:
    text = f"{value:.{digits}f}"
    if bar is None:
        return text
    return f"[green]{text}[/]" if value <= bar else f"[red]{text}[/]"


def write_json(figures: dict[str, Any], path: Path) -> None:
    """Write the figures, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
