"""The arguments of `wanspec serve` and `wanspec drafter` are read as `vllm serve` reads them."""

import json
import os
import sys
from pathlib import Path

import pytest

from vllm_wanspec.cli import launch
from vllm_wanspec.cli.main import run

ENDPOINTS = 'draft_endpoints: [{name: eu, url: "http://127.0.0.1:8101"}]\n'


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have replaced this process."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: commands.append(command[4:]))
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    monkeypatch.setenv("WANSPEC_TOKEN", "secret")  # without one a drafter that all can reach does not start
    return commands


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a configuration, and files for ``--config`` with and without a model."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "wanspec.yaml": ENDPOINTS,
        "full.yaml": "model: big\nport: 7\n",
        "bare.yaml": "port: 7\n",
        "speculative.yaml": "model: big\nspeculative-config: {method: ngram}\n",
        "spec-tokens.yaml": "model: big\nspec_tokens: 4\n",
        "additional.yaml": "model: big\nadditional_config: {theirs: 1}\n",
        "taken.yaml": "model: big\nadditional-config: {wanspec: other.yaml}\n",
        "list.yaml": "[1]\n",
        "broken.yaml": "a: [\n",
        "date.yaml": "model: 2026-13-45\n",
        "deep.yaml": "[" * 2000,
        "escape.yaml": 'model: "\\UFFFFFFFF"\n',
        "digits.yaml": f"port: {'1' * 5000}\n",
        "dotted.yaml": "model: big\nspeculative_config.method: ngram\n",
        "short.yaml": "model: big\nspec-me: ngram\n",
        "brief.yaml": "model: big\nadditional-conf: {theirs: 1}\n",
        "inner.yaml": "model: big\nadditional_config.wanspec: other.yaml\n",
        "today.yaml": "model: big\nadditional-config: {day: 2026-11-12}\n",
        "endless.yaml": "model: big\nadditional-config: &a {a: *a}\n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["wanspec", *arguments])
    with pytest.raises(SystemExit) as caught:
        run()
    code = caught.value.code
    return code if isinstance(code, int) else 0 if code is None else 1


def serve(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    return call(monkeypatch, "serve", "--wanspec", "wanspec.yaml", *arguments)


def theirs(command: list[str]) -> tuple[list[str], dict[str, object]]:
    """A command without our flags, and their values."""
    rest, ours = list(command), {}
    for flag in ("--speculative-config", "--additional-config"):
        assert rest.count(flag) == 1
        place = rest.index(flag)
        ours[flag] = json.loads(rest[place + 1])
        del rest[place : place + 2]
    return rest, ours


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> str:
    """The one line, with status 2."""
    given = ["--wanspec", "wanspec.yaml"] if command == "serve" else []
    assert call(monkeypatch, command, *given, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("wanspec: ")
    assert err.count("\n") == 1
    return err


LINES = [
    ("--some-flag", "42", "big"),
    ("--port=8000", "big"),
    ("--enforce-eager", "big", "--port", "1"),
    ("-tp", "2", "big", "-O3"),
    ("--model", "big", "--port", "8000"),
    ("--port", "8000", "--model=big"),
    ("--config", "full.yaml"),
    ("--seed", "1", "--config", "full.yaml", "-tp", "2"),
    ("--config", "bare.yaml", "big"),
    ("big", "--compilation-config.mode", "3"),
]


@pytest.mark.parametrize("line", LINES[:-1], ids=" ".join)
def test_the_arguments_reach_vllm_in_order(
    monkeypatch: pytest.MonkeyPatch, executed: list[list[str]], folder: Path, line: tuple[str, ...]
) -> None:
    serve(monkeypatch, *line)
    call(monkeypatch, "drafter", *line)
    assert theirs(executed[0])[0] == list(line)
    assert executed[1] == list(line)
    assert executed[0].index("--speculative-config") == 0, "a flag of ours stands between theirs and its value"


def test_what_follows_the_model_reaches_vllm(
    monkeypatch: pytest.MonkeyPatch, executed: list[list[str]], folder: Path
) -> None:
    serve(monkeypatch, *LINES[-1])
    rest, ours = theirs(executed[0])
    assert rest == list(LINES[-1])
    assert executed[0][0] == "big"
    assert ours["--additional-config"] == {"wanspec": str(folder / "wanspec.yaml")}


@pytest.mark.parametrize("command", ["serve", "drafter"])
def test_a_file_with_an_equals_sign_is_read_as_one_without(
    monkeypatch: pytest.MonkeyPatch, executed: list[list[str]], folder: Path, command: str
) -> None:
    given = ["--wanspec", "wanspec.yaml"] if command == "serve" else []
    call(monkeypatch, command, *given, "--config=full.yaml", "-tp", "2")
    rest = theirs(executed[0])[0] if command == "serve" else executed[0]
    assert rest == ["--config", "full.yaml", "-tp", "2"]


def test_after_two_dashes_comes_the_model(
    monkeypatch: pytest.MonkeyPatch, executed: list[list[str]], folder: Path
) -> None:
    serve(monkeypatch, "--port", "8000", "--", "big")
    assert theirs(executed[0])[0] == ["--port", "8000", "big"]
    assert executed[0].index("--speculative-config") == 0


@pytest.mark.parametrize("command", ["serve", "drafter"])
@pytest.mark.parametrize(
    "line",
    [(), ("--port", "8000"), ("-tp", "2"), ("--port=8000", "--enforce-eager"), ("--config", "bare.yaml")],
    ids=" ".join,
)
def test_a_missing_model_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executed: list[list[str]],
    folder: Path,
    command: str,
    line: tuple[str, ...],
) -> None:
    assert "no model" in refused(monkeypatch, capsys, command, *line)
    assert not executed


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("--config", "none.yaml"), "none.yaml: cannot be read"),
        (("--config", "broken.yaml"), "broken.yaml: is not valid YAML at line 2"),
        (("--config", "list.yaml"), "list.yaml: must be a mapping"),
        (("--config", "date.yaml"), "date.yaml: is not valid YAML"),
        (("--config", "deep.yaml"), "deep.yaml: is not valid YAML"),
        (("--config", "escape.yaml"), "escape.yaml: is not valid YAML"),
        (("--config", "digits.yaml"), "digits.yaml: is not valid YAML"),
        (("--config", "no\x1b[31mne.yaml"), "no\\x1b[31mne.yaml: cannot be read"),
        (("big", "--config"), "--config: names no file"),
    ],
    ids=str,
)
def test_a_wrong_file_for_vllm_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executed: list[list[str]],
    folder: Path,
    line: tuple[str, ...],
    says: str,
) -> None:
    for command in ("serve", "drafter"):
        assert says in refused(monkeypatch, capsys, command, *line)
    assert not executed


