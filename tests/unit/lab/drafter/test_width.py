"""The width bench: its settings, and a whole run with stand-ins."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from result_files import committed, key_paths
from rich.console import Console
from toys import FINGERPRINT, VOCAB_SIZE, drafter_argv
from typer import Typer
from typer.testing import CliRunner

from vllm_wanspec.config import WIDTH_ENV
from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError, UnsupportedError
from vllm_wanspec.lab.drafter import width
from vllm_wanspec.lab.drafter.width import parse_paces, run_width
from vllm_wanspec.lab.drafter.width_figures import WidthOptions
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.launch import drafter_spec
from vllm_wanspec.lab.harness.options import listed, parse_widths
from vllm_wanspec.lab.harness.servers import ServerSpec
from vllm_wanspec.sim.controller import DraftTokenizer

TOKENIZER = DraftTokenizer(FINGERPRINT, lambda text: [ord(letter) % VOCAB_SIZE for letter in text])


def test_settings_are_read() -> None:
    assert parse_widths("32, 1,8") == (1, 8, 32)
    assert parse_paces("none, 5+0.02") == (None, Pacing(5.0, 0.02))
    assert listed("--loads", "churning, steady,churning", ("steady", "churning")) == ("churning", "steady")
    for text in ("", "idle"):
        with pytest.raises(ConfigError, match=f"--loads: '{text}' is not a list of steady and churning"):
            listed("--loads", text, ("steady", "churning"))
    for text in ("", "a", "1,1", "0", "2000"):
        with pytest.raises(ConfigError, match="--widths"):
            parse_widths(text)
    with pytest.raises(ConfigError, match="--pace"):
        parse_paces("fast")
    with pytest.raises(ConfigError, match="1 is missing"):
        WidthOptions(widths=(8, 16))


def test_what_is_started() -> None:
    paced, free = (drafter_spec(Path("draft"), 64, pace) for pace in (Pacing(5.0, 0.02), None))
    assert paced.env is not None
    assert free.env is not None
    assert paced.env["WANSPEC_PACING"] == "5.0+0.02"
    assert "WANSPEC_PACING" not in free.env
    assert free.env[WIDTH_ENV] == "64"
    assert free.argv[1:5] == ["-m", "vllm_wanspec.cli.main", "drafter", "draft"]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of models without weights, and a toy drafter that is started in place of vLLM."""
    for folder in ("target", "draft"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    for name in ("prompts.jsonl", "bench_prompts.jsonl"):
        (tmp_path / name).write_text('{"prompt": "def f(x):"}\n')

    def spec(draft: Path, places: int, pace: Pacing | None) -> ServerSpec:
        real = drafter_spec(draft, places, pace)
        return replace(real, argv=drafter_argv(real.port, places))

    monkeypatch.setattr(width, "drafter_spec", spec)
    monkeypatch.setattr(width.DraftTokenizer, "load", lambda model: TOKENIZER)
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    monkeypatch.setattr(width, "find_py_spy", lambda: None)
    return tmp_path


def test_a_whole_run(stand_ins: Path) -> None:
    arguments = ["--models", str(stand_ins), "--widths", "1,4", "--repeat", "2", "--seconds", "0.3", "--warm-up", "0.1"]
    arguments += ["--json", str(stand_ins / "w.json"), "--markdown", str(stand_ins / "w.md")]
    app = Typer()
    app.command()(width.main)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    data = json.loads((stand_ins / "w.json").read_text())
    for load, figure in (("steady", "measured_s"), ("churning", "bytes_per_s")):
        assert [arm["pace"] for arm in data[load]] == [None, "5.0+0.02"]
        for arm in data[load]:
            assert [found["width"] for found in arm["widths"]] == [1, 4]
            assert len(arm["windows"]) == 4
            assert all(found["events_per_s"] > 0.0 and found[figure] > 0.0 for found in arm["windows"])
    committed_keys = {key for key in key_paths(committed("width")) if "/profile/" not in key}
    assert key_paths(data) == committed_keys
    assert data["command"].startswith("python -m vllm_wanspec.lab.drafter.width")
    assert "No profile" in (stand_ins / "w.md").read_text()
    done = CliRunner().invoke(app, [*arguments, "--pace", "none", "--loads", "steady", "--check"])
    assert done.exit_code == 1  # width 32 was not measured


def test_a_run_that_cannot_be(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Typer()
    app.command()(width.main)
    for arguments, problem in (
        (["--json", str(stand_ins)], "--json: cannot write"),
        (["--models", str(stand_ins / "draft")], "demo models"),
        (["--widths", "8"], "bench-width: --widths: 1 is missing"),
        (["--loads", "idle"], "bench-width: --loads: 'idle'"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2
        assert problem in done.output
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed")
    with pytest.raises(UnsupportedError):
        run_width(WidthOptions(models=stand_ins), Console(file=io.StringIO()))
