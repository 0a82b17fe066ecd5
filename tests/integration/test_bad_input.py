"""What is wrong on this side ends the command with status 2 and one clear line."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from mrv2_env import mrv2_env

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.servers import wanspec_command

from .fleet import flags, vllm_command
from .programs import Ended, Program

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

GOOD = "draft_endpoints: [{name: nobody, url: 'http://127.0.0.1:9'}]\n"
FILES = {
    "good.yaml": GOOD,
    "wrong-key.yaml": GOOD + "tree: {max_branch: 4}\n",
    "missing-key.yaml": "draft_endpoints: [{name: nobody}]\n",
    "wrong-value.yaml": GOOD + "length: {max: 1000}\n",
    "not-yaml.yaml": "draft_endpoints: [\n",
}
PROPOSER = {"method": "custom_class", "model": "vllm_wanspec.RemoteProposer", "num_speculative_tokens": 4}
PIPELINE = ("--pipeline-parallel-size", "2", "--distributed-executor-backend", "mp")
ENDS_S = 200.0
#: An unsupported vLLM, for want of one: a method that we wrap is not there.
OTHER_VLLM = """
import os
from importlib import import_module
from vllm.entrypoints.cli.main import main
runner = "gpu.model_runner" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "gpu_model_runner"
del import_module("vllm.v1.worker." + runner).GPUModelRunner.take_draft_token_ids
main()
"""
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
OVERLAID = mrv2_env(async_scheduling=True)


@dataclass(frozen=True)
class Case:
    """A command that must fail.

    Attributes:
        argv: Builds the command from the models and the folder with the files.
        says: What the line must contain.
        env: More environment variables.
    """

    argv: Callable[[str, Path], list[str]]
    says: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


def short(file: str, *more: str) -> Callable[[str, Path], list[str]]:
    """``wanspec serve``."""
    return lambda model, folder: wanspec_command("serve", model, "--wanspec", str(folder / file), *flags(), *more)


def long(file: str | None, *more: str) -> Callable[[str, Path], list[str]]:
    """``vllm serve`` with our configuration spelled out."""

    def argv(model: str, folder: Path) -> list[str]:
        command = vllm_command("serve", model, "--speculative-config", json.dumps(PROPOSER), *flags(), *more)
        config = [] if file is None else ["--additional-config", json.dumps({"wanspec": str(folder / file)})]
        return [*command, *config]

    return argv


def drafter(*more: str) -> Callable[[str, Path], list[str]]:
    """``wanspec drafter``."""
    return lambda model, folder: wanspec_command("drafter", model, *flags(), *more)


def other_vllm(model: str, folder: Path) -> list[str]:
    python, _, _, *rest = long("good.yaml")(model, folder)
    return [python, "-c", OTHER_VLLM, *rest]


CASES = {
    "short, no file": Case(short("none.yaml"), ("none.yaml", "cannot be read")),
    "short, wrong key": Case(short("wrong-key.yaml"), ("wrong-key.yaml", "tree.max_branch", "max_branches")),
    "short, missing key": Case(short("missing-key.yaml"), ("missing-key.yaml", "draft_endpoints.0.url", "missing")),
    "short, wrong value": Case(short("wrong-value.yaml"), ("wrong-value.yaml", "length.max", "1000", "64")),
    "short, not YAML": Case(short("not-yaml.yaml"), ("not-yaml.yaml", "line")),
    "short, our flag": Case(short("good.yaml", "--speculative-config", "{}"), ("--speculative-config", "vllm serve")),
    "long, no file": Case(long(None), ("--additional-config", "WANSPEC_CONFIG")),
    "long, file missing": Case(long("none.yaml"), ("none.yaml", "cannot be read")),
    "long, wrong key": Case(long("wrong-key.yaml"), ("wrong-key.yaml", "tree.max_branch", "max_branches")),
    "long, missing key": Case(long("missing-key.yaml"), ("missing-key.yaml", "draft_endpoints.0.url", "missing")),
    "long, pipeline": Case(long("good.yaml", *PIPELINE), ("--pipeline-parallel-size is 2", "use 1")),
    "long, no tokenizer": Case(long("good.yaml", "--skip-tokenizer-init"), ("drop --skip-tokenizer-init",)),
    "drafter, no tokenizer": Case(drafter("--skip-tokenizer-init"), ("drop --skip-tokenizer-init",)),
    "drafter, open to all": Case(drafter("--host", "0.0.0.0"), ("WANSPEC_TOKEN", "--host 0.0.0.0", "--host 127.0.0.1")),
    "drafter, logits": Case(drafter("--logprobs-mode", "raw_logits"), ("--logprobs-mode raw_logits", "raw_logprobs")),
    "long, no Triton": Case(long("good.yaml"), ("Triton", "unset VLLM_USE_V2_MODEL_RUNNER"), V2),
    "long, pipeline on V2": Case(long("good.yaml", *PIPELINE), ("--pipeline-parallel-size is 2", "use 1"), OVERLAID),
    "long, unsupported vLLM on V2": Case(other_vllm, ("take_draft_token_ids", "use vLLM"), OVERLAID),
    "long, unsupported vLLM": Case(other_vllm, ("take_draft_token_ids", "use vLLM")),
}


@pytest.fixture(scope="module")
def ended(models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All cases, two at a time: most of their time goes into importing vLLM."""
    folder = tmp_path_factory.mktemp("bad-input")
    for name, text in FILES.items():
        (folder / name).write_text(text, "utf-8")

    def run(item: tuple[int, Case]) -> Ended:
        number, case = item
        argv = case.argv(str(models.target), folder)
        return Program(f"case-{number}", argv, machine.server_env() | case.env, folder).end(ENDS_S)

    with ThreadPoolExecutor(2) as threads:
        return dict(zip(CASES, threads.map(run, enumerate(CASES.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_local_faults_end_with_2_and_one_line(ended: dict[str, Ended], name: str) -> None:
    result = ended[name]
    print(f"{result.seconds:.1f} s: {result.stderr}")
    assert result.code == 2, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Traceback" not in result.stderr + result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("wanspec: ")]
    assert len(lines) == 1, lines
    assert all(text in lines[0] for text in CASES[name].says), lines[0]
    assert lines[0].count(".yaml: ") <= 1, "one fault, told once"
    if name.startswith("short"):
        assert result.stderr.splitlines() == lines


def test_what_vllm_refuses_is_left_to_vllm(models: DemoModels, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD, "utf-8")
    argv = short("good.yaml")(str(tmp_path / "no-model"), tmp_path)
    result = Program("no-model", argv, machine.server_env(), tmp_path).end(ENDS_S)
    assert result.code not in (0, 2)
    assert "no-model" in result.stderr + result.stdout
    assert "wanspec: " not in result.stderr
