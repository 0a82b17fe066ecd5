"""The command line: versions, help, faults on this side, and what `serve` and `drafter` turn into."""

import json
import os
import sys
from pathlib import Path

import pytest

from vllm_wanspec import __version__
from vllm_wanspec.cli import launch
from vllm_wanspec.cli.main import run

ENDPOINTS = 'draft_endpoints: [{name: eu, url: "http://127.0.0.1:8101"}]\n'


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have replaced this process."""
    commands: list[list[str]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        commands.append(command)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setenv("WANSPEC_TOKEN", "secret")  # without one a drafter that all can reach does not start
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    return commands


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "wanspec.yaml"
    path.write_text(ENDPOINTS, encoding="utf-8")
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["wanspec", *arguments])
    with pytest.raises(SystemExit) as caught:
        run()
    code = caught.value.code
    return code if isinstance(code, int) else 0 if code is None else 1


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"wanspec {__version__}\n"


def test_help_names_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    for name in ("demo", "drafter", "serve", "wan"):
        assert name in out


def test_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "sreve") == 2
    assert "sreve" in capsys.readouterr().err


def test_serve_gives_vllm_our_flags(monkeypatch: pytest.MonkeyPatch, executed: list[list[str]], yaml: Path) -> None:
    monkeypatch.chdir(yaml.parent)
    call(monkeypatch, "serve", "big", "--wanspec", yaml.name, "--speculative-tokens", "5", "--port", "8000", "-tp", "2")
    [command] = executed
    assert command[3:5] == ["serve", "big"]
    flags = dict(zip(command[5:9:2], command[6:9:2], strict=True))
    assert json.loads(flags["--speculative-config"]) == {
        "method": "custom_class",
        "model": "vllm_wanspec.RemoteProposer",
        "num_speculative_tokens": 5,
    }
    assert json.loads(flags["--additional-config"]) == {"wanspec": str(yaml)}
    assert command[9:] == ["--port", "8000", "-tp", "2"]


@pytest.mark.parametrize(
    "flag",
    [
        "--speculative-config={}",
        "--speculative-config.method=ngram",
        "--additional-config",
        "--speculative_config",
    ],
)
def test_serve_refuses_flags_that_it_sets(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executed: list[list[str]],
    yaml: Path,
    flag: str,
) -> None:
    assert call(monkeypatch, "serve", "big", "--wanspec", str(yaml), flag) == 2
    assert flag.split("=")[0].split(".")[0] in capsys.readouterr().err
    assert executed == []


@pytest.mark.parametrize(
    ("text", "fragment"), [("tree: {}\n", "draft_endpoints: is missing"), (ENDPOINTS + "x: 1\n", "not a known key")]
)
def test_a_wrong_file_is_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executed: list[list[str]],
    yaml: Path,
    text: str,
    fragment: str,
) -> None:
    yaml.write_text(text, encoding="utf-8")
    assert call(monkeypatch, "serve", "big", "--wanspec", str(yaml)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"wanspec: {yaml}: ")
    assert fragment in err
    assert err.count("\n") == 1
    assert executed == []


def test_no_vllm_is_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], executed: list[list[str]]
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert call(monkeypatch, "drafter", "small") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert executed == []


def test_drafter_passes_everything_on(monkeypatch: pytest.MonkeyPatch, executed: list[list[str]]) -> None:
    call(monkeypatch, "drafter", "small", "--port", "8101", "--enforce-eager")
    given = ["serve", "small", "--port", "8101", "--enforce-eager"]
    assert executed[0][3:] == given
    monkeypatch.setenv("WANSPEC_DRAFT_HOST", "engine")
    call(monkeypatch, "drafter", "small", "--port", "8101", "--enforce-eager")
    assert executed[1][3:] == [*given, "--no-async-scheduling"]
    call(monkeypatch, "drafter", "small", "--async-scheduling")
    assert executed[2][3:] == ["serve", "small", "--async-scheduling"]
