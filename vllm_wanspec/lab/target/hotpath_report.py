"""What the measurement of the hot path found: its figures, and what people are told of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.cells import MARKS
from vllm_wanspec.lab.report.document import Document, Table
from vllm_wanspec.lab.stats import percentile
from vllm_wanspec.sim.target import StepTimes, Workload

V1, MRV2 = "V1", "MRV2, async scheduling"
RUNNERS = (V1, MRV2)
#: What the hot path may cost, at `BAR_NODES_PER_S` and above.
BARS = {"path_ms": {"p50": 0.4, "p99": 1.5}, "frame_us": {"p50": 150.0}}
BAR_NODES_PER_S = 50_000
QUANTILES = {"p50": 0.50, "p99": 0.99}
#: Above this the drafter did not keep its pace, so frames came more slowly than from one that does.
MAX_ENGINE_STRETCH = 1.10
#: Above this share of a core other programs disturbed the measurement.
MAX_OTHERS_SHARE = 0.10
PATH_LABELS = {
    V1: {"begin_ms": "  begin_step", "propose_ms": "  propose", "take_ms": "  take"},
    MRV2: {"begin_ms": "  step laid out", "propose_ms": "  output taken"},
}


@dataclass(frozen=True, slots=True)
class HotpathOptions:
    """What is measured, as the command explains it; None leaves the interpreter or the late rule as they are."""

    workload: Workload = field(default_factory=lambda: Workload(rows=256))
    drafted: int = 64
    steps: int = 400
    runs: int = 3
    frames: int = 3000
    switch_interval_ms: float | None = None
    tree: str = ""
    late: str | None = None
    running_branches: int = 256
    pace: str = "4+0.02"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of steps.

    Attributes:
        steps: Their times.
        mean_tree_nodes: Nodes per session that has a tree, after the step; mean.
        nodes_per_s: Nodes that arrived, in time or stale.
        elapsed_s: Of the steps.
        engine: What the drafter's engine did meanwhile; see `Engine.stats` of the simulator.
        gc_pauses_ms: The garbage collector's.
        others_share: Of one core, used by other programs on the two that are measured on.
        loop_us: What the calibration loop took before it; see `hotpath.calibration_us`.
    """

    steps: tuple[StepTimes, ...]
    mean_tree_nodes: float
    nodes_per_s: float
    elapsed_s: float
    engine: dict[str, float]
    gc_pauses_ms: tuple[float, ...]
    others_share: float
    loop_us: float

    def figures(self) -> dict[str, Any]:
        """The run's own figures."""
        steps, engine = self.steps, self.engine
        decoding, engine_steps = sum(step.decoding for step in steps), max(1.0, engine["steps"])
        return {
            "path_ms": quantiles([(step.begin_ns + step.propose_ns + step.take_ns) / 1e6 for step in steps]),
            "begin_ms": quantiles([step.begin_ns / 1e6 for step in steps]),
            "propose_ms": quantiles([step.propose_ns / 1e6 for step in steps]),
            "take_ms": quantiles([step.take_ns / 1e6 for step in steps]),
            "cpu_ms": quantiles([step.cpu_ns / 1e6 for step in steps]),
            "waited_ms": quantiles([step.wait_ns / 1e6 for step in steps]),
            "waited_steps": sum(step.wait_ns > 0 for step in steps),
            "mean_tree_nodes": round(self.mean_tree_nodes, 1),
            "nodes_per_s": round(self.nodes_per_s),
            "accepted_per_step": round((sum(s.yielded for s in steps) - decoding) / max(1, decoding), 3),
            "offered_per_step": round(sum(s.offered for s in steps) / max(1, decoding), 3),
            "step_ms": round(1e3 * self.elapsed_s / len(steps), 2),
            "engine_step_ms": round(1e3 * engine["busy_s"] / engine_steps, 3),
            "engine_paced_ms": round(1e3 * engine["paced_s"] / engine_steps, 3),
            "engine_branches": round(engine["tokens"] / engine_steps, 1),
            "engine_cpu_share": round(engine["cpu_s"] / self.elapsed_s, 3),
            "gc": {"pauses": len(self.gc_pauses_ms), "longest_ms": round(max(self.gc_pauses_ms, default=0.0), 3)},
            "others_share": round(self.others_share, 3),
            "loop_us": round(self.loop_us, 1),
        }


