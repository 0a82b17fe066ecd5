"""What this machine is."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_wanspec.lab.harness import machine

LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
  MIG 1g.10gb     Device  0: (UUID: MIG-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)
"""


@pytest.mark.parametrize(
    ("listed", "status", "names", "told"),
    [
        (LISTED, 0, ("NVIDIA H100 80GB HBM3",) * 2, ", 2 × NVIDIA H100 80GB HBM3, "),
        ("GPU 0: Tesla T4\n", 0, ("Tesla T4",), ", 1 × Tesla T4, "),
        ("No devices were found\n", 0, (), " GiB, "),
        (LISTED, 9, (), " GiB, "),
        (None, 0, (), " GiB, "),
    ],
)
def test_gpus_are_those_that_nvidia_smi_lists(
    listed: str | None, status: int, names: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if listed is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{listed}END\nexit {status}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    machine.gpus.cache_clear()
    try:
        assert machine.gpus() == names
        assert machine.has_gpu() is bool(names)
        assert told in machine.describe()
    finally:
        machine.gpus.cache_clear()
