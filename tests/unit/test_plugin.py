"""What a vLLM process gets to import by our plugin: nothing that emulates or measures, unless it is told to."""

import os
import subprocess
import sys

import pytest

from vllm_wanspec import plugin
from vllm_wanspec.emulate import pacing

PRODUCTION = """
import sys
from types import ModuleType
for name in ("vllm", "torch", "transformers"):
    sys.modules[name] = None  # makes every import of it fail
runner = ModuleType("vllm.v1.worker.gpu_model_runner")
runner.GPUModelRunner = type("GPUModelRunner", (), {"_model_forward": lambda self: None})
proposer = ModuleType("vllm.v1.spec_decode.draft_model")
proposer.DraftModelProposer = type("DraftModelProposer", (), {"load_model": lambda self, target: None})
sys.modules |= {runner.__name__: runner, proposer.__name__: proposer}

import vllm_wanspec.plugin, vllm_wanspec.drafter.gate
from vllm_wanspec import RemoteProposer
from vllm_wanspec.controller import front
front.repair_cpu_expand = lambda: False  # needs vLLM
vllm_wanspec.plugin.register()
rooms = {"emulate", "sim", "lab", "trace", "cli"}
print(sorted(name for name in sys.modules if name.startswith("vllm_wanspec.") and name.split(".")[1] in rooms))
print(hasattr(runner.GPUModelRunner._model_forward, "wanspec_pacer"))
print(hasattr(proposer.DraftModelProposer.load_model, "wanspec_pacer"))
"""
EMULATE = "['vllm_wanspec.emulate', 'vllm_wanspec.emulate.pacing']"


def registered(**variables: str) -> list[str]:
    """What a fresh process prints that has registered the plugin."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANSPEC_")}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTION],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("variables", [{}, {"WANSPEC_PACING": "", "WANSPEC_PACING_STATS": "/nowhere"}])
def test_a_process_that_emulates_nothing_imports_nothing_for_it(variables: dict[str, str]) -> None:
    assert registered(**variables) == ["[]", "False", "False"]


@pytest.mark.parametrize(("name", "paced"), [("WANSPEC_PACING", "True"), ("WANSPEC_DRAFT_PACING", "False")])
def test_pacing_is_imported_where_one_of_its_variables_is_set(name: str, paced: str) -> None:
    assert registered(**{name: "5+0.1"}) == [EMULATE, paced, paced]  # that of the draft model needs the other one too


def test_the_plugin_looks_for_the_variables_that_pacing_reads() -> None:
    assert plugin.PACING_VARIABLES == (pacing.PACING_ENV, pacing.DRAFT_PACING_ENV)
