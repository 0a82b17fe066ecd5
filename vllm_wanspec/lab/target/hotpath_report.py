"""What the measurement of the hot path found: its figures, and what people are told of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_wanspec.drafter.host import DEFAULT_RUNNING_BRANCHES
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.cells import MARKS
from vllm_wanspec.lab.report.document import Document, Table
from vllm_wanspec.lab.stats import percentile
from vllm_wanspec.sim.target import StepTimes, Workload

#: What the hot path may cost.
BARS = {"propose_take_ms": {"p50": 0.6, "p99": 2.0}, "frame_us": {"p50": 150.0}}
QUANTILES = {"p50": 0.50, "p99": 0.99}
#: Above this the drafter did not keep its pace, so frames came more slowly than from one that does.
MAX_ENGINE_STRETCH = 1.10
#: Above this share of a core other programs disturbed the measurement.
MAX_OTHERS_SHARE = 0.10
LABELS = {
    "propose_take_ms": "propose + take, ms",
    "propose_ms": "  propose",
    "take_ms": "  take",
    "cpu_ms": "  processor time, waits' included",
    "begin_step_ms": "begin_step, ms",
}


@dataclass(frozen=True, slots=True)
class HotpathOptions:
    """What is measured, as the command explains it; None leaves the interpreter or the late rule as they are."""

    workload: Workload = field(default_factory=Workload)
    steps: int = 400
    runs: int = 3
    frames: int = 3000
    switch_interval_ms: float | None = None
    tree: str = ""
    late: str | None = None
    running_branches: int = DEFAULT_RUNNING_BRANCHES


@dataclass(frozen=True, slots=True)
class Run:
    """One run of steps.

    Attributes:
        steps: Their times.
        mean_tree_nodes: Live nodes per session as `propose` finds them, mean.
        nodes_per_s: Nodes that arrived, in time or stale.
        elapsed_s: Of the steps.
        engine: What the drafter's engine did meanwhile; see `Engine.stats` of the simulator.
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
        decoding, engine_steps = sum(step.decoding for step in steps), max(1.0, engine["steps"])
        return {
            "propose_take_ms": quantiles([(step.propose_ns + step.take_ns) / 1e6 for step in steps]),
            "propose_ms": quantiles([step.propose_ns / 1e6 for step in steps]),
            "take_ms": quantiles([step.take_ns / 1e6 for step in steps]),
            "cpu_ms": quantiles([step.cpu_ns / 1e6 for step in steps]),
            "waited_ms": quantiles([step.wait_ns / 1e6 for step in steps]),
            "waited_steps": sum(step.wait_ns > 0 for step in steps),
            "begin_step_ms": quantiles([step.begin_ns / 1e6 for step in steps]),
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
        }


@dataclass(frozen=True, slots=True)
class HotpathResult:
    """Everything that was found.

    Attributes:
        options: What was measured.
        runs: The runs.
        frames: Quantiles of single frames' times in microseconds, mean size in bytes, and count, by what they carry;
            those first for which there is a bar.
        switch_interval_ms: The interpreter's.
        elapsed_s: Warm-up included.
    """

    options: HotpathOptions
    runs: Sequence[Run]
    frames: Mapping[str, Mapping[str, Any]]
    switch_interval_ms: float
    elapsed_s: float

    @property
    def held(self) -> bool:
        """Whether all bars are kept."""
        return bool(self.as_json()["held"])

    def as_json(self) -> dict[str, Any]:
        """Return medians over the runs, what they were measured with, and the runs themselves."""
        runs = [run.figures() for run in self.runs]
        found = _medians(runs) | {"frame_us": next(iter(self.frames.values()))["us"]}
        return {
            "sessions": self.options.workload.rows,
            **found,
            "held": all(found[name][key] <= bar for name, bars in BARS.items() for key, bar in bars.items()),
            "bars": BARS,
            "frames": self.frames,
            "steps": self.options.steps,
            "runs": runs,
            "options": asdict(self.options),
            "switch_interval_ms": self.switch_interval_ms,
            "elapsed_s": round(self.elapsed_s, 1),
        }


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
    figures = result.as_json()
    warnings = []
    if figures["others_share"] > MAX_OTHERS_SHARE:
        warnings.append(f"other programs took {figures['others_share']:.0%} of a core: measure again")
    if figures["engine_step_ms"] > MAX_ENGINE_STRETCH * figures["engine_paced_ms"]:
        warnings.append("the drafter did not keep its pace: frames came more slowly than they would")
    return Document(
        title="What the serving path costs",
        tables=[_table(figures)],
        warnings=warnings,
        remarks=[f"{'all bars held' if figures['held'] else 'a bar was missed'} {MARKS[figures['held']]}"],
        method=[
            f"{figures['mean_tree_nodes']:.0f} nodes per tree, {figures['nodes_per_s']:.0f} nodes/s, "
            f"{figures['accepted_per_step']:.2f} accepted of {figures['offered_per_step']:.2f} drafts per row and "
            f"step; target's step {figures['step_ms']:.0f} ms; engine's {figures['engine_step_ms']:.1f} ms "
            f"(pace {figures['engine_paced_ms']:.1f}) at {figures['engine_branches']:.0f} branches, "
            f"{figures['engine_cpu_share']:.0%} of a core",
            f"{len(figures['runs'])} runs of {figures['steps']} steps, medians of runs; switch interval "
            f"{figures['switch_interval_ms']:g} ms; garbage collector's longest pause "
            f"{figures['gc']['longest_ms']:.1f} ms; waits on purpose in {figures['waited_steps']:.0f} steps of a run, "
            "not counted",
        ],
        provenance=str(provenance),
    )


def _table(figures: Mapping[str, Any]) -> Table:
    rows = [_row(label, figures[name], BARS.get(name, {}), digits=3) for name, label in LABELS.items()]
    for index, (name, frames) in enumerate(figures["frames"].items()):
        rows.append(_row(f"frame of {name}, µs", frames["us"], {} if index else BARS["frame_us"], digits=0))
    return Table(f"hot path, {figures['sessions']} sessions", ["", *QUANTILES, "may be"], rows)


def _row(label: str, values: Mapping[str, float], bars: Mapping[str, float], digits: int) -> list[str]:
    marks = {name: f" {MARKS[values[name] <= bar]}" for name, bar in bars.items()}
    cells = [f"{values[name]:.{digits}f}{marks.get(name, '')}" for name in QUANTILES]
    return [label, *cells, " / ".join(f"{bar:g}" for bar in bars.values())]
