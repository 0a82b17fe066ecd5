"""The measurement of the hot path: its figures, and one tiny run of all of it."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.target import hotpath
from vllm_wanspec.lab.target.hotpath import measure
from vllm_wanspec.lab.target.hotpath_frames import measure_frames
from vllm_wanspec.lab.target.hotpath_report import (
    BARS,
    Frames,
    Options,
    Report,
    Run,
    percentile,
    print_report,
    write_json,
)
from vllm_wanspec.sim.target import StepTimes, Workload

# Frames


@pytest.mark.parametrize("sessions", [1, 8])
def test_frames_are_decoded_and_applied(sessions: int) -> None:
    done: list[int] = []
    frames = measure_frames(40, sessions, lambda: done.append(1))
    assert len(frames.times_ns) == 40
    assert len(done) > 40
    assert all(0 < time_ns < 1e9 for time_ns in frames.times_ns)
    assert 64 * 12 < frames.mean_bytes < 64 * 40


# Figures


def step(propose_ms: float, take_ms: float = 0.1) -> StepTimes:
    return StepTimes(1000, int(propose_ms * 1e6), int(take_ms * 1e6), 0, 100_000, decoding=4, yielded=10, offered=16)


def run_of(*propose_ms: float) -> Run:
    engine = {"steps": 100.0, "tokens": 400.0, "busy_s": 0.55, "paced_s": 0.5, "cpu_s": 0.2}
    return Run(tuple(step(ms) for ms in propose_ms), 50.0, 1000.0, 1.0, engine, (0.5, 2.0), 0.02)


def report(*runs: Run, frame_us: float = 100.0) -> Report:
    frames = Frames(64, 1, (int(frame_us * 1e3),) * 5, 1500.0)
    return Report(asdict(Options(Workload(rows=4), steps=3)), runs, [frames, frames], 5.0, 12.0)


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([5.0], 0.99) == 5.0
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile(list(range(1, 101)), 0.5) == 50


def test_figures_are_medians_of_runs() -> None:
    figures = report(run_of(0.2, 0.3, 0.4), run_of(0.3, 0.4, 0.5), run_of(0.4, 9.0, 9.0)).figures()
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
    figures = report(run_of(propose_ms, propose_ms), frame_us=frame_us).figures()
    assert figures["held"] is False
    console = Console(record=True, width=120)
    print_report(figures, console)
    assert "missed" in console.export_text()


def test_a_slow_tail_misses_its_bar() -> None:
    assert report(run_of(*[0.3] * 50, 2.5)).figures()["held"] is False


def test_a_drafter_that_was_too_slow_is_said() -> None:
    slow = run_of(0.3)
    slow.engine["busy_s"] = 0.9
    console = Console(record=True, width=120)
    print_report(report(slow).figures(), console)
    assert "did not keep its pace" in console.export_text()


def test_a_busy_machine_is_said() -> None:
    busy = replace(run_of(0.3), others_share=0.4)
    console = Console(record=True, width=120)
    print_report(report(busy).figures(), console)
    assert "other programs took 40% of a core" in console.export_text()


def test_the_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "hotpath.json"
    write_json({"a": "µ"}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "µ"}
    assert [entry.name for entry in path.parent.iterdir()] == ["hotpath.json"]


# All of it


def test_a_tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotpath, "WARM_UP_WINDOW", 8)
    monkeypatch.setattr(machine, "pin_cores", lambda gpu: (None, None))  # the tests may share a core with others
    workload = Workload(rows=4, prompt_tokens=30, output_tokens=40, step_ms=15.0)
    interval_s = sys.getswitchinterval()
    found = measure(Options(workload, steps=30, runs=2, frames=20, switch_interval_ms=1.0), Console(quiet=True))
    assert sys.getswitchinterval() == interval_s
    figures = json.loads(json.dumps(found.figures()))
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
    assert figures["machine"]
    assert figures["versions"]["python"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hotpath.json"
    monkeypatch.setattr(hotpath, "measure", lambda options, console: report(run_of(*[9.0] * options.steps)))
    monkeypatch.setattr(sys, "argv", ["hotpath", "--json", str(path), "--steps", "3"])
    hotpath.main()
    assert json.loads(path.read_text(encoding="utf-8"))["held"] is False
    assert "missed" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["hotpath", "--json", str(path), "--check"])
    with pytest.raises(SystemExit) as ended:
        hotpath.main()
    assert ended.value.code == 1
