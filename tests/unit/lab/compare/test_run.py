"""Whole runs of the side-by-side bench, with stand-ins for vLLM as real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare_stage import Stage
from typer.testing import CliRunner

from vllm_wanspec.cli.main import app
from vllm_wanspec.errors import ConfigError, UnsupportedError
from vllm_wanspec.lab.compare import measure
from vllm_wanspec.lab.compare.arms import named_arms
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.report import bench_report
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.run import run_compare
from vllm_wanspec.lab.harness import machine, provenance
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.models import read_prompts
from vllm_wanspec.lab.harness.running import Outputs
from vllm_wanspec.lab.harness.servers import ServerError
from vllm_wanspec.lab.records import Load, Setting
from vllm_wanspec.lab.report.writing import Publication

ARMS = ("none", "draft_model", "wanspec_dead")


class BenchStage(Stage):
    """Runs of the bench over stand-ins."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.outputs = Outputs(folder / "bench.json", None, folder / "logs")

    def run(self, **changes: Any) -> Any:
        options = self.options(**changes)
        prompts = read_prompts(options.prompts, None)
        how: dict[str, Any] = {"name": "bench", "program": "wanspec", "report": bench_report}
        return run_compare(options, prompts, self.outputs, self.screen, **how)

    def options(self, **changes: Any) -> Options:
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
        settings |= changes
        return Options(**(settings | {"arms": named_arms("--arms", settings["arms"])}))

    @property
    def journal(self) -> Path:
        return self.folder / "bench.json.journal"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchStage:
    found = BenchStage(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def {name}("}) + "\n" for name in "abcd"))
    found.install(monkeypatch)
    return found


def test_a_run_tries_every_length_measures_all_and_leaves_no_journal(stage: BenchStage) -> None:
    result = stage.run()
    assert result.ended_by is None
    assert [reference.name for reference in result.references] == ["line 1", "line 2", "line 3"]
    assert {len(reference.expected) for reference in result.references} == {26}
    assert len(result.batches) == 3 * 3 * 2
    gamma = gamma_of(result)
    assert stage.started == ["lineup", "draft_model-2", "draft_model-3", f"draft_model-{gamma}"]
    assert [(trial.arm, trial.setting) for trial in result.records.trials] == [
        ("draft_model", Setting(2)),
        ("draft_model", Setting(3)),
    ]
    known = {name: (one.arms, one.facts["observed"]) for name, one in result.records.servings.items()}
    observed = {"async_scheduling": False, "draft_tokens": 0}
    assert known == {name: (arms, observed) for name, arms in (
        ("none", ("none",)),
        ("wanspec_dead", ("wanspec_dead",)),
        (f"draft_model-{gamma}", ("draft_model",)),
    )}  # fmt: skip
    # 26 tokens in pairs; the warm-up is not counted.
    assert result.paced["none"].steps == 13 * 3 * 2
    data = json.loads((stage.folder / "bench.json").read_text())
    assert (data["complete"], len(data["rows"])) == (True, 3)
    assert (data["commit"], data["versions"]) == (result.provenance.commit, result.provenance.versions)
    dead = next(batch for batch in result.batches if batch.cell.arm == "wanspec_dead")
    assert dead.counters.get("steps") == 13
    assert not stage.journal.exists()
    known = json.loads((stage.folder / "logs" / "oracle.json").read_text())
    assert [len(expected) for _, expected in known] == [26, 26, 26]


def gamma_of(result: Result) -> int:
    setting = result.setting(result.options.arm("draft_model"), Load())
    assert setting is not None
    return setting.draft_tokens


def test_what_another_commit_measured_is_not_gone_on_with(stage: BenchStage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.extra["wanspec_dead"] = ["--fail-after", "50"]
    with pytest.raises((ServerError, ClientError)):
        stage.run()
    monkeypatch.setattr(provenance, "git_commit", lambda: "0000000")
    with pytest.raises(ConfigError, match="is the journal of a run with another commit: delete it"):
        stage.run()


def test_what_was_measured_of_other_prompts_is_not_gone_on_with(stage: BenchStage) -> None:
    stage.extra["none"] = ["--fail-after", "20"]
    with pytest.raises((ServerError, ClientError)):
        stage.run(arms=("none",))
    prompts = stage.folder / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("def b(", "def x("))  # as many as before
    with pytest.raises(ConfigError, match="is the journal of a run with another candidates: delete it"):
        stage.run(arms=("none",))


def test_the_commit_is_that_of_the_beginning(stage: BenchStage, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["1111111"])
    monkeypatch.setattr(provenance, "git_commit", lambda: next(commits))
    assert stage.run(arms=("none",), repeats=1).provenance.commit == "1111111"
    assert json.loads((stage.folder / "bench.json").read_text())["commit"] == "1111111"


def test_a_run_whose_server_dies_keeps_what_it_has_and_goes_on(stage: BenchStage) -> None:
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
    assert stage.started == ["lineup", f"draft_model-{gamma_of(result)}"]  # no pre-pass again
    keys = [(batch.cell, batch.repeat, one.prompt) for batch in result.batches for one in batch.requests]
    assert len(keys) == len(set(keys)) == 18
    assert result.paced["none"].steps == 13 * 3 * 2
    assert not stage.journal.exists()


def test_a_run_that_failed_after_its_last_request_starts_no_servers(
    stage: BenchStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*unused: object, **named: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Publication, "publish", broken)
        with pytest.raises(OSError, match="disk full"):
            stage.run()
    assert stage.journal.exists()
    stage.started.clear()
    result = stage.run()
    assert stage.started == []
    assert len(result.batches) == 18
    assert result.paced["none"].steps == 13 * 3 * 2
    assert json.loads((stage.folder / "bench.json").read_text())["complete"] is True


def test_a_journal_of_another_run_is_left_alone(stage: BenchStage) -> None:
    stage.journal.write_text('{"run": {"target": "other"}}\n')
    with pytest.raises(ConfigError, match="is the journal of a run with another target"):
        stage.run()
    assert stage.journal.read_text() == '{"run": {"target": "other"}}\n'


def test_too_few_long_texts_are_told(stage: BenchStage) -> None:
    with pytest.raises(ConfigError, match="--count: only 4 of 4 prompts have 24 tokens"):
        stage.run(count=5)


def test_one_length_needs_no_pre_pass(stage: BenchStage) -> None:
    result = stage.run(arms=("none", "draft_model"), gammas=(4,), repeats=1)
    assert (gamma_of(result), result.records.trials) == (4, [])
    assert stage.started == ["lineup", "draft_model-4"]


def test_texts_may_come_from_a_tuned_arm(stage: BenchStage) -> None:
    result = stage.run(arms=("draft_model",), gammas=(2, 3), repeats=1)
    gamma = gamma_of(result)
    tried = ["draft_model-2", "draft_model-3"]
    assert stage.started == ["lineup", "draft_model-2", *tried, f"draft_model-{gamma}"]
    assert len(result.batches) == 3 and result.wrong == ()


def test_a_result_is_reported_again_from_its_file(stage: BenchStage) -> None:
    stage.run()
    path, again = stage.folder / "bench.json", stage.folder / "again.json"
    page = stage.folder / "again.md"
    done = CliRunner().invoke(app, ["report", str(path), "--json", str(again), "--markdown", str(page)])
    assert done.exit_code == 0, done.output
    assert json.loads(again.read_text()) == json.loads(path.read_text())
    assert page.read_text().startswith("# Remote drafting beside the alternatives")
    assert (stage.folder / "again.png").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "has no records"),
        ('{"rows": []}', "has no records"),
        ('{"records": [], "options": {}}', "these are not the options of a run"),
        ('{"records": [{"batch": {}}], "options": 3}', "this is not a result of wanspec bench"),
    ],
)
def test_what_is_no_result_cannot_be_reported(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    done = CliRunner().invoke(app, ["report", str(path)])
    assert done.exit_code == 2
    assert done.output.startswith("wanspec report: ") and problem in done.output
    assert done.output.count("\n") == 1


def test_without_vllm_nothing_begins(stage: BenchStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed")
    with pytest.raises(UnsupportedError, match="vLLM is not installed"):
        stage.run()
    assert not stage.journal.exists()


def command(stage: BenchStage, *more: str) -> list[str]:
    arguments = ["--target", "big", "--draft", "small", "--prompts", str(stage.folder / "prompts.jsonl")]
    arguments += ["--json", str(stage.folder / "bench.json"), "--keep-log", str(stage.folder / "logs")]
    return ["bench", *arguments, "--arms", "none", "--count", "2", "--repeat", "1", *more]


def test_the_command_measures(stage: BenchStage) -> None:
    done = CliRunner().invoke(app, command(stage))
    assert done.exit_code == 0, done.output
    options = json.loads((stage.folder / "bench.json").read_text())["options"]
    assert (options["target"], options["arms"], options["count"]) == ("big", ["none"], 2)
    assert (options["target_pace"], options["draft_pace"]) == ("35.0+0.1", "5.0+0.02")
    assert CliRunner().invoke(app, command(stage, "--check")).exit_code == 1  # such a run cannot tell


def test_the_command_measures_tree_arms_beside_the_others(stage: BenchStage) -> None:
    trees = ("--trees", "main-line=max_branches=1; plain=off", "--rtt-ms", "20")
    done = CliRunner().invoke(app, command(stage, *trees))
    assert done.exit_code == 0, done.output
    result = json.loads((stage.folder / "bench.json").read_text())
    assert [(row["arm"], row["rtt_ms"]) for row in result["rows"]] == [
        ("none", None),
        ("main-line", 20.0),
        ("plain", 20.0),
    ]
    assert result["options"]["arms"] == ["none", "main-line=max_branches=1", "plain=off"]
    asked = (stage.folder / "logs" / "trees.log").read_text()
    assert asked.count("override 'max_branches=1'") == asked.count("override 'off'") == 3  # and a warm-up each


def test_wrong_outputs_fail_the_command(stage: BenchStage) -> None:
    stage.extra["wanspec_dead"] = ["--differ-at", "5"]
    stage.extra["none"] = ["--gap", "1"]
    done = CliRunner().invoke(app, command(stage, "--arms", "none,wanspec_dead"))
    assert done.exit_code == 1
    assert "at generated position 5" in " ".join(done.output.split())


def test_ctrl_c_ends_the_command_and_keeps_the_journal(stage: BenchStage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measure.Measurement.take
    count = 0

    async def interrupted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return await asked(*arguments)

    monkeypatch.setattr(measure.Measurement, "take", interrupted)
    done = CliRunner().invoke(app, command(stage))
    assert done.exit_code == 130
    assert "the same command goes on from there" in " ".join(done.output.split())
    assert stage.journal.exists()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--arms", "x"), "wanspec bench: --arms: 'x' is not an arm"),
        (("--trees", "a=colour=blue"), "wanspec bench: --trees: 'a=colour=blue' is not an arm"),
        (("--trees", "none=off"), "wanspec bench: --trees: the name 'none' is that of an arm of --arms"),
        (("--rtt-ms", "fast"), "wanspec bench: --rtt-ms: 'fast' is not a list of numbers"),
        (("--gammas", "2.5"), "wanspec bench: --gammas: '2.5' is not a list of numbers"),
        (("--ngrams", "8:4-2"), "wanspec bench: --ngrams: '8:4-2' is not a list as in 8:2-4,4:1-3"),
        (("--ngrams", "8"), "wanspec bench: --ngrams: '8' is not a list as in 8:2-4"),
        (("--loss", "0.9"), "wanspec bench: --loss: 0.9 is not from 0 to 0.5"),
        (("--rates", "0"), "wanspec bench: --rates: 0 is not from 0.01 to 1000"),
        (("--target-pace", "quick"), "wanspec bench: --target-pace: 'quick' is not a pace"),
        (("--prompts", "/nowhere"), "wanspec bench: prompts: cannot read /nowhere"),
        (("--json", "/nowhere/bench.json"), "wanspec bench: --json: cannot write /nowhere/bench.json"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_status_2(stage: BenchStage, more: tuple[str, ...], problem: str) -> None:
    done = CliRunner().invoke(app, command(stage, *more))
    assert done.exit_code == 2
    assert done.output.startswith(problem)
    assert done.output.count("\n") == 1
    assert stage.started == []
