"""scripts/gpu_check.sh: what it runs, how it ends, and what it leaves behind, with a stand-in for Python."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
#: Notes how it was called; the check of vLLM reads its program from standard input.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$FOLDER/calls"
case "$1 $2" in
"- "*) exit "$(cat "$FOLDER/usable" 2>/dev/null || echo 0)" ;;
"-m pytest") name=exact ;;
*) name=times ;;
esac
if [ -e "$FOLDER/$name-hangs" ]; then
    echo $$ >"$FOLDER/pid"
    exec sleep 60
fi
exit "$(cat "$FOLDER/$name" 2>/dev/null || echo 0)"
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A checkout of nothing but the script, on a machine with a GPU."""
    for name in ("scripts", "bin"):
        (tmp_path / name).mkdir()
    program(tmp_path / "scripts" / SCRIPT.name, SCRIPT.read_text())
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA A (UUID: 1)'\n")
    python = program(tmp_path / "python", PYTHON)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return dict(os.environ) | {"PYTHON": str(python), "FOLDER": str(tmp_path), "PATH": path}


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = ["bash", f"{env['FOLDER']}/scripts/{SCRIPT.name}", *arguments]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


def calls(env: dict[str, str]) -> list[str]:
    path = Path(env["FOLDER"]) / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_exactness_then_times(env: dict[str, str]) -> None:
    done = run(env, "--rounds", "7")
    assert done.returncode == 0, done.stderr
    assert calls(env) == [
        "-",
        "-m pytest -m gpu -s tests/gpu",
        "-m vllm_wanspec.lab.target.gpu --check --json docs/results/gpu.json --markdown docs/results/gpu.md "
        "--keep-log build/gpu-check --rounds 7",
    ]
    assert "gpu_check: exactness: held\n" in done.stdout and "gpu_check: times: held; " in done.stdout
    assert (Path(env["FOLDER"]) / "docs" / "results").is_dir()


@pytest.mark.parametrize(("exact", "times"), [(1, 0), (0, 1), (5, 2)])
def test_both_run_whatever_the_first_finds(env: dict[str, str], exact: int, times: int) -> None:
    for name, status in (("exact", exact), ("times", times)):
        (Path(env["FOLDER"]) / name).write_text(str(status))
    done = run(env)
    assert done.returncode == 1
    assert len(calls(env)) == 3
    assert f"exactness: {f'FAILED (status {exact})' if exact else 'held'}\n" in done.stdout
    assert f"times: {f'FAILED (status {times})' if times else 'held'}; " in done.stdout


def test_without_a_gpu_it_is_one_line_and_status_2(env: dict[str, str]) -> None:
    program(Path(env["FOLDER"]) / "bin" / "nvidia-smi", "#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    done = run(env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_check: no GPU here (nvidia-smi lists none)\n"
    assert calls(env) == []


@pytest.mark.parametrize("missing", [True, False])
def test_without_a_vllm_for_it_likewise(env: dict[str, str], missing: bool) -> None:
    if missing:
        env["PYTHON"] = "absent/python"
    else:
        (Path(env["FOLDER"]) / "usable").write_text("1")
    done = run(env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu_check: ") and done.stderr.count("\n") == 1
    assert "run `make install`, or set PYTHON" in done.stderr
    assert calls(env) == ([] if missing else ["-"])


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def started(env: dict[str, str]) -> int:
    """The process id of what hangs."""
    path, end_s = Path(env["FOLDER"]) / "pid", time.monotonic() + 30.0
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < end_s, "nothing was started"
        time.sleep(0.02)
    return int(path.read_text())


def test_what_takes_too_long_is_ended(env: dict[str, str]) -> None:
    (Path(env["FOLDER"]) / "exact-hangs").touch()
    done = run(env | {"WANSPEC_GPU_EXACT_LIMIT_S": "1"})
    assert done.returncode == 1
    assert "gpu_check: ended after 1 s: " in done.stdout
    assert "exactness: FAILED (status 124)" in done.stdout and "times: held" in done.stdout
    assert not runs(started(env))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_was_started_too(env: dict[str, str], number: signal.Signals, status: int) -> None:
    (Path(env["FOLDER"]) / "times-hangs").touch()
    argv = ["bash", f"{env['FOLDER']}/scripts/{SCRIPT.name}"]
    # Of a group of its own, as from a terminal; the signal goes to the script alone.
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True, process_group=0) as script:
        try:
            pid = started(env)
            script.send_signal(number)
            said, _ = script.communicate(timeout=30)
        finally:
            script.kill()
    assert script.returncode == status
    assert "gpu_check: interrupted; everything is stopped\n" in said
    assert not runs(pid)
