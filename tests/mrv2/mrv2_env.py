"""The environment of processes that run Triton kernels, and vLLM's Model Runner V2, on the CPU.

Triton lies in an overlay, a folder outside the virtual environment, since vLLM does other things where it finds Triton:
only processes with this environment have it.
"""

import os
from pathlib import Path

import vllm_wanspec

OVERLAY = Path(__file__).parents[2] / ".overlay"


def triton_env() -> dict[str, str]:
    """What a process needs for Triton's interpreter, beside this process's environment.

    It imports the same copy of the package as the test that starts it.

    Raises:
        RuntimeError: The overlay has not been installed.
    """
    if not (OVERLAY / "triton").is_dir():
        raise RuntimeError(f"{OVERLAY} has no Triton: run .ci/overlay")
    folders = [str(OVERLAY), str(Path(vllm_wanspec.__file__).parents[1])]
    if os.environ.get("PYTHONPATH"):
        folders.append(os.environ["PYTHONPATH"])
    return {"PYTHONPATH": os.pathsep.join(folders), "TRITON_INTERPRET": "1"}


def mrv2_env(async_scheduling: bool) -> dict[str, str]:
    """What a vLLM process needs to run Model Runner V2 on the CPU, beside `machine.server_env`.

    With it vLLM refuses to start where that runner does not support what it is asked for. Where ``VLLM_PLUGINS`` is set
    it has to name ``interpreted_cpu`` too. For targets: a drafter keeps the environment that it has.

    Args:
        async_scheduling: Whether the CPU's platform leaves asynchronous scheduling as vLLM decided on it.

    Raises:
        RuntimeError: The overlay has not been installed.
    """
    return triton_env() | {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "WANSPEC_TEST_ASYNC": "1" if async_scheduling else "0",
    }
