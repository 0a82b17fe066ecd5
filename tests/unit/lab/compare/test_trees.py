"""The tree bench: its arms, and whole runs with stand-ins for vLLM as real processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from compare_stage import Stage, write_models
from typer.testing import CliRunner

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError, UnsupportedError
from vllm_wanspec.lab.compare import trees
from vllm_wanspec.lab.compare.arms import tree_arms
from vllm_wanspec.lab.compare.lineup import plan_lineup
from vllm_wanspec.lab.compare.measure import Measurement
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.trees import run_trees, trees_options
from vllm_wanspec.lab.compare.trees_figures import TreesFigures
from vllm_wanspec.lab.harness import launch, machine
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.running import Outputs
from vllm_wanspec.lab.harness.servers import ServerError

ARMS = "main-line=max_branches=1; default="


def test_the_arms_by_default_are_those_of_the_question() -> None:
    arms = {arm.name: arm for arm in tree_arms("--arms", trees.DEFAULT_ARMS)}
    assert arms["main-line"].override == "max_branches=1"
    assert arms["default"].request_fields == {}
    thresholds = [arm.threshold_nats for arm in arms.values() if arm.threshold_nats is not None]
    assert thresholds == [float("inf"), 2.0, 1.5, 1.0, 0.5, 0.0]
    assert arms["adaptive"].override == "entropy_threshold_nats=adaptive"
    assert arms["adaptive"].threshold_nats is None


def test_arms_are_read_from_text() -> None:
    text = " a = max_branches=1 ;b=entropy_threshold_nats=0.5, running_branches=16; plain=off; bare;;"
    a, b, plain, bare = tree_arms("--arms", text)
    assert (a.name, a.override, str(a)) == ("a", "max_branches=1", "a=max_branches=1")
    assert b.override == "entropy_threshold_nats=0.5,running_branches=16"
    assert b.request_fields == {"vllm_xargs": {"wanspec": b.override}}
    assert b.threshold_nats is None  # it sets something else too
    assert not plain.drafts
    assert (bare.name, bare.override, bare.drafts) == ("bare", "", True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names none"),
        (" ; ", "names none"),
        ("=max_branches=1", "is not an arm"),
        ("a=max_branches", "is not an arm"),
        ("a=max_branches=1,,x=2", "is not an arm"),
        ("a=max_branches=", "is not an arm"),
        ("a=colour=blue", "is not an arm .*colour"),
        ("a=max_branches=65", "is not an arm .*max_branches"),
        ("a=; b=; a=off", "given twice"),
    ],
)
def test_wrong_arms_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tree_arms("--arms", text)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Stand-ins, and models with prompts of three modules."""
    found = Stage(tmp_path)
    write_models(tmp_path / "models", "abc")
    found.install(monkeypatch)
    return found


def options_for(stage: Stage, arms: str = ARMS, **changes: Any) -> Options:
    return trees_options(arms, 0.0, stage.folder / "models", **({"max_tokens": 64, "repeats": 1} | changes))


def run(stage: Stage, prompts: int | None = None, markdown: bool = False, **changes: Any) -> TreesFigures:
    page = stage.folder / "trees.md" if markdown else None
    outputs = Outputs(stage.folder / "trees.json", page, stage.folder / "logs")
    return run_trees(options_for(stage, **changes), "main-line", prompts, outputs, stage.screen)


def result_of(stage: Stage) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((stage.folder / "trees.json").read_text())
    return data


def test_the_baseline_has_to_be_an_arm(stage: Stage) -> None:
    with pytest.raises(ConfigError, match="--baseline: no arm is called 'x'; there are main-line, default"):
        run_trees(options_for(stage), "x", None, Outputs(), stage.screen)


def test_one_target_serves_all_arms(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "pin_cores", lambda: (0, 1))
    lineup = plan_lineup(options_for(stage, draft_pace=Pacing(7.0)), stage.folder)
    assert [spec.name for spec in lineup.sources] == ["drafter", "wan"]
    assert set(lineup.targets) == {"wanspec"}
    assert "7.0+0.0" in (lineup.sources[0].env or {}).values()


