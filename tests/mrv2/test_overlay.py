"""The overlay does what it is for: vLLM takes Model Runner V2 on a CPU, with and without asynchronous scheduling."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mrv2_env import OVERLAY, mrv2_env, triton_env

from vllm_wanspec.lab.harness import machine

MODEL = Path(__file__).parents[2] / "examples" / "demo_models" / "target"
DEADLINE_S = 110
CONFIGS = f"""
import json, os, torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.sample.ops import topk_topp_sampler as sampler
found = {{}}
for setting in ("1", "0"):
    os.environ["WANSPEC_TEST_ASYNC"] = setting
    config = EngineArgs(model={str(MODEL)!r}, dtype="float32", max_model_len=256).create_engine_config()
    found[setting] = [config.use_v2_model_runner, config.scheduler_config.async_scheduling]
logits = torch.randn(3, 50)
k, p = torch.tensor([5, 50, 9], dtype=torch.int32), torch.tensor([0.9, 0.3, 1.0])
masked = sampler.apply_top_k_top_p(logits.clone(), k, p)
found["masked alike"] = torch.equal(masked, sampler.apply_top_k_top_p_pytorch(logits.clone(), k, p))
found["left"] = (masked > float("-inf")).sum(dim=1).tolist()
print(json.dumps(found))
"""
TEXTS = f"""
import json
from vllm import LLM, SamplingParams
llm = LLM({str(MODEL)!r}, dtype="float32", max_model_len=256, enforce_eager=True, distributed_executor_backend="uni")
greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
drawn = SamplingParams(temperature=1, top_p=0.9, top_k=20, seed=1, max_tokens=6, ignore_eos=True)
[first] = llm.generate(["import os\\n"], greedy)
[second] = llm.generate(["import os\\n"], drawn)
runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
print(json.dumps([type(runner).__module__, first.outputs[0].token_ids, len(second.outputs[0].token_ids)]))
"""


def python(code: str, env: dict[str, str]) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=machine.server_env() | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_environment_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    env = mrv2_env(async_scheduling=True)
    first, second, last = env["PYTHONPATH"].split(os.pathsep)
    assert (first, last) == (str(OVERLAY), "/elsewhere")
    assert (Path(second) / "vllm_wanspec" / "plugin.py").is_file()
    assert env["WANSPEC_TEST_ASYNC"] == "1"
    assert mrv2_env(async_scheduling=False) == env | {"WANSPEC_TEST_ASYNC": "0"}
    assert set(triton_env()) == {"PYTHONPATH", "TRITON_INTERPRET"}


def test_this_process_has_no_triton() -> None:
    """Where it had, other tests would run another vLLM."""
    assert machine.has_gpu() or str(OVERLAY) not in sys.path


@pytest.mark.vllm
def test_vllm_takes_its_second_runner_and_keeps_asynchronous_scheduling() -> None:
    env = mrv2_env(async_scheduling=True)
    del env["VLLM_USE_V2_MODEL_RUNNER"]  # it takes it by itself
    found = python(CONFIGS, env)
    assert found == {"1": [True, True], "0": [True, False], "masked alike": True, "left": found["left"]}
    assert 0 < max(found["left"]) < 50


@pytest.mark.vllm
@pytest.mark.slow
def test_both_runners_write_the_same_text() -> None:
    module, tokens, count = python(TEXTS, mrv2_env(async_scheduling=True))
    plain_module, plain_tokens, plain_count = python(TEXTS, {"VLLM_USE_V2_MODEL_RUNNER": "0"})
    assert (module, plain_module) == ("vllm.v1.worker.cpu.model_runner", "vllm.v1.worker.cpu_model_runner")
    assert tokens == plain_tokens
    assert count == plain_count == 6
