"""The profile of a drafter's processes: samples folded into groups, py-spy found and run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vllm_wanspec.lab.drafter import profile
from vllm_wanspec.lab.drafter.profile import find_py_spy, fold, record

SAMPLES = """\
main (a.py:1);run (asyncio/runners.py:5);Connection._run (vllm_wanspec/drafter/host.py:7) 30
main (a.py:1);Connection._run (vllm_wanspec/drafter/host.py:7);append (vllm_wanspec/core/tree.py:9) 10
main (a.py:1);output_handler (vllm/v1/engine/async_llm.py:3);f (vllm/v1/engine/output_processor.py:4);g (x.py:2) 50
bootstrap (threading.py:1);Condition.wait (threading.py:300) 500
main (a.py:1);Runner.run (asyncio/runners.py:118) 400
main (a.py:1) 10
broken
"""


def test_samples_are_folded_by_the_innermost_known_frame() -> None:
    shares = fold(SAMPLES.splitlines(), "api")
    assert shares == {"output processor": 0.5, "our service": 0.3, "session: decide": 0.1, "other": 0.1}
    assert next(iter(shares)) == "output processor"
    assert fold([], "engine") == {}


def test_a_profile_is_recorded_side_by_side(tmp_path: Path) -> None:
    program = tmp_path / "py-spy"
    program.write_text(
        "#!/bin/sh\nwhile [ $# -gt 1 ]; do case $1 in --output) out=$2;; --pid) pid=$2;; esac; shift; done\n"
        '[ "$pid" = 2 ] && exit 1\n'
        'echo "_read (vllm_wanspec/drafter/routes.py:5) 3" > "$out"\n'
    )
    program.chmod(0o755)
    found = asyncio.run(record(str(program), {"api": 1, "engine": 2}, 1, tmp_path))
    assert found == {"api": {"our service": 1.0}}


def test_py_spy_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(profile.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_py_spy() is None
    (tmp_path / "py-spy").touch()
    assert find_py_spy() == str(tmp_path / "py-spy")
