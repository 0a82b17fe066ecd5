"""The width bench's figures, its bar, and what people and programs are told of them."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.lab.drafter.width_figures import Arm, ChurnRow, Row, SteadyRow, WidthOptions, WidthResult, medians
from vllm_wanspec.lab.drafter.width_report import width_document
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.console import print_document
from vllm_wanspec.lab.report.markdown import markdown

HERE = Provenance("a machine", {"python": "3.11"}, "abc", "python -m width", 99.0)
COMMON = {"width": 1, "running": 1.0, "step_ms": 4.0, "events_per_s": 250.0, "starts_per_s": 1.5}
CPU = {"api_cpu": 0.2, "engine_cpu": 0.7}
STEADY = SteadyRow(**COMMON, **CPU, rounds=9, measured_s=4.5)
CHURN = ChurnRow(**COMMON, **CPU, gap_ms=3.9, first_ms=7.0, bytes_per_s=40_000.0, committed_per_s=25.0)


def row(width: int, step_ms: float, running: float | None = None, like: Row = STEADY, **more: float) -> Row:
    return replace(like, width=width, step_ms=step_ms, running=width if running is None else running, **more)


def result(*arms: Arm, churning: tuple[Arm, ...] = ()) -> WidthResult:
    return WidthResult(WidthOptions(window_s=8.0), arms, churning)


def test_medians_are_taken_figure_by_figure() -> None:
    found = medians([row(8, 3.0, events_per_s=5.0), row(8, 1.0, events_per_s=6.0), row(8, 2.0, events_per_s=1.0)])
    assert isinstance(found, SteadyRow)
    assert (found.width, found.step_ms, found.events_per_s) == (8, 2.0, 5.0)


def test_the_bar() -> None:
    assert Arm(None, (row(1, 4.0), row(32, 9.9))).held is True
    assert Arm(None, (row(1, 4.0), row(32, 10.1))).held is False
    assert Arm(None, (row(1, 4.0), row(32, 9.9, running=20.0))).held is None  # too few ran
    assert Arm(None, (row(1, 4.0), row(8, 9.9))).held is None
    assert not result().held
    assert result(Arm(None, (row(1, 4.0), row(32, 8.0)))).held


def test_the_report() -> None:
    pace = Pacing(5.0, 0.02)
    windows = (row(32, 8.0), row(1, 4.0), row(32, 9.0), row(1, 5.0), row(64, 40.0, running=30.0))
    churn = Arm(None, (row(1, 4.0, like=CHURN), row(32, 30.0, like=CHURN)))
    found = result(
        Arm(None, windows, {"api": {"our service": 0.75, "other": 0.25}}),
        Arm(pace, (row(1, 6.0), row(32, 30.0, others_cpu=0.4))),
        churning=(churn,),
    )
    assert [one.width for one in found.steady[0].rows] == [1, 32, 64]
    page = markdown(width_document(found, HERE))
    steady, commits = page.split("## Commits")
    assert "32 branches take 1.89 × the step of one; at most 2.5 is asked for: held ✓" in steady
    assert "32 branches take 5.00 × the step of one; at most 2.5 is asked for: missed ✗" in steady
    assert "step of 32 branches: engine 5.95 ms, 1.89 × its time for one; API server 1.70 ms." in steady
    assert "is asked for" not in commits
    assert "measured s" in steady
    assert "first ms" in commits
    assert "| 32 | 32.0 | 30.00 | 7.50 | 250 |" in commits
    assert "(!) Width 64: fewer than 90% of the branches asked for ran" in steady
    assert "| our service | 75% |" in steady
    assert "**DISTURBED: other programs took up to 40% of the drafter's core: measure again" in steady
    assert "drafter paced to 5 ms + 0.02 ms per token)" in steady
    assert page.count("DISTURBED") == 1
    assert page.endswith("`python -m width`; a machine; python 3.11; commit abc; 99 s.\n")
    assert "No profile" not in page
    assert "No profile" in markdown(width_document(result(churning=(churn,)), HERE))
    output = io.StringIO()
    print_document(width_document(found, HERE), Console(file=output, width=200))
    assert "drafter paced to 5 ms + 0.02 ms per token" in output.getvalue()
    assert "DISTURBED" in output.getvalue().splitlines()[-1]
    data = found.as_json()
    assert data["held"] is False
    assert [(arm["pace"], arm["held"]) for arm in data["steady"]] == [(None, True), ("5.0+0.02", False)]
    assert data["steady"][0]["widths"][1]["ratio"] == pytest.approx(8.5 / 4.5, abs=1e-4)
    assert len(data["steady"][0]["windows"]) == 5
    assert data["steady"][0]["profile"] == {"api": {"our service": 0.75, "other": 0.25}}
    assert data["churning"][0]["widths"][1]["first_ms"] == 7.0
