"""Processor time: of a vLLM server's processes, and of the core that it is on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CORE = "core"
ENGINE_NAME = "EngineCor"  # the kernel keeps 15 characters


class CpuClock:
    """Reads the processor time of a vLLM server's processes and of the core that it is on."""

    def __init__(self, group: int | None = None, core: int | None = None) -> None:
        """Read of a running server that leads a process group and is pinned to a core."""
        self._pids = group_processes(group) if group is not None else {}
        self._core = core

    def read(self) -> dict[str, float]:
        """Seconds by process name, and those of all programs on the core."""
        cpu_s = {name: _cpu_seconds(pid) for name, pid in self._pids.items()}
        return cpu_s if self._core is None else cpu_s | {CORE: core_seconds(self._core)}


def processes(group: int) -> Iterator[tuple[int, str, str]]:
    """Id, name and state letter of each process in a group; only where there is /proc."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                # "pid (name) state ppid pgrp ...": the name may hold spaces and parentheses.
                head, _, tail = (entry / "stat").read_text("utf-8", "replace").rpartition(")")
                fields = tail.split()
                if int(fields[2]) == group:
                    yield int(entry.name), head.partition("(")[2], fields[0]


def group_processes(group: int) -> dict[str, int]:
    """Process ids of a vLLM server: ``api``, which leads the process group, and ``engine``; none without /proc."""
    if not Path(f"/proc/{group}/stat").exists():
        return {}
    engines = [pid for pid, name, _ in processes(group) if ENGINE_NAME in name]
    return {"api": group} | ({"engine": engines[-1]} if engines else {})


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process; 0 where that cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


def core_seconds(core: int) -> float:
    """Time that a processor was not idle, stolen by other machines included; 0 where that cannot be known."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/stat").read_text("utf-8").splitlines():
            name, *ticks = line.split()
            if name == f"cpu{core}":
                user, nice, system, _, _, *others = map(int, ticks[:8])
                return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")
    return 0.0
