"""``wanspec bench`` with real servers: a tiny run that is interrupted, and goes on when it is started again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_wanspec.lab.records import Cell, Records

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

ARGUMENTS = [
    *("--arms", "none,draft_model,draft_model_lookup,wanspec,wanspec_no_lookup,oracle"),
    *("--rtt-ms", "0,20"),
    *("--concurrency", "1,2"),
    *("--concurrent-arms", "none,draft_model,draft_model_lookup,wanspec"),
    *("--concurrent-rtt-ms", "20"),
    *("--count", "2"),
    *("--repeat", "1"),
    *("--max-tokens", "40"),
    *("--gammas", "2,3"),
]
DEADLINE_S = 400.0
BATCHES_BEFORE = 3
#: Two prompts through four local cells and four remote ones, and four batches of both.
BATCHES = 2 * 8 + 4


def start(folder: Path) -> subprocess.Popen[str]:
    outputs = ["--json", str(folder / "bench.json"), "--markdown", str(folder / "bench.md")]
    argv = [sys.executable, "-m", "vllm_wanspec.cli.main", "bench", *ARGUMENTS, *outputs]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def records(folder: Path, kind: str) -> list[str]:
    """The journal's lines of one kind."""
    journal = folder / "bench.json.journal"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [line for line in lines if line.startswith(f'{{"{kind}"')]


def test_an_interrupted_run_goes_on_and_compares_all_arms(tmp_path: Path) -> None:
    first = start(tmp_path)
    end_s = time.monotonic() + DEADLINE_S
    while len(records(tmp_path, "batch")) < BATCHES_BEFORE and first.poll() is None and time.monotonic() < end_s:
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    printed, _ = first.communicate(timeout=60)
    assert first.returncode == 130, printed
    assert "the same command goes on from there" in " ".join(printed.split())
    before = records(tmp_path, "batch")
    assert BATCHES_BEFORE <= len(before) < BATCHES
    assert len(records(tmp_path, "trial")) == 2 * 2 * 2  # two arms, two γ, two loads
    assert json.loads((tmp_path / "bench.json").read_text())["complete"] is False

    second = start(tmp_path)
    printed, _ = second.communicate(timeout=DEADLINE_S)
    # A busy machine may keep no pace, which the run says and this test leaves alone.
    assert second.returncode in (0, 1), printed
    assert f"{len(before)} requests are done" in " ".join(printed.split())
    assert "γ = 2" not in printed.partition("Pre-pass")[0]
    assert not (tmp_path / "bench.json.journal").exists()
    check_result(json.loads((tmp_path / "bench.json").read_text()))
    assert (tmp_path / "bench.md").is_file()
    assert (tmp_path / "bench.png").is_file()


def counted(result: dict[str, Any], arm: str, counter: str) -> list[float]:
    """What an arm's batches of single requests added to a counter."""
    batches = Records(result["records"]).batches
    return [batch.counters.values[counter] for batch in batches if batch.cell == Cell(arm, None)]


def check_result(result: dict[str, Any]) -> None:
    assert result["complete"] is True
    assert result["pacing"]
    rows = {(row["arm"], row["rtt_ms"], row["concurrency"]): row for row in result["rows"]}
    both = [(arm, None, streams) for arm in ("none", "draft_model", "draft_model_lookup") for streams in (1, 2)]
    remote = [(arm, rtt_ms, 1) for arm in ("wanspec", "wanspec_no_lookup") for rtt_ms in (0.0, 20.0)]
    assert rows.keys() == {*both, *remote, ("oracle", None, 1), ("wanspec", 20.0, 2)}
    assert all(row["wrong"] == 0 for row in rows.values())
    none, oracle = rows["none", None, 1], rows["oracle", None, 1]
    draft_model, near = rows["draft_model", None, 1], rows["wanspec", 0.0, 1]
    assert none["tokens_per_step"] == 1.0
    assert oracle["tokens_per_step"] > 5.0
    assert oracle["tpot_ms"] < draft_model["tpot_ms"] < none["tpot_ms"]
    assert near["tokens_per_step"] > 1.2
    assert near["tpot_ms"] < none["tpot_ms"]
    assert near["local_draft_passes"] == 0
    assert draft_model["local_draft_passes"] > 0
    assert near["drafted"] > near["wasted"] > 0
    assert draft_model["gamma"] in (2, 3)
    # Every forward of the draft model is counted where it runs: γ for each step of the target's, prefill's too.
    forwards = sum(counted(result, "draft_model", "target_forwards"))
    assert draft_model["local_draft_passes"] == draft_model["gamma"] * forwards
    assert abs(rows["wanspec", 20.0, 1]["measured_rtt_ms"] - 20.0) < 10.0
    bare, behind = rows["wanspec_no_lookup", 0.0, 1], rows["draft_model_lookup", None, 1]
    assert bare["accepted_lookup"] == 0 and near["accepted_main_line"] + near["accepted_branch"] > 0
    assert behind["accepted_main_line"] > 0 and behind["local_draft_passes"] > 0
    for row in (near, bare, behind):
        parts = [row[f"accepted_{who}"] for who in ("main_line", "branch", "lookup")]
        assert sum(parts) == round(row["acceptance"] * row["verified"])
    assert {arm["async_scheduling"] for arm in result["arms"].values()} == {False}
    assert result["arms"]["wanspec_no_lookup"]["lookup"] == "none"
    assert all(not fault.startswith("wanspec") for fault in result["faults"] if "by source" in fault)