@pytest.mark.parametrize(
    ("line", "added"),
    [
        (("small",), ["--no-async-scheduling"]),
        (("small", "--no_async_scheduling"), []),
        (("small", "--async-scheduling"), []),
        (("--config", "sync.yaml"), []),
    ],
    ids=str,
)
def test_a_drafter_s_scheduling_is_its_own_in_every_spelling(
    monkeypatch: pytest.MonkeyPatch, executed: list[list[str]], folder: Path, line: tuple[str, ...], added: list[str]
) -> None:
    monkeypatch.setenv("WANSPEC_DRAFT_HOST", "engine")
    (folder / "sync.yaml").write_text("model: small\nasync_scheduling: false\n", encoding="utf-8")
    call(monkeypatch, "drafter", *line)
    assert executed == [[*line, *added]]


# Flags that are ours


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        (("big", "--spec-tokens", "4"), "--spec-tokens"),
        (("big", "--spec-method=ngram"), "--spec-method"),
        (("big", "--spec_model", "m"), "--spec_model"),
        (("big", "--speculative-conf", "{}"), "--speculative-conf"),
        (("big", "--config", "speculative.yaml"), "speculative-config"),
        (("--config", "spec-tokens.yaml"), "spec-tokens"),
        (("--config", "dotted.yaml"), "speculative-config.method"),  # would replace ours
        (("--config", "short.yaml"), "spec-me"),
        (("big", "--spec-me", "ngram"), "--spec-me"),
        (("big", "--spec-mo=m"), "--spec-mo"),
        (("big", "--spec_t", "3"), "--spec_t"),
    ],
    ids=str,
)
def test_every_spelling_of_our_flags_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executed: list[list[str]],
    folder: Path,
    line: tuple[str, ...],
    flag: str,
) -> None:
    err = refused(monkeypatch, capsys, "serve", *line)
    assert flag in err
    assert "vllm serve" in err
    assert not executed


@pytest.mark.parametrize(
    "line",
    [
        ("big", "--additional-config", '{"theirs": 1}', "--port", "1"),
        ("big", '--additional_config={"theirs": 1}', "--port", "1"),
        ("big", "--additional-conf", '{"theirs": 1}', "--port", "1"),
    ],
    ids=str,
)
def test_an_additional_configuration_is_taken_in(
    monkeypatch: pytest.MonkeyPatch, executed: list[list[str]], folder: Path, line: tuple[str, ...]
) -> None:
    serve(monkeypatch, *line)
    rest, ours = theirs(executed[0])
    assert rest == ["big", "--port", "1"]
    assert ours["--additional-config"] == {"theirs": 1, "wanspec": str(folder / "wanspec.yaml")}


def test_that_of_a_file_is_taken_in_unless_a_flag_gives_another(
    monkeypatch: pytest.MonkeyPatch, executed: list[list[str]], folder: Path
) -> None:
    serve(monkeypatch, "--config", "additional.yaml")
    serve(monkeypatch, "--config", "additional.yaml", "--additional-config", '{"other": 2}')
    serve(monkeypatch, "--config", "brief.yaml")
    ours = {"wanspec": str(folder / "wanspec.yaml")}
    assert theirs(executed[0])[1]["--additional-config"] == {"theirs": 1, **ours}
    assert theirs(executed[1])[1]["--additional-config"] == {"other": 2, **ours}
    assert theirs(executed[2])[1]["--additional-config"] == {"theirs": 1, **ours}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("big", "--additional-config", "x.yaml"), "JSON object"),
        (("big", "--additional-config", "[1]"), "JSON object"),
        (("big", "--additional-config"), "JSON object"),
        (("big", "--additional-config", "{}", "--additional-config", "{}"), "given twice"),
        (("big", "--additional-config.theirs", "1"), "JSON object"),
        (("big", "--additional-config", '{"wanspec": "x"}'), "--wanspec"),
        (("--config", "taken.yaml"), "--wanspec"),
        (("--config", "inner.yaml"), "one mapping"),
        (("--config", "today.yaml"), "JSON object"),
        (("--config", "endless.yaml"), "JSON object"),
        (("big", "--additional-config", "[" * 100_000), "JSON object"),
    ],
    ids=str,
)
def test_one_that_cannot_be_taken_in_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executed: list[list[str]],
    folder: Path,
    line: tuple[str, ...],
    says: str,
) -> None:
    err = refused(monkeypatch, capsys, "serve", *line)
    assert "additional-config" in err
    assert says in err
    assert not executed
