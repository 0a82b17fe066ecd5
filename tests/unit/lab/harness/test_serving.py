"""Servers that are started in turn, and with little memory."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.launch import CACHE_ENV, LEAN_FLAGS, lean, serving
from vllm_wanspec.lab.harness.servers import ServerError, ServerSpec, free_ports

FAKE = Path(__file__).parents[1] / "fake_vllm.py"


def stand_in(name: str, folder: Path) -> ServerSpec:
    (port,) = free_ports(1)
    return ServerSpec(name, [sys.executable, str(FAKE), "--port", str(port), "--stats", str(folder / name)], port)


def test_a_server_is_started_once_the_one_before_is_ready(tmp_path: Path) -> None:
    specs = [stand_in(name, tmp_path) for name in ("a", "b")]
    with serving(specs, tmp_path, Console(file=io.StringIO()), in_turn=True) as servers:
        first, second = servers.values()
        assert (first.name, second.name) == ("a", "b")
        assert first.ready_after_s is not None
        assert second.started_s >= first.started_s + first.ready_after_s
        assert first.probe() and second.probe()
    assert not first.is_running() and not second.is_running()


def test_a_server_that_cannot_start_ends_those_before(tmp_path: Path) -> None:
    broken = ServerSpec("broken", [sys.executable, "-c", "raise SystemExit(3)"], 1)
    with (
        pytest.raises(ServerError, match="broken ended by itself"),
        serving([stand_in("a", tmp_path), broken], tmp_path, Console(file=io.StringIO()), in_turn=True),
    ):
        raise AssertionError("the block must not begin")


@pytest.mark.parametrize("gpu", [False, True])
def test_only_a_machine_without_a_gpu_is_short_of_memory(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    spec = ServerSpec("a", ["serve"], 1, {CACHE_ENV: "1", "HOME": "x"})
    leaner = ServerSpec("a", ["serve", *LEAN_FLAGS], 1, {"HOME": "x"})
    assert lean(spec) == (spec if gpu else leaner)
