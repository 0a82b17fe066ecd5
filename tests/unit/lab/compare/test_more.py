"""The bench under further conditions: its studies, its runs with stand-ins for vLLM, and its page."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from compare_runs import batch, counters, full_run, records, reference, request, servings, trials
from compare_stage import Stage, write_models
from rich.console import Console
from typer.testing import CliRunner

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare import more
from vllm_wanspec.lab.compare.figures import figures
from vllm_wanspec.lab.compare.lineup import server_name, tuned_target
from vllm_wanspec.lab.compare.more import measured, run_studies
from vllm_wanspec.lab.compare.more_report import more_report, sentences
from vllm_wanspec.lab.compare.plan import Options, cells
from vllm_wanspec.lab.compare.report import bench_report
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.studies import STUDIES, base_options, study_options
from vllm_wanspec.lab.harness import machine, provenance
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.running import Outputs
from vllm_wanspec.lab.records import Load, Setting
from vllm_wanspec.lab.report.markdown import markdown

BASE = base_options("/big", "/small", Path("/p"), count=4, gammas=(2, 3))


def study(name: str) -> Options:
    return study_options(STUDIES[name], BASE)


def test_each_study_changes_one_thing() -> None:
    changed = {
        name: {
            key
            for key, value in study(name).as_json().items()
            if value != study("base").as_json()[key] and not key.startswith("concurrent_")
        }
        for name in STUDIES
    }
    assert changed == {
        "base": set(),
        "streams": {"concurrency", "arms", "time_scale"},
        "rates": {"concurrency", "rates", "slo_ms", "count", "time_scale"},
        "t07": {"temperature"},
        "t10": {"temperature"},
        "jitter": {"jitter_ms"},
        "loss": {"loss"},
        "cut8": {"repeat_span"},
        "scale5": {"time_scale", "rtt_ms", "arms", "gammas"},
        "useless": {"concurrency", "arms"},
    }


def test_every_load_is_that_of_the_same_arms_and_round_trip() -> None:
    found = cells(study("streams"))
    assert {cell.concurrency for cell in found} == {1, 2, 4, 8, 16}
    for streams in (1, 16):
        mine = {(cell.arm, cell.rtt_ms) for cell in found if cell.concurrency == streams}
        assert mine == {
            ("none", None),
            ("draft_model", None),
            ("draft_model_lookup", None),
            ("wanspec", 30.0),
            ("wanspec_no_lookup", 30.0),
        }
    assert {cell.load for cell in cells(study("rates"))} == {Load(0, rate) for rate in (0.4, 0.8, 1.2)}


def test_where_tokens_are_sampled_the_peer_may_sample_its_drafts(tmp_path: Path) -> None:
    sampled, greedy = study("t07"), study("base")
    arm = sampled.arm("draft_model")
    both = (Setting(2), Setting(3), Setting(2, sampling="probabilistic"), Setting(3, sampling="probabilistic"))
    assert sampled.candidates(arm) == both
    assert greedy.candidates(arm) == both[:2]
    assert sampled.candidates(sampled.arm("draft_model_lookup")) == both[:2]
    names = [server_name(arm, setting) for setting in both]
    assert names == ["draft_model-2", "draft_model-3", "draft_model-2-probabilistic", "draft_model-3-probabilistic"]
    configs = [json.loads(argument) for setting in both for argument in tuned_target(sampled, arm, setting, tmp_path)
               .spec.argv if argument.startswith("{")]  # fmt: skip
    assert [one.get("draft_sample_method") for one in configs] == [None, None, "probabilistic", "probabilistic"]
    assert str(both[2]) == "γ = 2, probabilistic drafts"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    found = Stage(tmp_path)
    write_models(tmp_path / "models", "abcd")
    found.install(monkeypatch)
    (tmp_path / "more").mkdir()
    return found


def run(stage: Stage, *names: str, **changes: Any) -> dict[str, Result]:
    prompts = stage.folder / "models" / "bench_prompts.jsonl"
    base = base_options("big", "small", prompts, count=2, gammas=(2,), arms=STUDIES["useless"].changes["arms"])
    options = replace(base, max_tokens=64, **changes)
    return run_studies(names, options, stage.folder / "more", stage.folder / "logs", stage.screen)


def test_a_study_that_was_measured_is_not_measured_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "git_commit", lambda: "1234567")
    monkeypatch.setattr(more, "git_commit", lambda: "1234567")
    found = run(stage, "base", "cut8")
    assert [one.options.repeat_span for one in found.values()] == [16, 8]
    assert {path.name for path in (stage.folder / "more").iterdir()} == {"base.json", "cut8.json"}
    stage.started.clear()
    again = run(stage, "base", "cut8")
    assert stage.started == []
    assert [figures(one) for one in again.values()] == [figures(one) for one in found.values()]
    run(stage, "base", seed=1)
    assert stage.started == ["lineup"]  # other settings
    stage.started.clear()
    for module in (provenance, more):
        monkeypatch.setattr(module, "git_commit", lambda: "7654321")
    run(stage, "base", seed=1)
    assert stage.started == ["lineup"]  # another commit
    (stage.folder / "more" / "base.json").write_text("{")
    stage.started.clear()
    run(stage, "base", seed=1)
    assert stage.started == ["lineup"]  # a file that says nothing


def made_up(name: str) -> Result:
    """An invented run of a study: remote drafts take 0.9 of co-located ones' time, and both scale with the load."""
    options, references = study(name), [reference(index) for index in range(4)]
    times_ms = {"none": 1600.0, "draft_model": 800.0, "draft_model_lookup": 600.0, "wanspec": 540.0}
    times_ms |= {"wanspec_no_lookup": 720.0, "wanspec_dead": 1610.0, "wanspec_random": 1620.0}
    batches = []
    for cell in cells(options):
        requests = [request(one.index, times_ms[cell.arm]) for one in references]
        own = [[one] for one in requests] if cell.single else [requests]
        batches += [
            batch(cell, part, counters=counters(cell.arm, len(part), options.time_scale), rtt_ms=None) for part in own
        ]
    found = records(references, batches, trials(options), servings(options))
    return Result(options, found, full_run(1).provenance)


