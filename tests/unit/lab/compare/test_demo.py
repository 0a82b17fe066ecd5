"""The demo: its parts by themselves, and whole runs with stand-ins for vLLM as real processes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from compare_runs import provenance, records
from compare_stage import Stage, write_models
from rich.console import Console
from typer.testing import CliRunner

from vllm_wanspec.cli.demo import demo as command
from vllm_wanspec.config import load_settings
from vllm_wanspec.emulate.pacing import PACING_ENV, STATS_ENV, Pacing
from vllm_wanspec.errors import ConfigError, UnsupportedError
from vllm_wanspec.lab.compare import demo as demo_module
from vllm_wanspec.lab.compare.demo import demo_options, run_demo
from vllm_wanspec.lab.compare.demo_report import DemoFigures, demo_figures, document
from vllm_wanspec.lab.compare.lineup import plan_lineup
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.running import Outputs
from vllm_wanspec.lab.harness.servers import ServerError
from vllm_wanspec.lab.records import Batch, Cell, Reference, Request
from vllm_wanspec.lab.report.console import print_document


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Stand-ins, and models with two prompts of five modules each."""
    found = Stage(tmp_path)
    found.screen = Console(file=io.StringIO(), width=100)
    write_models(tmp_path / "models", "abcde", each=2)
    found.install(monkeypatch)
    return found


def options_for(stage: Stage, count: int = 2, **changes: Any) -> Options:
    return demo_options(20.0, stage.folder / "models", **({"count": count, "max_tokens": 8} | changes))


def run(stage: Stage, count: int = 2, **outputs: Path) -> DemoFigures:
    return run_demo(options_for(stage, count), Outputs(**outputs), stage.screen)


def test_servers_are_laid_out_as_designed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "pin_cores", lambda: (0, 1))
    (stage.folder / "plain.pacing.json").write_text("stale")
    lineup = plan_lineup(options_for(stage, speculative_tokens=5), stage.folder)
    drafter, wan = lineup.sources
    plain, wanspec = (lineup.targets[name].spec for name in ("plain", "wanspec"))
    assert list(drafter.argv)[3:5] == ["drafter", str(stage.folder / "models" / "draft")]
    assert f"127.0.0.1:{drafter.port}" in wan.argv
    assert "--speculative-tokens" not in plain.argv and "--no-async-scheduling" not in plain.argv
    assert wanspec.argv[list(wanspec.argv).index("--speculative-tokens") + 1] == "5"
    assert [spec.core for spec in (drafter, wan, plain, wanspec)] == [1, None, 0, 0]
    settings = load_settings(stage.folder / "wanspec.yaml")
    assert settings.draft_endpoints[0].url == f"http://127.0.0.1:{wan.port}"
    assert settings.metrics is not None
    assert lineup.targets["wanspec"].metrics == f"http://127.0.0.1:{settings.metrics.port}/metrics"
    assert lineup.targets["plain"].metrics is None
    assert settings.fallback == ("ngram",)  # as configured by default
    for spec, pace in ((drafter, "5.0+0.02"), (plain, "35.0+0.1"), (wanspec, "35.0+0.1")):
        assert spec.env is not None
        assert spec.env[PACING_ENV] == pace
        assert spec.env[STATS_ENV] == str(stage.folder / f"{spec.name}.pacing.json")
    assert not (stage.folder / "plain.pacing.json").exists()


