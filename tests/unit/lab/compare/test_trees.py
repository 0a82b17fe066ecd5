"""The tree bench: its settings, and whole runs with stand-ins for vLLM as real processes."""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError, UnsupportedError
from vllm_wanspec.lab.compare import trees, trees_measure
from vllm_wanspec.lab.compare.demo_setup import DemoPlan
from vllm_wanspec.lab.compare.trees import Outputs, run_trees
from vllm_wanspec.lab.compare.trees_measure import Measurement, arrival_time
from vllm_wanspec.lab.compare.trees_setup import Arm, TreesOptions, arm_orders, parse_arms, plan_trees
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.models import DemoModels, find_models, read_prompts, repeat_cut
from vllm_wanspec.lab.harness.servers import ServerError, ServerSpec

FAKE = Path(__file__).parents[1] / "fake_trees_vllm.py"
ARMS = parse_arms("main-line=max_branches=1; default=")


def test_the_arms_by_default_are_those_of_the_question() -> None:
    arms = {arm.name: arm for arm in TreesOptions().arms}
    assert arms["main-line"].override == "max_branches=1"
    assert arms["default"].request_fields == {}
    thresholds = [arm.threshold_nats for arm in arms.values() if arm.threshold_nats is not None]
    assert thresholds == [float("inf"), 2.0, 1.5, 1.0, 0.5, 0.0]
    assert arms["adaptive"].override == "entropy_threshold_nats=adaptive"
    assert arms["adaptive"].threshold_nats is None


def test_arms_are_read_from_text() -> None:
    text = " a = max_branches=1 ;b=entropy_threshold_nats=0.5, running_branches=16; plain=off; bare;;"
    a, b, plain, bare = parse_arms(text)
    assert a == Arm("a", "max_branches=1")
    assert b.override == "entropy_threshold_nats=0.5,running_branches=16"
    assert b.request_fields == {"vllm_xargs": {"wanspec": b.override}}
    assert b.threshold_nats is None  # it sets something else too
    assert not plain.drafts
    assert bare == Arm("bare")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names none"),
        (" ; ", "names none"),
        ("=max_branches=1", "is not an arm"),
        ("a=max_branches", "is not an arm"),
        ("a=max_branches=1,,x=2", "is not an arm"),
        ("a=max_branches=", "is not an arm"),
        ("a=; b=; a=off", "given twice"),
    ],
)
def test_wrong_arms_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_arms(text)


def test_the_baseline_has_to_be_an_arm() -> None:
    with pytest.raises(ConfigError, match="--baseline: no arm is called 'x'; there are main-line, default"):
        TreesOptions(arms=ARMS, baseline="x")


def test_a_text_is_cut_where_it_begins_to_repeat() -> None:
    assert repeat_cut([]) == 0
    assert repeat_cut(list(range(40))) == 40
    assert repeat_cut([*range(30), *range(30)]) == 30
    assert repeat_cut([*range(30), *range(15)]) == 45  # 15 tokens that recur are not 16
    assert repeat_cut([7] * 40) == 1
    assert repeat_cut([1, 2, 1, 2], span=2) == 2


def test_every_arm_has_every_place_equally_often() -> None:
    arms = TreesOptions().arms
    orders = arm_orders(arms, random.Random(3))
    seen = [next(orders) for _ in range(2 * len(arms))]
    for place in range(len(arms)):
        names = [order[place].name for order in seen]
        assert all(names.count(arm.name) == 2 for arm in arms)
    again = arm_orders(arms, random.Random(3))
    assert [next(again) for _ in seen] == seen


