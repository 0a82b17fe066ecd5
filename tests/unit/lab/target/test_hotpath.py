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
    MRV2,
    V1,
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
    return Run(tuple(step(ms) for ms in propose_ms), 50.0, 60_000.0, 1.0, engine, (0.5, 2.0), 0.02, 80.0)


def report(*runs: Run, frame_us: float = 100.0) -> HotpathResult:
    frames = {"us": {"p50": frame_us, "p99": frame_us}, "bytes": 1500, "count": 5}
    options = HotpathOptions(Workload(rows=4), drafted=2, steps=3)
    by_runner = {V1: runs, MRV2: [run_of(0.1)]}
    return HotpathResult(options, by_runner, {"64 nodes of 1 session": frames, "others": frames}, 5.0, 12.0)


def shown(result: HotpathResult) -> str:
    output = io.StringIO()
    print_document(hotpath_document(result, HERE), Console(file=output, width=120))
    return output.getvalue()


def test_figures_are_medians_of_runs() -> None:
    figures = report(run_of(0.1, 0.2, 0.3), run_of(0.2, 0.25, 0.4), run_of(0.3, 9.0, 9.0)).as_json()
    v1 = figures["runners"][V1]
    assert v1["path_ms"] == {"p50": 0.351, "p99": 0.501}
    assert figures["frame_us"]["p50"] == 100.0
    assert v1["accepted_per_step"] == pytest.approx(1.5)
    assert v1["engine_step_ms"] == pytest.approx(5.5)
    assert v1["gc"]["longest_ms"] == 2.0
    assert [len(found["runs"]) for found in figures["runners"].values()] == [3, 1]
    assert v1["held"] is figures["held"] is True
    assert figures["bars"] == BARS


@pytest.mark.parametrize(("propose_ms", "frame_us"), [(0.4, 100.0), (0.2, 151.0)], ids=["propose and take", "frame"])
def test_a_missed_bar_is_said(propose_ms: float, frame_us: float) -> None:
    result = report(run_of(propose_ms, propose_ms), frame_us=frame_us)
    assert result.held is result.as_json()["held"] is False
    assert shown(result).splitlines().count("a bar was missed ✗") == 1
    assert shown(result).count("✗") == 2  # in the table too


def test_a_slow_tail_misses_its_bar() -> None:
    assert report(run_of(*[0.2] * 50, 2.5)).as_json()["held"] is False


def test_a_drafter_that_was_too_slow_is_said() -> None:
    slow = run_of(0.2)
    slow.engine["busy_s"] = 0.9
    assert "did not keep its pace" in shown(report(slow))


def test_a_busy_machine_is_said() -> None:
    busy = replace(run_of(0.2), others_share=0.4)
    assert "other programs took 40% of a core" in shown(report(busy))


def test_fewer_nodes_than_the_bar_is_for_are_said() -> None:
    assert "30000 nodes/s, where the bar is for 50,000" in shown(report(replace(run_of(0.2), nodes_per_s=30_000.0)))
    assert "where the bar is for" not in shown(report(run_of(0.2)))


# All of it


def test_a_tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotpath, "WARM_UP_WINDOW", 8)
    monkeypatch.setattr(machine, "pin_cores", lambda gpu: (None, None))  # the tests may share a core with others
    workload = Workload(rows=4, prompt_tokens=30, output_tokens=40, step_ms=15.0)
    interval_s = sys.getswitchinterval()
    options = HotpathOptions(workload, drafted=3, steps=30, runs=2, frames=20, switch_interval_ms=1.0)
    found = measure(options, Console(quiet=True))
    assert sys.getswitchinterval() == interval_s
    figures = json.loads(json.dumps(found.as_json()))
    assert figures["sessions"] == 4
    assert list(figures["runners"]) == [V1, MRV2]
    assert 0.0 < figures["frame_us"]["p50"] <= figures["frame_us"]["p99"] < 1e5
    for found_with in figures["runners"].values():
        assert len(found_with["runs"]) == 2
        assert 0.0 < found_with["path_ms"]["p50"] <= found_with["path_ms"]["p99"] < 1e5
        assert 1.0 < found_with["mean_tree_nodes"] < 512
        assert found_with["nodes_per_s"] > 10
        assert found_with["accepted_per_step"] > 0.05
        assert found_with["engine_step_ms"] >= 0.95 * found_with["engine_paced_ms"] > 3.0
        assert 1.0 < found_with["loop_us"] < 1e5
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
