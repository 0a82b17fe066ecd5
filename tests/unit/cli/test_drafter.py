"""``wanspec drafter``: what is wrong in its environment is said before vLLM is started."""

import os

import pytest

from vllm_wanspec.cli import main
from vllm_wanspec.config import HOST_ENV, TOKEN_ENV, WIDTH_ENV


@pytest.fixture
def becomes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that this process would have become."""
    for name in (TOKEN_ENV, HOST_ENV, WIDTH_ENV):
        monkeypatch.delenv(name, raising=False)
    commands: list[list[str]] = []

    def execve(program: str, command: list[str], environment: object) -> None:
        commands.append(command)
        raise SystemExit(0)

    monkeypatch.setattr("vllm_wanspec.cli.drafter.require_vllm", lambda: None)
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr("sys.argv", ["wanspec", "drafter", "small"])
    return commands


@pytest.mark.parametrize("token", [None, "secret"])
def test_good_environments(becomes: list[list[str]], monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    if token is not None:
        monkeypatch.setenv(TOKEN_ENV, token)
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert caught.value.code == 0
    assert len(becomes) == 1


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        (TOKEN_ENV, "", "is empty"),
        (TOKEN_ENV, "secret\n", "line end"),
        (TOKEN_ENV, "secret ", "blank"),
        (TOKEN_ENV, "secrét", "ASCII"),
        (HOST_ENV, "moon", "'moon'"),
        (WIDTH_ENV, "0", "'0'"),
    ],
)
def test_wrong_environments(
    becomes: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    what: str,
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert caught.value.code == 2
    assert becomes == []
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("wanspec: ")
    assert name in line
    assert what in line
    assert "secr" not in line