def test_time_counts_from_the_first_token() -> None:
    assert arrival_time([5.0, 5.0, 45.0, 85.0]) == (80.0, 3)
    assert arrival_time([]) == (0.0, 0)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with the files of the demo models."""
    root = tmp_path / "models"
    for name in ("target", "draft"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    lines = [json.dumps({"module": name, "prompt": f"def {name}("}) for name in "abc"]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n\n")
    return root


def test_all_prompts_are_the_default(models: Path, tmp_path: Path) -> None:
    assert len(read_prompts(models / "prompts.jsonl", None)) == 3
    assert [prompt.module for prompt in read_prompts(models / "prompts.jsonl", 1)] == ["a"]
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path / "missing", None)


def test_one_target_serves_all_arms(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "pin_cores", lambda: (0, 1))
    plan = plan_trees(TreesOptions(draft_pace=Pacing(7.0)), find_models(models), [1, 2, 3, 4, 5], tmp_path)
    assert [spec.name for spec in plan.specs] == ["drafter", "wan", "wanspec"]
    assert set(plan.stats) == {"drafter", "wanspec"}
    assert "30" in plan.specs[1].argv
    assert plan.plain == plan.wanspec == "wanspec"
    assert plan.specs[0].env is not None
    assert "7.0+0.0" in plan.specs[0].env.values()


def fake_plan(*target: str) -> Callable[[TreesOptions, DemoModels, list[int], Path], DemoPlan]:
    """Return a replacement of plan_trees whose servers are stand-ins; the target's has extra arguments."""

    def plan(options: TreesOptions, models: DemoModels, ports: list[int], folder: Path) -> DemoPlan:
        stats = {name: folder / f"{name}.json" for name in ("drafter", "wanspec")}

        def server(name: str, port: int, *extra: str) -> ServerSpec:
            argv = [sys.executable, str(FAKE), "--port", str(port), "--stats", str(stats[name]), *extra]
            return ServerSpec(name, argv, port)

        specs = (
            server("drafter", ports[0]),
            server("wanspec", ports[1], "--metrics-port", str(ports[2]), *target),
        )
        return DemoPlan(specs, "wanspec", "wanspec", f"http://127.0.0.1:{ports[2]}/metrics", stats)

    return plan


@pytest.fixture
def screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Console:
    """Where runs print to, on a machine that has vLLM and needs no time to settle."""
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    for name in ("STATS_SETTLE_S", "SETTLE_MIN_S", "SETTLE_POLL_S"):
        monkeypatch.setattr(trees_measure, name, 0.0)
    monkeypatch.setattr(trees, "plan_trees", fake_plan())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Console(file=io.StringIO(), width=160)


