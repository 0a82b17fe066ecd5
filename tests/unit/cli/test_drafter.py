"""``wanspec drafter``: what is wrong in its environment is said before vLLM is started."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from vllm_wanspec.cli import main
from vllm_wanspec.config import HOST_ENV, OTHER_ROUTES_ENV, TOKEN_ENV, TOKEN_FILE_ENV, WIDTH_ENV
from vllm_wanspec.drafter.environment import API_KEY_ENV


class Process(NamedTuple):
    """What this process would have become."""

    command: list[str]
    environment: dict[str, str]


@pytest.fixture
def becomes(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    """The processes that this one would have become."""
    for name in (TOKEN_ENV, TOKEN_FILE_ENV, OTHER_ROUTES_ENV, API_KEY_ENV, HOST_ENV, WIDTH_ENV):
        monkeypatch.delenv(name, raising=False)
    commands: list[Process] = []

    def execve(program: str, command: list[str], environment: dict[str, str]) -> None:
        commands.append(Process(command, environment))
        raise SystemExit(0)

    monkeypatch.setattr("vllm_wanspec.cli.drafter.require_vllm", lambda: None)
    monkeypatch.setattr(os, "execve", execve)
    return commands


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """The status of ``wanspec drafter small`` with more flags."""
    monkeypatch.setattr("sys.argv", ["wanspec", "drafter", "small", *flags])
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("token", ["none", "secret", " secret \n", "eu:secret, us:secret2"])
def test_good_environments(becomes: list[Process], monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv(TOKEN_ENV, token)
    assert run(monkeypatch, "--host", "0.0.0.0") == 0
    [process] = becomes
    assert not [word for word in process.command if "secret" in word], "a command line can be read by everybody"


def test_tokens_in_a_file(becomes: list[Process], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("# of targets\neu: secret\n", encoding="utf-8")
    monkeypatch.setenv(TOKEN_FILE_ENV, str(tmp_path / "tokens"))
    assert run(monkeypatch, "--host", "0.0.0.0") == 0
    assert len(becomes) == 1


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        ({TOKEN_ENV: "secret"}, "secret"),
        ({TOKEN_ENV: " eu:secret\n"}, "secret"),
        ({TOKEN_ENV: "eu:secret, us:secret2"}, None),
        ({TOKEN_ENV: "none"}, None),
        ({TOKEN_ENV: "secret", API_KEY_ENV: "own"}, "own"),
        ({TOKEN_ENV: "secret", OTHER_ROUTES_ENV: "open"}, None),
        ({TOKEN_ENV: "secret", OTHER_ROUTES_ENV: "token"}, "secret"),
    ],
    ids=str,
)
def test_the_key_of_vllm_s_api(
    becomes: list[Process], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], key: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch) == 0
    assert becomes[0].environment.get(API_KEY_ENV) == key


ONE_MACHINE = [
    ("--host", "127.0.0.1"),
    ("--host=127.0.0.2",),
    ("--host", "localhost"),
    ("--host", "::1"),
    ("--hos", "127.0.0.1"),
    ("--host", "0.0.0.0", "--host", "127.0.0.1"),
    ("--uds", "/run/drafter.sock"),
    ("--config", "local.yaml"),
]
MORE_MACHINES = [
    (),
    ("--host", "0.0.0.0"),
    ("--host=10.0.0.1",),
    ("--host", "127.0.0.1", "--host", "::"),
    ("--config", "local.yaml", "--host", "0.0.0.0"),
    ("--config", "wide.yaml"),
    ("--host",),
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("local.yaml").write_text("host: 127.0.0.1\n", encoding="utf-8")
    Path("wide.yaml").write_text("host: 0.0.0.0\n", encoding="utf-8")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("flags", ONE_MACHINE, ids=" ".join)
def test_one_machine_needs_no_token(
    becomes: list[Process], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *flags) == 0
    assert len(becomes) == 1


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("flags", MORE_MACHINES, ids=" ".join)
def test_more_machines_need_one(
    becomes: list[Process],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
) -> None:
    assert run(monkeypatch, *flags) == 2
    assert becomes == []
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wanspec: {TOKEN_ENV} is not set, and the drafter would listen on ")
    assert "--host 127.0.0.1" in line


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        (TOKEN_ENV, "", "is empty"),
        (TOKEN_ENV, "secret,none", "the word none"),
        (TOKEN_FILE_ENV, "", "is empty"),
        (TOKEN_FILE_ENV, "/absent/tokens", "cannot be read"),
        (OTHER_ROUTES_ENV, "ajar", "'ajar'"),
        (TOKEN_ENV, "secrét", "ASCII"),
        (HOST_ENV, "moon", "'moon'"),
        (WIDTH_ENV, "0", "'0'"),
    ],
)
def test_wrong_environments(
    becomes: list[Process],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    what: str,
) -> None:
    monkeypatch.setenv(name, value)
    assert run(monkeypatch, "--host", "127.0.0.1") == 2
    assert becomes == []
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("wanspec: ")
    assert name in line
    assert what in line
    assert "secr" not in line
