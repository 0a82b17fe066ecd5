"""A measuring command as a whole: where it may write, what it writes, and how it ends."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from vllm_wanspec.errors import ConfigError, WanspecError
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.harness.running import Outputs
from vllm_wanspec.lab.report.document import Document, Table
from vllm_wanspec.lab.report.writing import measured


@dataclass
class Found:
    """A result that holds its bar or does not."""

    held: bool

    def as_json(self) -> dict[str, Any]:
        return {"held": self.held}


def document(found: Found, provenance: Provenance) -> Document:
    return Document("T", [Table("t", ["a"], [["1"]])], [], [], [], f"commit {provenance.commit}")


def run(measure: Callable[[Console], Found], outputs: Outputs, check: bool = False) -> int:
    """Run the command; returns its exit status."""
    try:
        measured("python -m some.package.width", measure, document, outputs, check)
    except typer.Exit as ended:
        return ended.exit_code
    return 0


def test_the_commit_is_asked_when_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    path.write_text("{}")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@localhost"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True, timeout=60)
    monkeypatch.setattr(machine, "checkout", lambda: tmp_path)

    def measure(console: Console) -> Found:
        path.write_text("{1}")  # by whoever works beside it
        return Found(True)

    assert run(measure, Outputs(path)) == 0
    data = json.loads(path.read_text())
    assert data["held"] is True
    assert data["commit"] and "dirty" not in data["commit"]
    assert data["command"].startswith("python -m some.package.width")
    assert list(data)[-5:] == ["seconds", "machine", "versions", "commit", "command"]


def test_how_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda console: Found(False), Outputs()) == 0
    assert run(lambda console: Found(False), Outputs(), check=True) == 1
    assert run(lambda console: Found(True), Outputs(), check=True) == 0

    def fail(error: BaseException) -> Callable[[Console], Found]:
        def measure(console: Console) -> Found:
            raise error

        return measure

    for error, status, line in (
        (ConfigError("--widths: 'a'"), 2, "bench-width: --widths: 'a'\n"),
        (WanspecError("the drafter died"), 1, "bench-width: the drafter died\n"),
        (KeyboardInterrupt(), 130, "bench-width: interrupted; everything is stopped\n"),
    ):
        assert run(fail(error), Outputs(tmp_path / "w.json")) == status
        assert capsys.readouterr().err == line
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_measured_whose_result_could_not_be_written(tmp_path: Path) -> None:
    asked: list[Console] = []

    def measure(console: Console) -> Found:
        asked.append(console)
        return Found(True)

    assert run(measure, Outputs(tmp_path)) == 2
    assert run(measure, Outputs(markdown_path=tmp_path / "missing" / "w.md")) == 2
    assert asked == []