def printed(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return " ".join(screen.file.getvalue().split())


def options_for(models: Path, **changes: Any) -> TreesOptions:
    return TreesOptions(**({"arms": ARMS, "rtt_ms": 0.0, "models": models, "max_tokens": 64} | changes))


def test_a_run_measures_every_prompt_in_every_arm(models: Path, screen: Console, tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "trees.json", tmp_path / "trees.md", tmp_path / "logs")
    result = run_trees(options_for(models, repeats=2), outputs, screen)
    assert result.is_valid
    assert not result.differences
    data = json.loads((tmp_path / "trees.json").read_text())
    assert data["complete"] is True
    assert data["held"] is None  # three prompts are too few
    assert data["prompts"] == {"sent": 3, "too_short": 0, "shortest_tokens": 24, "measured": 3}
    assert {reference["cut"] for reference in data["references"]} == {26}
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
    asked = (tmp_path / "logs" / "wanspec.log").read_text().splitlines()
    assert [asked.count(f"override {text!r}") for text in ("off", "max_branches=1", "")] == [4, 7, 7]
    page = (tmp_path / "trees.md").read_text()
    assert "| main-line |" in page
    assert "what redundancy buys" in printed(screen)


def test_a_difference_that_is_no_tie_is_an_error(
    models: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "plan_trees", fake_plan("--differ-at", "3", "--gap", "0.5"))
    result = run_trees(options_for(models, prompts=1), Outputs(), screen)
    assert [arm for arm, _ in result.errors] == [arm.name for arm in _first_order()]
    assert "DIFFERENT OUTPUT in arm default, a: at generated position 3" in printed(screen)


def test_a_tie_is_counted(models: Path, screen: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "plan_trees", fake_plan("--differ-at", "3"))
    result = run_trees(options_for(models, prompts=1), Outputs(), screen)
    assert len(result.differences) == 2
    assert not result.errors
    assert "2 floating-point ties" in printed(screen)


def _first_order() -> list[Arm]:
    return next(arm_orders(ARMS, random.Random(0)))


def interrupt_after(rows: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let something end the run when some requests are done."""
    original = Measurement._row
    done: list[int] = []

    async def row(self: Measurement, *args: Any) -> Any:
        if len(done) == rows:
            raise error
        done.append(1)
        return await original(self, *args)

    monkeypatch.setattr(Measurement, "_row", row)


def test_what_is_complete_is_written_after_ctrl_c(
    models: Path, screen: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(3, monkeypatch, KeyboardInterrupt())
    outputs = Outputs(tmp_path / "trees.json", tmp_path / "trees.md")
    with pytest.raises(KeyboardInterrupt):
        run_trees(options_for(models), outputs, screen)
    data = json.loads((tmp_path / "trees.json").read_text())
    assert data["complete"] is False
    assert [row[data["row_columns"].index("arm")] for row in data["rows"]] == ["main-line", "default"]
    assert "**INCOMPLETE: the run was interrupted; complete rounds: 1." in (tmp_path / "trees.md").read_text()
    assert not list(tmp_path.glob("wanspec-*"))


def test_a_failure_keeps_what_is_complete_and_the_logs(
    models: Path, screen: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "DYING_S", 0.0)
    interrupt_after(2, monkeypatch, ClientError("no answer"))
    with pytest.raises(ClientError, match="no answer"):
        run_trees(options_for(models), Outputs(tmp_path / "trees.json"), screen)
    assert json.loads((tmp_path / "trees.json").read_text())["ended_by"] == "no answer"
    assert list(tmp_path.glob("wanspec-*/wanspec.log"))


def test_nothing_is_written_before_the_first_round(
    models: Path, screen: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "plan_trees", fake_plan("--fail-after", "40"))
    with pytest.raises(ServerError, match="wanspec ended by itself"):
        run_trees(options_for(models), Outputs(tmp_path / "trees.json"), screen)
    assert not (tmp_path / "trees.json").exists()


def test_what_is_missing_is_found_before_the_run(models: Path, tmp_path: Path, screen: Console) -> None:
    with pytest.raises(ConfigError, match="--markdown: cannot write"):
        run_trees(options_for(models), Outputs(markdown_path=tmp_path / "no" / "x.md"), screen)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--keep-log"):
        run_trees(options_for(models), Outputs(log_dir=tmp_path / "file"), screen)


def test_without_vllm_there_is_no_bench(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed")
    with pytest.raises(UnsupportedError, match="not installed"):
        run_trees(options_for(models), Outputs(), Console(file=io.StringIO()))


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(trees.main)
    outcome = CliRunner().invoke(app, arguments)
    return outcome.exit_code, outcome.output


class FakeResult:
    """As much of a result as the exit status depends on."""

    def __init__(self, is_valid: bool = True, errors: tuple[int, ...] = (), held: bool | None = None) -> None:
        self.is_valid, self.errors, self.held = is_valid, errors, held


@pytest.mark.parametrize(
    ("result", "arguments", "status"),
    [
        (FakeResult(), [], 0),
        (FakeResult(), ["--check"], 1),
        (FakeResult(held=True), ["--check"], 0),
        (FakeResult(is_valid=False), [], 1),
        (FakeResult(errors=(1,)), [], 1),
        (ConfigError("no models"), [], 2),
        (ServerError("target ended"), [], 1),
        (KeyboardInterrupt(), [], 130),
    ],
)
def test_the_exit_status_says_how_it_went(
    monkeypatch: pytest.MonkeyPatch, result: Any, arguments: list[str], status: int
) -> None:
    def run(*unused: object) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(trees, "run_trees", run)
    code, output = invoke(*arguments)
    assert code == status
    assert output.startswith("bench-trees: ") == isinstance(result, BaseException)


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TreesOptions] = []
    monkeypatch.setattr(trees, "run_trees", lambda options, *unused: seen.append(options) or FakeResult())
    assert invoke("--rtt-ms", "50", "--repeat", "3", "--arms", "x=off; y=", "--draft-pace", "6")[0] == 0
    assert (seen[0].rtt_ms, seen[0].repeats, seen[0].baseline) == (50.0, 3, "x")
    assert seen[0].draft_pace == Pacing(6.0)
    assert invoke("--baseline", "default")[0] == 0
    assert seen[1].baseline == "default"
    assert invoke("--arms", "x=y")[0] == 2
    assert os.linesep not in invoke("--target-pace", "slow")[1].rstrip()