def test_a_run_measures_every_prompt_in_every_arm(stage: Stage) -> None:
    found = run(stage, repeats=2, markdown=True)
    assert found.is_valid
    assert not found.result.wrong and not found.result.ties
    data = result_of(stage)
    assert data["complete"] is True
    assert data["held"] is None  # three prompts are too few
    assert data["prompts"] == {"sent": 3, "too_short": 0, "shortest_tokens": 24, "measured": 3}
    assert {reference["cut"] for reference in data["references"]} == {26}
    assert {reference["generated"] for reference in data["references"]} == {64}
    rows = [dict(zip(data["row_columns"], row, strict=True)) for row in data["rows"]]
    places = [(row["repeat"], row["prompt"], row["arm"]) for row in rows]
    assert places == [(r, p, arm) for r in range(2) for p in range(3) for arm in ("main-line", "default")]
    # Two tokens per event, and 26 of them; the drafter's stand-in drafts nothing.
    assert all((row["steps"], row["timed_tokens"], row["branch_hits"]) == (13, 25, None) for row in rows)
    main_line, default = data["arms"]
    assert main_line["ratio_to_baseline"] == [1.0, 1.0, 1.0]
    assert default["tokens_per_step"] == 2.0
    assert default["bytes_per_accepted_token"] == 100.0
    assert default["branch_share_of_misses"] == 0.5
    assert default["counters"]["drafted_tokens"] == 0
    assert "branch_hits" not in default["counters"]
    asked = (stage.folder / "logs" / "wanspec.log").read_text().splitlines()
    assert [asked.count(f"override {text!r}") for text in ("off", "max_branches=1", "")] == [3, 7, 7]
    assert "| main-line |" in (stage.folder / "trees.md").read_text()
    assert "Time per token, and what it took" in stage.printed
    assert not (stage.folder / "trees.json.journal").exists()


def test_a_difference_that_is_no_tie_is_an_error(stage: Stage) -> None:
    stage.extra["wanspec"] = ["--differ-at", "3", "--gap", "0.5"]
    found = run(stage, prompts=1)
    assert sorted(line.partition(",")[0] for line in found.result.wrong) == ["default", "main-line"]
    assert "DIFFERENT OUTPUT in default, R = 0 ms: a: at generated position 3" in stage.printed


def test_a_tie_is_counted(stage: Stage) -> None:
    stage.extra["wanspec"] = ["--differ-at", "3"]
    found = run(stage, prompts=1)
    assert len(found.result.ties) == 2
    assert not found.result.wrong
    assert "2 floating-point ties" in stage.printed
    assert result_of(stage)["ties"] == 2


