"""Processor time of processes and cores."""

import os
import sys

import pytest

from vllm_wanspec.lab.harness.cpu import CORE, CpuClock, core_seconds, group_processes


def test_no_processes_of_no_group() -> None:
    assert group_processes(2**22 + 1) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_clock_reads_a_process_and_its_core() -> None:
    core = min(os.sched_getaffinity(0))
    clock = CpuClock(os.getpid(), core)
    before = clock.read()
    while clock.read()["api"] == before["api"]:
        sum(range(100_000))
    after = clock.read()
    assert after["api"] > before["api"]
    assert after[CORE] >= before[CORE] > 0.0
    assert core_seconds(core) >= after[CORE]


def test_nothing_is_known_of_a_core_that_is_not_there() -> None:
    assert core_seconds(2**20) == 0.0
    assert CpuClock().read() == {}