def test_a_study_of_models_in_the_checkout_is_known_again(tmp_path: Path) -> None:
    models = machine.checkout() / "examples" / "demo_models"
    mine = replace(study("base"), target=str(models / "target"), prompts=models / "bench_prompts.jsonl")
    path = tmp_path / "base.json"
    path.write_text(json.dumps(bench_report(replace(made_up("base"), options=mine)).data))
    found = measured(path, mine, "abc1234")  # though its file does not say where the checkout lies
    assert found is not None
    assert found.options.target == "examples/demo_models/target"
    assert measured(path, replace(mine, target=str(models / "other")), "abc1234") is None


def test_every_study_is_a_table_with_two_sentences(tmp_path: Path) -> None:
    results = {name: made_up(name) for name in STUDIES}
    made = more_report(results)
    page = markdown(made.document)
    for one in STUDIES.values():
        assert f"\n## {one.title}\n" in page
    found = {name: figures(result) for name, result in results.items()}
    assert all(len(list(sentences(name, found))) == 2 for name in STUDIES)
    ratio = "0.900 (0.900–0.900)"
    assert list(sentences("jitter", found)) == [
        f"Time per token of remote drafts ÷ co-located ones, without lookup on either side: {ratio}; with nothing "
        f"changed {ratio}.",
        f"Time per token of remote drafts ÷ co-located ones, with ours on both: {ratio}; with nothing changed {ratio}.",
    ]
    assert list(sentences("scale5", found))[1].count(ratio) == 3
    assert "at concurrency 16" in next(iter(sentences("streams", found)))
    assert "at 1.2 requests per second" in list(sentences("rates", found))[1]
    assert "At 8 streams, time per token ÷ plain: wanspec_dead 1.006" in list(sentences("useless", found))[1]
    made.publish(Outputs(None, tmp_path / "more.md"), Console(file=io.StringIO()))
    assert (tmp_path / "more.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_with_a_cell_that_was_too_slow_says_so() -> None:
    result = made_up("streams")
    slow = [
        replace(one, counters=Counters({**one.counters.values, "target_overruns": 1.0})) if one.cell[2] == 16 else one
        for one in result.batches
    ]
    run = replace(result, records=records(result.references, slow, result.records.trials))
    page = markdown(more_report({"streams": run}).document)
    assert "streams: DOUBTFUL: more than 1% of the forwards were slower than their pace in none, concurrency 16" in page


def test_some_studies_alone_make_a_page_too(tmp_path: Path) -> None:
    for name in STUDIES:
        made = more_report({name: made_up(name)})
        made.publish(Outputs(None, tmp_path / f"{name}.md"), Console(file=io.StringIO()))
        assert STUDIES[name].title in (tmp_path / f"{name}.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--folder", "/nowhere"], "bench-more: --folder: /nowhere is not a folder"),
        (["--folder", "/tmp", "--only", "x"], "bench-more: --only: 'x' is not a list of base and streams"),
        (["--folder", "/tmp", "--markdown", "/nowhere/x.md"], "bench-more: --markdown: cannot write"),
    ],
)
def test_a_wrong_option_is_one_line(stage: Stage, arguments: list[str], problem: str) -> None:
    app = typer.Typer()
    app.command()(more.main)
    done = CliRunner().invoke(app, [*arguments, "--models", str(stage.folder / "models")])
    assert done.exit_code == 2
    assert done.output.startswith(problem)
    assert stage.started == []


def test_a_journal_of_other_settings_is_left_alone(stage: Stage) -> None:
    (stage.folder / "more" / "base.json.journal").write_text('{"run": {"target": "other"}}\n')
    with pytest.raises(ConfigError, match="is the journal of a run with another target"):
        run(stage, "base")
