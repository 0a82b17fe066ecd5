"""Whole runs of the side-by-side bench, with stand-ins for vLLM as real processes."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_wanspec.cli.main import app
from vllm_wanspec.errors import ConfigError, UnsupportedError
from vllm_wanspec.lab.compare import measure, probes, run
from vllm_wanspec.lab.compare.lineup import Lineup
from vllm_wanspec.lab.compare.plan import BenchOptions
from vllm_wanspec.lab.compare.run import Outputs, run_bench
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.servers import ServerError, ServerSpec, free_ports

FAKE = Path(__file__).parents[1] / "fake_trees_vllm.py"
ARMS = ("none", "draft_model", "wanspec_dead")


class Stage:
    """Lays out stand-ins in place of the servers, and remembers which were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs = Outputs(folder / "bench.json", None, folder / "logs")
        self.started: list[str] = []
        self.extra: dict[str, list[str]] = {}
        self.screen = Console(file=io.StringIO(), width=160)

    def server(self, name: str, *extra: str) -> ServerSpec:
        (port,) = free_ports(1)
        stats = self.folder / f"{name}.pacing.json"
        argv = [sys.executable, str(FAKE), "--port", str(port), "--stats", str(stats)]
        return ServerSpec(name, [*argv, *extra, *self.extra.get(name, [])], port)

    def plan_lineup(self, options: BenchOptions, folder: Path) -> Lineup:
        (port,) = free_ports(1)
        self.started.append("lineup")
        extra = {"wanspec_dead": ["--metrics-port", str(port)]}
        targets = {arm: self.server(arm, *extra.get(arm, [])) for arm in options.started if arm != "draft_model"}
        metrics = {"wanspec_dead": f"http://127.0.0.1:{port}/metrics"} if "wanspec_dead" in targets else {}
        stats = {name: self.folder / f"{name}.pacing.json" for name in targets}
        return Lineup((), targets, metrics, stats, None, folder / "oracle.json")

    def trial_spec(self, options: BenchOptions, gamma: int, folder: Path, name: str = "draft_model") -> ServerSpec:
        self.started.append(f"{name} {gamma}")
        spec = self.server(name)
        (folder / "draft_model.pacing.json").write_text('{"steps": 5, "overruns": 0}')
        return spec

    def run(self, **changes: Any) -> Any:
        return run_bench(self.options(**changes), self.outputs, self.screen)

    def options(self, **changes: Any) -> BenchOptions:
        settings: dict[str, Any] = {
            "target": "big",
            "draft": "small",
            "prompts": self.folder / "prompts.jsonl",
            "arms": ARMS,
            "count": 3,
            "repeats": 2,
            "gammas": (2, 3),
            "max_tokens": 64,
        }
        return BenchOptions(**(settings | changes))

    @property
    def printed(self) -> str:
        assert isinstance(self.screen.file, io.StringIO)
        return " ".join(self.screen.file.getvalue().split())

    @property
    def journal(self) -> Path:
        return self.folder / "bench.json.journal"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    found = Stage(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def {name}("}) + "\n" for name in "abcd"))
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    monkeypatch.setattr(run, "plan_lineup", found.plan_lineup)
    monkeypatch.setattr(run, "trial_spec", found.trial_spec)
    monkeypatch.setattr(run, "STATS_SETTLE_S", 0.0)
    for name in ("SETTLE_MIN_S", "SETTLE_POLL_S"):
        monkeypatch.setattr(probes, name, 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return found


def test_a_run_tries_every_length_measures_all_and_leaves_no_journal(stage: Stage) -> None:
    result = stage.run()
    assert result.ended_by is None
    assert [reference.name for reference in result.references] == ["line 1", "line 2", "line 3"]
    assert {len(reference.expected) for reference in result.references} == {26}
    assert len(result.batches) == 3 * 3 * 2
    assert result.gamma in (2, 3)
    tries = ["draft_model γ=2 2", "draft_model γ=3 3"]
    assert stage.started == ["lineup", *tries, f"draft_model {result.gamma}"]
    # 26 tokens in pairs; the warm-up is not counted.
    assert result.paced["none"].steps == 13 * 3 * 2
    data = json.loads((stage.folder / "bench.json").read_text())
    assert (data["complete"], len(data["rows"])) == (True, 3)
    dead = next(batch for batch in result.batches if batch.cell.arm == "wanspec_dead")
    assert dead.counters["steps"] == 13
    assert not stage.journal.exists()
    known = json.loads((stage.folder / "logs" / "oracle.json").read_text())
    assert [len(expected) for _, expected in known] == [26, 26, 26]


def test_a_run_whose_server_dies_keeps_what_it_has_and_goes_on(stage: Stage) -> None:
    stage.extra["wanspec_dead"] = ["--fail-after", "50"]
    with pytest.raises((ServerError, ClientError)):
        stage.run()
    data = json.loads((stage.folder / "bench.json").read_text())
    assert data["complete"] is False
    assert stage.journal.exists()
    assert "the same command goes on from there" in stage.printed
    done = sum(line.startswith('{"batch"') for line in stage.journal.read_text().splitlines())
    assert 0 < done < 18

    stage.extra.clear()
    stage.started.clear()
    result = stage.run()
    assert f"{done} requests are done" in stage.printed
    assert stage.started == ["lineup", f"draft_model {result.gamma}"]  # no pre-pass again
    keys = [(batch.cell, batch.repeat, one.prompt) for batch in result.batches for one in batch.requests]
    assert len(keys) == len(set(keys)) == 18
    assert result.paced["none"].steps >= 13 * 3 * 2
    assert not stage.journal.exists()


def test_a_run_that_failed_after_its_last_request_starts_no_servers(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*unused: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", broken)
        with pytest.raises(OSError, match="disk full"):
            stage.run()
    assert stage.journal.exists()
    stage.started.clear()
    result = stage.run()
    assert stage.started == []
    assert len(result.batches) == 18
    assert result.paced["none"].steps == 13 * 3 * 2
    assert json.loads((stage.folder / "bench.json").read_text())["complete"] is True


def test_a_journal_of_another_run_is_left_alone(stage: Stage) -> None:
    stage.journal.write_text('{"run": {"target": "other"}}\n')
    with pytest.raises(ConfigError, match="is the journal of a run with another target"):
        stage.run()
    assert stage.journal.read_text() == '{"run": {"target": "other"}}\n'


def test_too_few_long_texts_are_told(stage: Stage) -> None:
    with pytest.raises(ConfigError, match="--count: only 4 of 4 prompts have 24 tokens"):
        stage.run(count=5)


def test_one_length_needs_no_pre_pass(stage: Stage) -> None:
    result = stage.run(arms=("none", "draft_model"), gammas=(4,), repeats=1)
    assert (result.gamma, result.trials) == (4, ())
    assert stage.started == ["lineup", "draft_model 4"]


def test_without_vllm_nothing_begins(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed")
    with pytest.raises(UnsupportedError, match="vLLM is not installed"):
        stage.run()
    assert not stage.journal.exists()


def command(stage: Stage, *more: str) -> list[str]:
    arguments = ["--target", "big", "--draft", "small", "--prompts", str(stage.folder / "prompts.jsonl")]
    arguments += ["--json", str(stage.folder / "bench.json"), "--keep-log", str(stage.folder / "logs")]
    return ["bench", *arguments, "--arms", "none", "--count", "2", "--repeat", "1", *more]


def test_the_command_measures(stage: Stage) -> None:
    done = CliRunner().invoke(app, command(stage))
    assert done.exit_code == 0, done.output
    options = json.loads((stage.folder / "bench.json").read_text())["options"]
    assert (options["target"], options["arms"], options["count"]) == ("big", ["none"], 2)
    assert CliRunner().invoke(app, command(stage, "--check")).exit_code == 1  # such a run cannot tell


def test_wrong_outputs_fail_the_command(stage: Stage) -> None:
    stage.extra["wanspec_dead"] = ["--differ-at", "5"]
    stage.extra["none"] = ["--gap", "1"]
    done = CliRunner().invoke(app, command(stage, "--arms", "none,wanspec_dead"))
    assert done.exit_code == 1
    assert "at generated position 5" in " ".join(done.output.split())


def test_ctrl_c_ends_the_command_and_keeps_the_journal(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measure.Measurement._batch
    count = 0

    async def interrupted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return await asked(*arguments)

    monkeypatch.setattr(measure.Measurement, "_batch", interrupted)
    done = CliRunner().invoke(app, command(stage))
    assert done.exit_code == 130
    assert "the same command goes on from there" in " ".join(done.output.split())
    assert stage.journal.exists()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--arms", "x"), "wanspec bench: --arms: 'x' is not an arm"),
        (("--rtt-ms", "fast"), "wanspec bench: --rtt-ms: 'fast' is not a list of numbers"),
        (("--gammas", "2.5"), "wanspec bench: --gammas: '2.5' is not a list of numbers"),
        (("--target-pace", "quick"), "wanspec bench: --target-pace: 'quick' is not a pace"),
        (("--prompts", "/nowhere"), "wanspec bench: prompts: cannot read /nowhere"),
        (("--json", "/nowhere/bench.json"), "wanspec bench: --json: cannot write /nowhere/bench.json"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_status_2(stage: Stage, more: tuple[str, ...], problem: str) -> None:
    done = CliRunner().invoke(app, command(stage, *more))
    assert done.exit_code == 2
    assert done.output.startswith(problem)
    assert done.output.count("\n") == 1
    assert stage.started == []
