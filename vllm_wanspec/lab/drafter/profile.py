"""Where a drafter's two processes spend their time: py-spy's samples, folded into a few groups."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

SAMPLES_PER_S = 100
GRACE_S = 20.0
#: Innermost frames of threads that wait: py-spy takes some of them for running.
WAITING = frozenset(
    {
        "wait (threading.py",
        "_worker (concurrent/futures/thread.py",
        "select (selectors.py",
        "poll (zmq/sugar/poll.py",
        "run (asyncio/runners.py",
        "get (queue.py",
        "accept (socket.py",
    }
)
OTHER = "other"
#: Per process: a group, and what its frames have in them.  The innermost frame that fits decides, and of the groups
#: that fit it the first.
GROUPS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "engine": (
        ("input: receive requests", ("process_input_sockets", "Request.from_engine_core_request")),
        ("output: serialise", ("process_output_sockets", "serial_utils.py")),
        ("log-probabilities", ("gather_logprobs", "compute_logprobs", "LogprobsTensors", "batched_count_greater")),
        ("sampler", ("v1/sample/", "sample_tokens (")),
        ("model forward", ("_model_forward", "model_executor/", "cpu_attn.py", "emulate/pacing.py")),
        ("scheduler", ("v1/core/",)),
        ("prepare inputs", ("gpu_model_runner.py", "gpu_input_batch.py", "block_table.py", "cpu_model_runner.py")),
        ("engine loop", ("v1/engine/", "v1/executor/", "v1/worker/")),
    ),
    "api": (
        ("session: decide", ("vllm_wanspec/core/drafter.py", "vllm_wanspec/core/tree.py", "core/policy/expansion.py")),
        ("our messages", ("vllm_wanspec/core/messages.py",)),
        ("our service", ("vllm_wanspec/drafter/",)),
        ("request start: thread pool", ("ThreadPoolExecutor", "async_utils.py", "make_async")),
        ("request start: checks", ("input_processor.py", "sampling_params.py", "vllm/renderers/", "vllm/inputs/")),
        ("output processor", ("output_processor.py", "engine/logprobs.py", "vllm/logprobs.py", "detokenizer.py")),
        ("engine's statistics", ("v1/metrics/",)),
        ("vLLM's messages", ("serial_utils.py", "msgspec")),
        ("sockets to the engine", ("zmq/", "core_client.py")),
        ("WebSocket and HTTP", ("uvicorn/", "starlette/", "websockets/", "fastapi/", "prometheus_client/")),
        ("request start and stop: engine client", ("async_llm.py",)),
        ("event loop", ("asyncio/", "uvloop/")),
    ),
}


def find_py_spy() -> str | None:
    """The program py-spy beside this Python or on PATH; None where it is not installed."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.is_file() else shutil.which("py-spy")


async def record(program: str, pids: Mapping[str, int], seconds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Sample processes side by side for some seconds.

    Args:
        program: py-spy.
        pids: Process ids by a name that `GROUPS` has.
        seconds: How long.
        folder: Existing folder for the samples.

    Returns:
        Per process the share of each group; a process that may not be sampled is absent.
    """
    paths = {name: folder / f"{name}.folded" for name in pids}
    common = ["record", "--format", "raw", "--duration", str(seconds), "--rate", str(SAMPLES_PER_S), "--output"]
    null = asyncio.subprocess.DEVNULL
    recorders = [
        await asyncio.create_subprocess_exec(
            program, *common, str(paths[name]), "--pid", str(pid), stdin=null, stdout=null, stderr=null
        )
        for name, pid in pids.items()
    ]
    try:
        async with asyncio.timeout(seconds + GRACE_S):
            await asyncio.gather(*(recorder.wait() for recorder in recorders))
    except TimeoutError:
        return {}
    finally:
        for recorder in recorders:
            if recorder.returncode is None:
                recorder.kill()
                await recorder.wait()
    return {
        name: fold(path.read_text("utf-8", "replace").splitlines(), name)
        for name, path in paths.items()
        if path.is_file()
    }


def fold(lines: Iterable[str], process: str) -> dict[str, float]:
    """Shares of samples by group, largest first; threads that wait are left out.

    Args:
        lines: ``frame;frame;… count``, the innermost frame last, each ``function (file:line)``.
        process: A name that `GROUPS` has.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        innermost = frames[-1].rpartition(":")[0] or frames[-1]
        function, _, place = innermost.partition(" ")
        if count.isdigit() and f"{function.rpartition('.')[2]} {place}" not in WAITING:
            counts[_group(frames, process)] += int(count)
    total = sum(counts.values())
    return {name: count / total for name, count in counts.most_common()}


def _group(frames: list[str], process: str) -> str:
    for frame in reversed(frames):
        for name, parts in GROUPS[process]:
            if any(part in frame for part in parts):
                return name
    return OTHER
