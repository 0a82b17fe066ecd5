"""The measurement of the hot path: its figures, and one tiny run of all of it."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.console import print_document
from vllm_wanspec.lab.target import hotpath
from vllm_wanspec.lab.target.hotpath import measure
from vllm_wanspec.lab.target.hotpath_report import (
    BARS,
    HotpathOptions,
    HotpathResult,
    Run,
    hotpath_document,
)
from vllm_wanspec.sim.target import StepTimes, Workload

HERE = Provenance("a machine", {"python": "3.11"}, "abc", "python -m hotpath", 99.0)

# Figures


def step(propose_ms: float, take_ms: float = 0.1) -> StepTimes:
    return StepTimes(1000, int(propose_ms * 1e6), int(take_ms * 1e6), 0, 100_000, decoding=4, yielded=10, offered=16)


def run_of(*propose_ms: float) -> Run:
    engine = {"steps": 100.0, "tokens": 400.0, "busy_s": 0.55, "paced_s": 0.5, "cpu_s": 0.2}
    return Run(tuple(step(ms) for ms in propose_ms), 50.0, 1000.0, 1.0, engine, (0.5, 2.0), 0.02)


def report(*runs: Run, frame_us: float = 100.0) -> HotpathResult:
    frames = {"us": {"p50": frame_us, "p99": frame_us}, "bytes": 1500, "count": 5}
    return HotpathResult(
        HotpathOptions(Workload(rows=4), steps=3), runs, {"64 nodes of 1 session": frames, "others": frames}, 5.0, 12.0
    )


def shown(result: HotpathResult) -> str:
    output = io.StringIO()
    print_document(hotpath_document(result, HERE), Console(file=output, width=120))
    return output.getvalue()


def test_figures_are_medians_of_runs() -> None:
    figures = report(run_of(0.2, 0.3, 0.4), run_of(0.3, 0.4, 0.5), run_of(0.4, 9.0, 9.0)).as_json()
    assert figures["propose_take_ms"] == {"p50": 0.5, "p99": 0.6}
    assert figures["frame_us"]["p50"] == 100.0
    assert figures["accepted_per_step"] == pytest.approx(1.5)
    assert figures["engine_step_ms"] == pytest.approx(5.5)
    assert figures["gc"]["longest_ms"] == 2.0
    assert len(figures["runs"]) == 3
    assert figures["held"] is True
    assert figures["bars"] == BARS


@pytest.mark.parametrize(("propose_ms", "frame_us"), [(0.7, 100.0), (0.3, 151.0)], ids=["propose and take", "frame"])
def test_a_missed_bar_is_said(propose_ms: float, frame_us: float) -> None:
    result = report(run_of(propose_ms, propose_ms), frame_us=frame_us)
    assert result.held is result.as_json()["held"] is False
    assert shown(result).splitlines().count("a bar was missed ✗") == 1
    assert shown(result).count("✗") == 2  # in the table too


def test_a_slow_tail_misses_its_bar() -> None:
    assert report(run_of(*[0.3] * 50, 2.5)).as_json()["held"] is False


def test_a_drafter_that_was_too_slow_is_said() -> None:
    slow = run_of(0.3)
    slow.engine["busy_s"] = 0.9
    assert "did not keep its pace" in shown(report(slow))


def test_a_busy_machine_is_said() -> None:
    busy = replace(run_of(0.3), others_share=0.4)
    assert "other programs took 40% of a core" in shown(report(busy))


# All of it


def test_a_tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotpath, "WARM_UP_WINDOW", 8)
    monkeypatch.setattr(machine, "pin_cores", lambda gpu: (None, None))  # the tests may share a core with others
    workload = Workload(rows=4, prompt_tokens=30, output_tokens=40, step_ms=15.0)
    interval_s = sys.getswitchinterval()
    found = measure(HotpathOptions(workload, steps=30, runs=2, frames=20, switch_interval_ms=1.0), Console(quiet=True))
    assert sys.getswitchinterval() == interval_s
    figures = json.loads(json.dumps(found.as_json()))
    assert figures["sessions"] == 4
    assert len(figures["runs"]) == 2
    for name in ("propose_take_ms", "frame_us"):
        assert 0.0 < figures[name]["p50"] <= figures[name]["p99"] < 1e5
    assert 1.0 < figures["mean_tree_nodes"] < 512
    assert figures["nodes_per_s"] > 10
    assert figures["accepted_per_step"] > 0.05
    assert figures["engine_step_ms"] >= 0.95 * figures["engine_paced_ms"] > 4.0
    assert figures["switch_interval_ms"] == pytest.approx(1.0)
    assert figures["bars"] == BARS


def invoke(*arguments: str) -> Any:
    app = Typer()
    app.command()(hotpath.main)
    return CliRunner().invoke(app, [*arguments])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HotpathOptions] = []

    def measure(options: HotpathOptions, console: Console) -> HotpathResult:
        asked.append(options)
        return report(run_of(*[9.0] * options.steps))

    path = tmp_path / "new" / "hotpath.json"
    monkeypatch.setattr(hotpath, "measure", measure)
    done = invoke("--json", str(path), "--steps", "3", "--sessions", "8", "--late", "none", "--tree", "max_branches=8")
    assert done.exit_code == 0, done.output
    assert "missed" in done.output
    assert asked == [HotpathOptions(Workload(rows=8), steps=3, late="none", tree="max_branches=8")]
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["held"] is False
    assert {"machine", "versions", "commit", "command", "seconds", "elapsed_s"} <= data.keys()
    assert [entry.name for entry in path.parent.iterdir()] == ["hotpath.json"]
    assert invoke("--json", str(path), "--check").exit_code == 1
    assert asked[-1] == HotpathOptions()


def test_options_that_cannot_be(tmp_path: Path) -> None:
    for arguments, problem in (
        (["--steps", "0"], "--steps"),
        (["--late", "never"], "--late"),
        (["--json", str(tmp_path)], "bench-hotpath: --json: cannot write"),
        (
            ["--json", str(tmp_path / "h.json"), "--tree", "height=3", "--frames", "1"],
            "bench-hotpath: wanspec: height: is not a",
        ),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, done.output
        assert problem in done.output