@dataclass(frozen=True, slots=True)
class HotpathResult:
    """Everything that was found.

    Attributes:
        options: What was measured.
        runs: By model runner the runs.
        frames: Quantiles of single frames' times in microseconds, mean size in bytes, and count, by what they carry;
            those first for which there is a bar.
        switch_interval_ms: The interpreter's.
        elapsed_s: Warm-up included.
    """

    options: HotpathOptions
    runs: Mapping[str, Sequence[Run]]
    frames: Mapping[str, Mapping[str, Any]]
    switch_interval_ms: float
    elapsed_s: float

    @property
    def held(self) -> bool:
        """Whether all bars are kept."""
        return bool(self.as_json()["held"])

    def as_json(self) -> dict[str, Any]:
        """Return by model runner the medians over its runs, what they were measured with, and the runs themselves."""
        runs = {runner: [run.figures() for run in runs] for runner, runs in self.runs.items()}
        found = {runner: _medians(figures) for runner, figures in runs.items()}
        frame_us = next(iter(self.frames.values()))["us"]
        held = {runner: _held("path_ms", figures["path_ms"]) for runner, figures in found.items()}
        return {
            "sessions": self.options.workload.rows,
            "drafted": self.options.drafted,
            "runners": {runner: found[runner] | {"held": held[runner], "runs": runs[runner]} for runner in runs},
            "frame_us": frame_us,
            "held": all(held.values()) and _held("frame_us", frame_us),
            "bars": BARS,
            "frames": self.frames,
            "steps": self.options.steps,
            "options": asdict(self.options),
            "switch_interval_ms": self.switch_interval_ms,
            "elapsed_s": round(self.elapsed_s, 1),
        }


def _held(name: str, figures: Mapping[str, float]) -> bool:
    return all(figures[key] <= bar for key, bar in BARS[name].items())


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the quantiles that are shown."""
    return {name: round(percentile(values, share), 4) for name, share in QUANTILES.items()}


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: _medians([run[name] for run in runs])
        if isinstance(value, dict)
        else round(statistics.median(run[name] for run in runs), 4)
        for name, value in runs[0].items()
    }


def hotpath_document(result: HotpathResult, provenance: Provenance) -> Document:
    """The figures against their bars, and what the measurement itself suffered from."""
    data = result.as_json()
    found = data["runners"]
    warnings = [warning for runner, figures in found.items() for warning in _warnings(runner, figures)]
    return Document(
        title="What the serving path costs",
        tables=[*(_path_table(runner, data, figures) for runner, figures in found.items()), _frame_table(data)],
        warnings=warnings,
        remarks=[f"{'all bars held' if data['held'] else 'a bar was missed'} {MARKS[data['held']]}"],
        method=[
            *(_method(runner, figures) for runner, figures in found.items()),
            f"{data['options']['runs']} runs of {data['steps']} steps, in turn, medians of runs; switch interval "
            f"{data['switch_interval_ms']:g} ms; waits on purpose are not counted, nor is the walk on "
            "Model Runner V2, which is the device's",
        ],
        provenance=str(provenance),
    )


def _warnings(runner: str, figures: Mapping[str, Any]) -> list[str]:
    warnings = []
    if figures["others_share"] > MAX_OTHERS_SHARE:
        warnings.append(f"{runner}: other programs took {figures['others_share']:.0%} of a core: measure again")
    if figures["engine_step_ms"] > MAX_ENGINE_STRETCH * figures["engine_paced_ms"]:
        warnings.append(f"{runner}: the drafter did not keep its pace: frames came more slowly than they would")
    if figures["nodes_per_s"] < BAR_NODES_PER_S:
        warnings.append(f"{runner}: {figures['nodes_per_s']:.0f} nodes/s, where the bar is for {BAR_NODES_PER_S:,}")
    return warnings


def _method(runner: str, figures: Mapping[str, Any]) -> str:
    return (
        f"{runner}: calibration loop {figures['loop_us']:.0f} µs; {figures['mean_tree_nodes']:.0f} nodes per tree, "
        f"{figures['nodes_per_s']:.0f} nodes/s, {figures['accepted_per_step']:.2f} accepted of "
        f"{figures['offered_per_step']:.2f} drafts per row and step; target's step {figures['step_ms']:.0f} ms; "
        f"engine's {figures['engine_step_ms']:.1f} ms (pace {figures['engine_paced_ms']:.1f}) at "
        f"{figures['engine_branches']:.0f} branches, {figures['engine_cpu_share']:.0%} of a core; garbage collector's "
        f"longest pause {figures['gc']['longest_ms']:.1f} ms; waits in {figures['waited_steps']:.0f} steps of a run"
    )


def _path_table(runner: str, data: Mapping[str, Any], figures: Mapping[str, Any]) -> Table:
    labels = {"path_ms": "all our calls of a step, ms", **PATH_LABELS[runner], "cpu_ms": "  processor time"}
    rows = [_row(label, figures[name], BARS.get(name, {}), digits=3) for name, label in labels.items()]
    title = f"{runner}: {data['sessions']} requests, the drafter has room for {data['drafted']}"
    return Table(title, ["", *QUANTILES, "may be"], rows)


def _frame_table(data: Mapping[str, Any]) -> Table:
    rows = [
        _row(f"frame of {name}, µs", frames["us"], {} if index else BARS["frame_us"], digits=0)
        for index, (name, frames) in enumerate(data["frames"].items())
    ]
    return Table("one frame, decoded and applied", ["", *QUANTILES, "may be"], rows)


def _row(label: str, values: Mapping[str, float], bars: Mapping[str, float], digits: int) -> list[str]:
    marks = {name: f" {MARKS[values[name] <= bar]}" for name, bar in bars.items()}
    cells = [f"{values[name]:.{digits}f}{marks.get(name, '')}" for name in QUANTILES]
    return [label, *cells, " / ".join(f"{bar:g}" for bar in bars.values())]
