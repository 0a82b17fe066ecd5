"""What this machine is, and the vLLM settings that small machines need.

vLLM on a laptop or a two-core container needs flags that a GPU server must not have; they are
gathered here so that demo, benches and tests start their servers alike.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MAX_MODEL_LEN = 1024
NVIDIA_SMI_TIMEOUT_S = 10.0
#: Settings of the caller's shell that would change what a started server is.
FOREIGN_ENV = (
    "VLLM_PLUGINS",
    "WANSPEC_CONFIG",
    "WANSPEC_TOKEN",
    "WANSPEC_TOKEN_FILE",
    "WANSPEC_OTHER_ROUTES",
    "WANSPEC_PACING",
    "WANSPEC_DRAFT_PACING",
    "WANSPEC_PACING_STATS",
    "WANSPEC_LAB_COLOCATED",
)


def checkout() -> Path:
    """Return the folder that this package lies in: the checkout, or where packages are installed."""
    return Path(__file__).resolve().parents[3]


def portable(text: str, *folders: Path) -> str:
    """Return a text of a result file without the way to the checkout, and to further folders, on this machine."""
    for folder in (checkout(), *folders):
        text = text.replace(f"{folder}/", "")
    return text


@functools.cache
def gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that ``nvidia-smi`` lists; never takes longer than 10 s."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if listed.returncode:
        return ()
    return tuple(re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", listed.stdout, re.MULTILINE))


def has_gpu() -> bool:
    """Whether there is a GPU."""
    return bool(gpus())


def cores() -> list[int]:
    """Return the CPU numbers that this process may use, rising."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin_cores(gpu: bool | None = None) -> tuple[int | None, int | None]:
    """Return the CPU numbers (target's, drafter's); None where nothing is pinned.

    Two servers that share a core disturb each other's steps, so a Linux machine without a GPU and
    with two cores or more gives each side its own.
    """
    available = cores()
    if (has_gpu() if gpu is None else gpu) or sys.platform != "linux" or len(available) < 2:
        return None, None
    return available[0], available[1]


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Keep this thread's work on one core, off that of what is measured; nothing where cores are not pinned."""
    if core is None or sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def server_flags() -> list[str]:
    """Return the ``vllm serve`` flags for a small model in float32 on this machine."""
    common = ["--max-model-len", str(MAX_MODEL_LEN), "--dtype", "float32"]
    if has_gpu():
        # Three servers share the GPU; vLLM's default share of 0.92 leaves no room for the second.
        return [*common, "--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", "1G"]
    return [*common, "--distributed-executor-backend", "uni", "--enforce-eager", "--block-size", "32"]


def server_env(core: int | None = None) -> dict[str, str]:
    """Return the whole environment of a server: this process's, without foreign settings, with ours.

    ``core`` is the CPU number that it is pinned to; None pins nothing.
    """
    env = {name: value for name, value in os.environ.items() if name not in FOREIGN_ENV}
    env |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if has_gpu():
        # Wrapped forwards exist in the V1 runner alone; vLLM picks it by itself where drafts come from a class.
        return env | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if core is not None:
        env["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    return env


def missing_vllm() -> str | None:
    """Return what is wrong with the installed vLLM in one line, or None when its servers can start."""
    if importlib.util.find_spec("vllm") is None:
        advice = 'run `make demo` in the checkout, or `pip install "vllm-wanspec[vllm]"` on a GPU machine'
        return f"vLLM is not installed: {advice}"
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "vLLM has no distribution named vllm (vllm-cpu needs the metadata shim): run `make demo` in the checkout"
    return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a measurement depends on."""
    found = {"python": platform.python_version()}
    for name in ("vllm-wanspec", "vllm", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe() -> str:
    """Return processor, usable cores, memory and system in one line."""
    kind = _cpu_model() or platform.machine()
    gpu = "".join(f", {count} × {name}" for name, count in Counter(gpus()).items())
    return f"{kind}, {len(cores())} cores{_memory()}{gpu}, {platform.system()} {platform.release()}"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return platform.processor()
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), "")


def _memory() -> str:
    try:
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return ""
    return f", {gib:.0f} GiB"