def test_a_run_compares_both_targets(stage: Stage) -> None:
    path = stage.folder / "result.json"
    assert run(stage, 3, json_path=path, log_dir=stage.folder / "logs").identical
    result = json.loads(path.read_text())
    assert result["rtt_ms"] == 20.0
    assert result["pacing"]["target_ms"] == 35.0
    assert result["pacing"]["draft_ms"] == 5.0
    assert result["identical"] is True
    assert (result["ties"], result["divergences"]) == (0, [])
    assert set(result["arms"]["none"]) == {"tpot_ms", "ttft_ms"}
    arm = result["arms"]["wanspec"]
    assert arm.pop("tpot_ms") > 0
    assert arm.pop("ttft_ms") > 0
    # Three prompts of four steps each; what came before them, the warm-up, is not counted.
    assert arm == {"tokens_per_step": 2.0, "hits": 12, "misses": 0, "late": 0, "local_draft_passes": 0}
    assert result["overruns"] == {"plain": 0, "wanspec": 0}  # the stand-in for the drafter runs no forward
    assert len(result["per_prompt"]) == 3
    assert result["per_prompt"][0].keys() == {"none_tpot_ms", "wanspec_tpot_ms"}
    assert (result["prompts"], result["max_tokens"], result["speculative_tokens"]) == (3, 8, 8)
    assert {"seconds", "machine", "versions", "commit", "command", "ratio", "plain_overhead_ms"} <= result.keys()
    for expected in (
        "plain is ready after",
        "plain vLLM, a: 8 tokens,",
        "WANSpec, a: 8 tokens,",
        "identical ─",
        "def a0(",
        "3 prompts, up to 8 tokens each",
        "identical output",
        "target 35 ms + 0.1 ms per token",
        "20 ms",
    ):
        assert expected in stage.printed
    assert (stage.folder / "logs" / "wanspec.log").exists()


def test_a_demo_begins_anew_whatever_an_earlier_one_left(stage: Stage) -> None:
    logs = stage.folder / "logs"
    for _ in range(2):
        assert run(stage, log_dir=logs).count("hits") == 8


def test_a_difference_that_is_no_tie_is_an_error(stage: Stage) -> None:
    stage.extra = {"plain": ["--gap", "0.5"], "wanspec": ["--differ-at", "3"]}
    assert not run(stage).identical
    assert "error: different output in wanspec, R = 20 ms: a: at generated position 3" in stage.printed
    assert "the prompt ends with 'def a0('" in stage.printed
    assert "NO" in stage.printed and "different ─" in stage.printed


def test_ties_are_counted_and_not_held_against_it(stage: Stage) -> None:
    stage.extra["wanspec"] = ["--differ-at", "3"]
    path = stage.folder / "result.json"
    assert run(stage, json_path=path).identical
    result = json.loads(path.read_text())
    assert (result["ties"], len(result["divergences"])) == (2, 2)
    assert "2 floating-point ties" in stage.printed


def test_a_server_that_dies_in_the_middle_is_named(stage: Stage) -> None:
    stage.extra["wanspec"] = ["--fail-after", "20"]
    with pytest.raises(ServerError, match="wanspec ended by itself") as caught:
        run(stage, 3)
    assert str(caught.value).endswith("the engine died")
    assert "logs are in" in stage.printed


def test_a_run_on_a_terminal_shows_the_text_as_it_comes(stage: Stage) -> None:
    stage.screen = Console(file=io.StringIO(), width=100, force_terminal=True)
    assert run(stage).identical
    assert "WANSpec: prompts" in stage.printed


