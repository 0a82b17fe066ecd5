"""Where a result comes from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.provenance import Provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "result.json").write_text("{}")
    git(tmp_path, "add", "result.json")
    git(tmp_path, "commit", "-q", "-m", "one")
    monkeypatch.setattr(machine, "checkout", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--json", "two words.json"])
    return tmp_path


def test_a_run_in_a_clean_checkout_names_its_commit(checkout: Path) -> None:
    found = Provenance.of_this_run("wanspec")
    head = git(checkout, "rev-parse", "--short", "HEAD")
    assert found.commit == head
    (checkout / "result.json").write_text("{1}")  # what a run writes afterwards does not count
    assert found.after(1234.56).as_json() == {
        "seconds": 1234.6,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": head,
        "command": "wanspec --json 'two words.json'",
    }
    assert Provenance.of_this_run("wanspec").commit == f"{head}-dirty"
    assert Provenance.of_json(found.after(1234.5).as_json() | {"more": 1}) == found.after(1234.5)


def test_results_that_runs_write_do_not_make_a_checkout_dirty(checkout: Path) -> None:
    written = checkout / "docs" / "results" / "bench.json"
    written.parent.mkdir(parents=True)
    written.write_text("{}")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "two")
    head = Provenance.of_this_run("wanspec").commit
    written.write_text('{"complete": false}')  # an interrupted run, which the same command must take up again
    assert Provenance.of_this_run("wanspec").commit == head
    (checkout / "docs" / "page.md").write_text("not tracked")
    assert Provenance.of_this_run("wanspec").commit == head
    (checkout / "result.json").write_text("{1}")
    assert Provenance.of_this_run("wanspec").commit == f"{head}-dirty"


def test_a_run_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "checkout", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench"])
    found = Provenance.of_this_run("python -m bench").after(1.0)
    assert (found.commit, found.command) == (None, "python -m bench")
    assert "commit unknown; 1 s." in str(found)


def test_it_is_one_line() -> None:
    found = Provenance("AMD, 2 cores", {"python": "3.11", "vllm": "0.32"}, "abc-dirty", "wanspec bench", 3600.4)
    assert str(found) == "`wanspec bench`; AMD, 2 cores; python 3.11, vllm 0.32; commit abc-dirty; 3,600 s."
