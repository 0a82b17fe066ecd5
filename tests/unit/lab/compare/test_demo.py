"""The demo: its parts by themselves, and whole runs with stand-ins for vLLM as real processes."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from vllm_wanspec.cli import demo as command
from vllm_wanspec.config import load_settings
from vllm_wanspec.emulate.pacing import PACING_ENV, STATS_ENV, Pacing
from vllm_wanspec.errors import ConfigError, UnsupportedError
from vllm_wanspec.lab.compare import demo as demo_module
from vllm_wanspec.lab.compare.demo import run_demo
from vllm_wanspec.lab.compare.demo_report import Arm, DemoResult, Divergence, print_report
from vllm_wanspec.lab.compare.demo_setup import DemoOptions, DemoPlan, plan_servers
from vllm_wanspec.lab.compare.demo_view import python_text
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import Completion
from vllm_wanspec.lab.harness.models import DemoModels, Prompt, choose_prompts, find_models
from vllm_wanspec.lab.harness.pacing_counts import Paced
from vllm_wanspec.lab.harness.servers import ServerError, ServerSpec

FAKE = Path(__file__).parents[1] / "fake_vllm.py"


def write_prompts(path: Path, modules: str, each: int = 2) -> Path:
    lines = [json.dumps({"module": name, "prompt": f"def {name}{i}("}) for name in modules for i in range(each)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with the files of the demo models."""
    root = tmp_path / "models"
    for name in ("target", "draft"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    write_prompts(root / "prompts.jsonl", "abcde")
    return root


def test_models_are_found_where_they_are(models: Path) -> None:
    found = find_models(models)
    assert (found.target, found.draft, found.prompts) == (models / "target", models / "draft", models / "prompts.jsonl")


def test_missing_models_say_where_they_were_sought(models: Path) -> None:
    (models / "draft" / "config.json").unlink()
    (models / "prompts.jsonl").unlink()
    with pytest.raises(ConfigError) as caught:
        find_models(models)
    assert str(models) in str(caught.value)
    assert "draft/config.json, prompts.jsonl" in str(caught.value)
    assert "--models" in str(caught.value)


def test_models_are_sought_beside_the_package() -> None:
    root = str(Path(demo_module.__file__).parents[3] / "examples" / "demo_models")
    try:
        assert str(find_models(None).target).startswith(root)
    except ConfigError as error:
        assert root in str(error)


def test_prompts_are_spread_over_modules(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.jsonl", "abcdef")
    assert [prompt.module for prompt in choose_prompts(path, 3)] == ["a", "c", "e"]
    assert [prompt.module for prompt in choose_prompts(path, 6)] == list("abcdef")
    assert [prompt.module for prompt in choose_prompts(path, 8)] == [*"abcdef", "a", "d"]
    assert len({prompt.text for prompt in choose_prompts(path, 12)}) == 12
    assert choose_prompts(path, 5) == choose_prompts(path, 5)
    with pytest.raises(ConfigError, match="--prompts: 13 is more than the 12"):
        choose_prompts(path, 13)


@pytest.mark.parametrize("line", ["{", "[1]", '{"module": "a"}', "3"])
def test_a_wrong_prompt_file_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"module": "a", "prompt": "b"}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 3"):
        choose_prompts(path, 1)


def test_servers_are_laid_out_as_designed(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "pin_cores", lambda: (0, 1))
    options = DemoOptions(rtt_ms=50.0, speculative_tokens=5)
    (tmp_path / "plain.pacing.json").write_text("stale")
    plan = plan_servers(options, find_models(models), [1, 2, 3, 4, 5], tmp_path)
    drafter, wan, plain, wanspec = plan.specs
    assert list(drafter.argv)[3:5] == ["drafter", str(models / "draft")]
    assert list(wan.argv)[3:] == ["wan", "--listen", "127.0.0.1:2", "--to", "127.0.0.1:1", "--rtt-ms", "50"]
    assert "--speculative-tokens" not in plain.argv
    assert wanspec.argv[wanspec.argv.index("--speculative-tokens") + 1] == "5"
    assert [spec.core for spec in plan.specs] == [1, None, 0, 0]
    assert [spec.port for spec in plan.specs] == [1, 2, 3, 4]
    settings = load_settings(tmp_path / "wanspec.yaml")
    assert settings.draft_endpoints[0].url == "http://127.0.0.1:2"
    assert settings.metrics is not None
    assert settings.metrics.port == 5
    for spec, pace in ((drafter, "5.0+0.02"), (plain, "35.0+0.1"), (wanspec, "35.0+0.1")):
        assert spec.env is not None
        assert spec.env[PACING_ENV] == pace
        assert spec.env[STATS_ENV] == str(plan.stats[spec.name])
    assert not (tmp_path / "plain.pacing.json").exists()


Planner = Callable[[DemoOptions, DemoModels, list[int], Path], DemoPlan]


def fake_plan(plain: tuple[str, ...] = (), wanspec: tuple[str, ...] = ()) -> Planner:
    """Return a replacement of plan_servers whose servers are stand-ins with these extra arguments."""

    def plan(options: DemoOptions, models: DemoModels, ports: list[int], folder: Path) -> DemoPlan:
        stats = {name: folder / f"{name}.json" for name in ("drafter", "plain", "wanspec")}

        def server(name: str, port: int, *extra: str) -> ServerSpec:
            argv = [sys.executable, str(FAKE), "--port", str(port), "--stats", str(stats[name]), *extra]
            return ServerSpec(name, argv, port)

        specs = (
            server("drafter", ports[0]),
            server("plain", ports[1], *plain),
            server("wanspec", ports[2], "--metrics-port", str(ports[3]), *wanspec),
        )
        return DemoPlan(specs, "plain", "wanspec", f"http://127.0.0.1:{ports[3]}/metrics", stats)

    return plan


@pytest.fixture
def screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Console:
    """Where demo runs print to, on a machine that has vLLM."""
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    monkeypatch.setattr(demo_module, "STATS_SETTLE_S", 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Console(file=io.StringIO(), width=100)


def printed(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_run_compares_both_targets(
    tmp_path: Path, models: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "plan_servers", fake_plan())
    path = tmp_path / "result.json"
    options = DemoOptions(prompts=3, max_tokens=8, models=models, json_path=path, log_dir=tmp_path / "logs")
    assert run_demo(options, screen)
    result = json.loads(path.read_text())
    assert result["rtt_ms"] == 20.0
    assert result["pacing"]["target_ms"] == 35.0
    assert result["pacing"]["draft_ms"] == 5.0
    assert result["identical"] is True
    assert result["ties"] == 0
    assert set(result["arms"]["none"]) == {"tpot_ms", "ttft_ms"}
    arm = result["arms"]["wanspec"]
    assert arm.pop("tpot_ms") > 0
    assert arm.pop("ttft_ms") > 0
    # Three prompts of four steps each; what came before them, the warm-up, is not counted.
    assert arm == {"tokens_per_step": 2.0, "hits": 12, "misses": 0, "late": 0, "local_draft_passes": 0}
    assert result["overruns"]["wanspec"] == 0.0
    assert len(result["per_prompt"]) == 3
    text = printed(screen)
    for expected in ("plain is ready after", "def a0(", "identical output", "target 35 ms + 0.1 ms per token", "20 ms"):
        assert expected in text
    assert (tmp_path / "logs" / "wanspec.log").exists()


def test_a_difference_that_is_no_tie_is_an_error(
    models: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "plan_servers", fake_plan(plain=("--gap", "0.5"), wanspec=("--differ-at", "3")))
    assert not run_demo(DemoOptions(prompts=2, max_tokens=8, models=models), screen)
    text = printed(screen)
    assert "error: different output in a: at generated position 3" in text
    assert "NO" in text


def test_ties_are_counted_and_not_held_against_it(
    tmp_path: Path, models: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "plan_servers", fake_plan(wanspec=("--differ-at", "3")))
    path = tmp_path / "result.json"
    assert run_demo(DemoOptions(prompts=2, max_tokens=8, models=models, json_path=path), screen)
    assert json.loads(path.read_text())["ties"] == 2
    assert "2 floating-point ties" in printed(screen)


def test_a_server_that_dies_in_the_middle_is_named(
    models: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "plan_servers", fake_plan(wanspec=("--fail-after", "20")))
    with pytest.raises(ServerError, match="wanspec ended by itself") as caught:
        run_demo(DemoOptions(prompts=3, max_tokens=8, models=models), screen)
    assert str(caught.value).endswith("the engine died")
    assert "logs are in" in printed(screen)


def test_a_run_on_a_terminal_shows_the_text_as_it_comes(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    monkeypatch.setattr(demo_module, "STATS_SETTLE_S", 0.0)
    monkeypatch.setattr(demo_module, "plan_servers", fake_plan())
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True)
    assert run_demo(DemoOptions(prompts=2, max_tokens=8, models=models), terminal)
    assert "WANSpec: prompts" in printed(terminal)


def test_without_vllm_there_is_no_demo(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed: run `make demo`")
    with pytest.raises(UnsupportedError, match="make demo"):
        run_demo(DemoOptions(models=models), Console(file=io.StringIO()))


def test_paths_that_cannot_be_written_are_found_before_the_run(tmp_path: Path, models: Path, screen: Console) -> None:
    with pytest.raises(ConfigError, match="--json"):
        run_demo(DemoOptions(models=models, json_path=tmp_path / "missing" / "x.json"), screen)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--logs"):
        run_demo(DemoOptions(models=models, log_dir=tmp_path / "file"), screen)


def result_with(**changes: object) -> DemoResult:
    done = Completion((1,), (2, 3), "", 10.0, 50.0, "length")
    names = ("hits", "misses", "late_drafts", "steps", "committed_tokens", "local_draft_passes")
    fields: dict[str, object] = {
        "options": DemoOptions(),
        "plain": Arm((done,)),
        "wanspec": Arm((done,)),
        "counters": {f"wanspec_{name}_total": 4.0 for name in names},
        "divergences": (),
        "paced": {"plain": Paced(1000, 0)},
        "seconds": 90.0,
    }
    return DemoResult(**(fields | changes))  # type: ignore[arg-type]


def test_too_many_overruns_are_warned_about(screen: Console) -> None:
    print_report(result_with(paced={"plain": Paced(1000, 10), "drafter": Paced(1000, 11)}), screen)
    text = " ".join(printed(screen).split())
    assert "warning: 1.1% of the drafter" in text
    assert "of the plain" not in text


def test_a_run_in_which_no_draft_was_used_is_warned_about(screen: Console) -> None:
    print_report(result_with(counters=dict.fromkeys(result_with().counters, 0.0)), screen)
    assert "no draft was ever used" in printed(screen)
    assert "?" in printed(screen)


def test_a_divergence_names_prompt_and_position(screen: Console) -> None:
    found = Divergence(Prompt("cmd", "class Cmd:"), 17, False, 5, None)
    print_report(result_with(divergences=[found]), screen)
    assert "cmd: at generated position 17: plain token 5, WANSpec token None" in printed(screen)
    assert "'class Cmd:'" in printed(screen)


def test_shown_text_has_the_end_of_the_prompt_and_not_too_many_lines() -> None:
    text = python_text("a = 1\nb = 2\nc = 3\ndef f(", "x):\n" + "    pass\n" * 50, lines=10)
    assert text.plain.startswith("b = 2\nc = 3\ndef f(x):\n    pass")
    assert text.plain.endswith("… 44 more lines")
    assert len(text.plain.splitlines()) == 10
    assert text.get_style_at_offset(Console(), 0).dim
    live = python_text("a = 1\nb = 2\nc = 3\ndef f(", "x):\n" + "    pass\n" * 50 + "end", lines=10, keep_end=True)
    assert live.plain.splitlines() == ["    pass"] * 9 + ["end"]


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command.demo)
    outcome = CliRunner().invoke(app, arguments)
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
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def fail(options: DemoOptions, console: Console) -> bool:
        raise error

    monkeypatch.setattr(demo_module, "run_demo", fail)
    code, output = invoke()
    assert code == status
    assert output.startswith("wanspec demo: ")
    assert str(error) in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("identical", "status"), [(True, 0), (False, 1)])
def test_different_output_fails(monkeypatch: pytest.MonkeyPatch, identical: bool, status: int) -> None:
    seen: list[DemoOptions] = []

    def run(options: DemoOptions, console: Console) -> bool:
        seen.append(options)
        return identical

    monkeypatch.setattr(demo_module, "run_demo", run)
    assert invoke("--rtt-ms", "50", "--target-pace", "10+1", "--json", "x.json")[0] == status
    assert seen[0].rtt_ms == 50.0
    assert seen[0].target_pace == Pacing(10.0, 1.0)
    assert seen[0].draft_pace == Pacing(5.0, 0.02)
    assert seen[0].json_path == Path("x.json")


def test_wrong_options_are_refused() -> None:
    code, output = invoke("--target-pace", "slow")
    assert code == 2
    assert "--target-pace: 'slow'" in output
    assert invoke("--prompts", "0")[0] == 2
    assert invoke("--rtt-ms", "-1")[0] == 2