def interrupt_after(requests: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let something end the run when some requests are done."""
    original = Measurement.take
    done: list[int] = []

    async def take(self: Measurement, *args: Any) -> Any:
        if len(done) == requests:
            raise error
        done.append(1)
        return await original(self, *args)

    monkeypatch.setattr(Measurement, "take", take)


def test_what_is_complete_is_written_after_ctrl_c_and_the_run_goes_on(stage: Stage) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(3, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(stage, markdown=True)
    data = result_of(stage)
    assert data["complete"] is False
    assert [row[data["row_columns"].index("arm")] for row in data["rows"]] == ["main-line", "default"]
    page = (stage.folder / "trees.md").read_text()
    assert "**INCOMPLETE: the run was interrupted.**\n\n**Complete rounds: 1.**" in page
    assert "the same command goes on from there" in stage.printed
    run(stage, markdown=True)
    assert "3 requests are done" in stage.printed
    assert len(result_of(stage)["rows"]) == 6
    assert "INCOMPLETE" not in (stage.folder / "trees.md").read_text()


def test_a_run_over_other_prompts_does_not_go_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(1, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(stage)
    with pytest.raises(ConfigError, match="a run with another candidates"):
        run(stage, prompts=2)


def test_a_failure_keeps_what_is_complete_and_the_logs(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "DYING_S", 0.0)
    interrupt_after(2, monkeypatch, ClientError("no answer"))
    with pytest.raises(ClientError, match="no answer"):
        run_trees(options_for(stage), "main-line", None, Outputs(stage.folder / "trees.json"), stage.screen)
    assert result_of(stage)["ended_by"] == "no answer"
    assert list(stage.folder.glob("wanspec-*/wanspec.log"))


@pytest.mark.parametrize("requests", [0, 1])
def test_nothing_is_written_before_the_first_round(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    interrupt_after(requests, monkeypatch, ServerError("wanspec ended by itself"))
    with pytest.raises(ServerError, match="wanspec ended by itself"):
        run(stage)
    assert not (stage.folder / "trees.json").exists()


def test_a_target_that_dies_is_named(stage: Stage) -> None:
    stage.extra["wanspec"] = ["--fail-after", "20"]
    with pytest.raises(ServerError, match="wanspec ended by itself"):
        run(stage)


def test_what_is_missing_is_found_before_the_run(stage: Stage) -> None:
    (stage.folder / "file").write_text("")
    for outputs, problem in (
        (Outputs(markdown_path=stage.folder / "no" / "x.md"), "--markdown: cannot write"),
        (Outputs(stage.folder / "trees.json", log_dir=stage.folder / "file"), "--keep-log"),
    ):
        with pytest.raises(ConfigError, match=problem):
            run_trees(options_for(stage), "main-line", None, outputs, stage.screen)
    assert stage.started == []


def test_without_vllm_there_is_no_bench(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed")
    with pytest.raises(UnsupportedError, match="not installed"):
        run(stage)


def invoke(models: Path, *arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(trees.main)
    outcome = CliRunner().invoke(app, ["--models", str(models), *arguments])
    return outcome.exit_code, outcome.output


class FakeFigures:
    """As much of the figures as the exit status depends on."""

    def __init__(self, is_valid: bool = True, wrong: tuple[str, ...] = (), held: bool | None = None) -> None:
        self.is_valid, self.held = is_valid, held
        self.result = SimpleNamespace(wrong=wrong)


@pytest.mark.parametrize(
    ("result", "arguments", "status"),
    [
        (FakeFigures(), [], 0),
        (FakeFigures(), ["--check"], 1),
        (FakeFigures(held=True), ["--check"], 0),
        (FakeFigures(is_valid=False), [], 1),
        (FakeFigures(wrong=("a",)), [], 1),
        (ConfigError("no models"), [], 2),
        (ServerError("target ended"), [], 1),
        (KeyboardInterrupt(), [], 130),
    ],
)
def test_the_exit_status_says_how_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Any, arguments: list[str], status: int
) -> None:
    def run(*unused: object) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(trees, "run_trees", run)
    code, output = invoke(write_models(tmp_path / "models", "a"), *arguments)
    assert code == status
    assert output.startswith("bench-trees: ") == isinstance(result, BaseException)


def test_options_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Options, str]] = []

    def run(options: Options, baseline: str, *unused: object) -> FakeFigures:
        seen.append((options, baseline))
        return FakeFigures()

    monkeypatch.setattr(trees, "run_trees", run)
    models = write_models(tmp_path / "models", "a")
    given = ("--rtt-ms", "50", "--repeat", "3", "--arms", "x=off; y=", "--draft-pace", "6", "--seed", "5")
    assert invoke(models, *given, "--max-tokens", "40", "--speculative-tokens", "4")[0] == 0
    options, baseline = seen[0]
    assert (options.rtt_ms, options.repeats, options.seed, baseline) == ((50.0,), 3, 5, "x")
    assert (options.draft_pace, options.max_tokens, options.speculative_tokens) == (Pacing(6.0), 40, 4)
    assert options.texts_from.plain_fields == {"vllm_xargs": {"wanspec": "off"}}
    assert invoke(models, "--baseline", "default")[0] == 0
    assert seen[1][1] == "default"
    assert invoke(models)[0] == 0
    assert seen[2][1] == "main-line"
    assert invoke(models, "--arms", "x=y")[0] == 2
    assert os.linesep not in invoke(models, "--target-pace", "slow")[1].rstrip()