def test_without_vllm_there_is_no_demo(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed: run `make demo`")
    with pytest.raises(UnsupportedError, match="make demo"):
        run(stage)


def test_paths_that_cannot_be_written_are_found_before_the_run(stage: Stage) -> None:
    with pytest.raises(ConfigError, match="--json"):
        run(stage, json_path=stage.folder / "missing" / "x.json")
    (stage.folder / "file").write_text("")
    with pytest.raises(ConfigError, match="--logs"):
        run(stage, log_dir=stage.folder / "file")
    with pytest.raises(ConfigError, match="--prompts: 11 is more than the 10"):
        run(stage, 11)
    assert stage.started == []


PLAIN, REMOTE = Cell("none", None, 1), Cell("wanspec", 20.0, 1)


def figures_with(
    stage: Stage, count: float = 4.0, wrong: tuple[str, ...] = (), overruns: tuple[int, int] = (0, 0)
) -> DemoFigures:
    """One prompt of two tokens through both targets; overruns of plain target and drafter, of 1,000 forwards."""
    names = ("hits", "misses", "late_drafts", "steps", "committed_tokens", "local_draft_passes")
    requests = (Request(0, ((10.0, 1), (50.0, 1))),)
    plain = Counters({"target_forwards": 1000.0, "target_overruns": float(overruns[0])})
    drafter = {"drafter_forwards": 1000.0, "drafter_overruns": float(overruns[1])}
    counters = Counters(dict.fromkeys(names, count) | drafter)
    batches = [Batch(PLAIN, 0, 0.05, requests, plain), Batch(REMOTE, 0, 0.05, requests, counters, wrong=wrong)]
    references = [Reference(0, "cmd", "class Cmd:", (1,), (2, 3), (None, None))]
    return demo_figures(Result(options_for(stage, 1), records(references, batches), provenance(90.0)))


def report(stage: Stage, found: DemoFigures) -> str:
    print_document(document(found), stage.screen)
    return stage.printed


def test_too_many_overruns_are_warned_about(stage: Stage) -> None:
    text = report(stage, figures_with(stage, overruns=(10, 11)))
    assert "warning: 1.1% of the drafter" in text
    assert "of the plain server" not in text


def test_a_run_in_which_no_draft_was_used_is_warned_about(stage: Stage) -> None:
    text = report(stage, figures_with(stage, count=0.0))
    assert "no draft was ever used" in text
    assert "?" in text


def test_the_report_says_where_it_comes_from(stage: Stage) -> None:
    text = report(stage, figures_with(stage))
    assert "a machine; python 3; commit abc1234; 90 s." in text
    assert "A plain step takes 4.9 ms on top of its pace" in text  # 40 ms for a token, paced to 35.1
    assert "forwards slower than their pace: plain 0.00% of 1,000" in text


def test_a_different_output_is_named(stage: Stage) -> None:
    found = figures_with(stage, wrong=("cmd: at generated position 17: plain token 5, here None",))
    assert not found.identical
    assert "cmd: at generated position 17: plain token 5, here None" in report(stage, found)


def invoke(stage: Stage, *arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command)
    outcome = CliRunner().invoke(app, ["--models", str(stage.folder / "models"), *arguments])
    return outcome.exit_code, outcome.output


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("models are missing"), 2),
        (UnsupportedError("no vLLM"), 2),
        (ServerError("plain ended"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a bug"), 1),
    ],
)
def test_every_failure_has_a_status_and_a_line(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def fail(*unused: object) -> DemoFigures:
        raise error

    monkeypatch.setattr(demo_module, "run_demo", fail)
    code, output = invoke(stage)
    assert code == status
    assert output.startswith("wanspec demo: ")
    assert str(error) in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("identical", "status"), [(True, 0), (False, 1)])
def test_different_output_fails(stage: Stage, monkeypatch: pytest.MonkeyPatch, identical: bool, status: int) -> None:
    seen: list[tuple[Options, Outputs]] = []

    def run(options: Options, outputs: Outputs, console: Console) -> SimpleNamespace:
        seen.append((options, outputs))
        return SimpleNamespace(identical=identical)

    monkeypatch.setattr(demo_module, "run_demo", run)
    given = ("--rtt-ms", "50", "--target-pace", "10+1", "--json", "x.json", "--prompts", "3", "--logs", "y")
    assert invoke(stage, *given)[0] == status
    options, outputs = seen[0]
    assert (options.rtt_ms, options.count, options.max_tokens) == ((50.0,), 3, 96)
    assert options.target_pace == Pacing(10.0, 1.0)
    assert options.draft_pace == Pacing(5.0, 0.02)
    assert outputs == Outputs(Path("x.json"), log_dir=Path("y"))


def test_wrong_options_are_refused(stage: Stage) -> None:
    code, output = invoke(stage, "--target-pace", "slow")
    assert code == 2
    assert "--target-pace: 'slow'" in output
    assert invoke(stage, "--prompts", "0")[0] == 2
    assert invoke(stage, "--rtt-ms", "-1")[0] == 2
