"""Configurations at the front door, on fakes: what is wrong with one ends the start with one line."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_wanspec.config import PROPOSER
from vllm_wanspec.controller import front
from vllm_wanspec.errors import UnsupportedError


def vllm_config(stages: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages, data_parallel_size=1),
        model_config=SimpleNamespace(skip_tokenizer_init=False),
        speculative_config=SimpleNamespace(model=PROPOSER),
        additional_config={},
    )


class GoodParams:
    """As much of a request's sampling parameters as the probe looks at."""

    def verify(self, speculative_config: object) -> None: ...


def checked(config: Any) -> str:
    """A check of a model runner that passes."""
    return front.V1


class FakeArguments:
    config = vllm_config()

    def create_engine_config(self, usage: str = "") -> object:
        return self.config


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    kind = type("Arguments", (FakeArguments,), {"create_engine_config": FakeArguments.create_engine_config})

    def attribute(module: str, name: str) -> type:
        return {"EngineArgs": kind, "SamplingParams": GoodParams}[name]

    monkeypatch.setattr(front, "attribute", attribute)
    monkeypatch.setattr(front, "repair_cpu_expand", lambda: False)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", ModuleType("arg_utils"))
    for _ in range(3):
        front.install(checked)
    return kind


def wrong_file(path: Path) -> SimpleNamespace:
    path.write_text("tree: {}\n", encoding="utf-8")
    return SimpleNamespace(**{**vars(vllm_config()), "additional_config": {"wanspec": str(path)}})


def right_file(tmp_path: Path) -> SimpleNamespace:
    config = wrong_file(tmp_path / "wanspec.yaml")
    (tmp_path / "wanspec.yaml").write_text("draft_endpoints: [{name: a, url: 'https://h'}]\n", encoding="utf-8")
    return config


def test_a_wrong_configuration_ends_the_start_with_one_line(
    arguments: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.config = wrong_file(tmp_path / "wanspec.yaml")
    with pytest.raises(SystemExit) as caught:
        arguments().create_engine_config(usage="x")
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err == f"wanspec: {tmp_path / 'wanspec.yaml'}: draft_endpoints: is missing\n"


def test_pipeline_parallelism_ends_the_start_with_one_line(arguments: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments.config = vllm_config(stages=4)
    with pytest.raises(SystemExit) as caught:
        arguments().create_engine_config()
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_right_configuration_passes(arguments: Any, tmp_path: Path) -> None:
    config = arguments.config = right_file(tmp_path)
    assert arguments().create_engine_config(usage="x") is config
    assert config.speculative_config.wanspec_runner == front.V1


@pytest.mark.parametrize(
    "speculative", [None, SimpleNamespace(model="other"), SimpleNamespace(method="ngram"), SimpleNamespace(model=None)]
)
def test_configurations_without_us_are_left_alone(arguments: Any, speculative: object) -> None:
    arguments.config = SimpleNamespace(**{**vars(vllm_config(stages=4)), "speculative_config": speculative})
    assert arguments().create_engine_config() is arguments.config


def test_a_model_runner_that_will_not_do_ends_the_start_with_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(config: Any) -> str:
        raise UnsupportedError("vLLM 9 has no such thing; use vLLM 1")

    arguments.create_engine_config = FakeArguments.create_engine_config
    front.install(refuse)
    arguments.config = right_file(tmp_path)
    with pytest.raises(SystemExit) as caught:
        arguments().create_engine_config()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "wanspec: vLLM 9 has no such thing; use vLLM 1\n"


def test_the_general_plugin_imports_no_engine_arguments() -> None:
    """A process that makes no configuration does not pay for importing vLLM's arguments."""
    code = (
        "import sys, types\n"
        "from vllm_wanspec.controller import front\n"
        "front.repair_cpu_expand = lambda: False\n"
        "front.install(lambda config: front.V1)\n"
        "print('vllm.engine.arg_utils' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"


def test_a_target_without_its_tokenizer_ends_the_start_with_one_line(
    arguments: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.config = wrong_file(tmp_path / "wanspec.yaml")
    arguments.config.model_config.skip_tokenizer_init = True
    with pytest.raises(SystemExit) as caught:
        arguments().create_engine_config()
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "--skip-tokenizer-init" in err
    assert err.count("\n") == 1


# Sampling parameters that only Model Runner V2 applies


class SpecParams:
    def __init__(self) -> None:
        self.refused = 0

    def verify(self, speculative_config: object) -> None: ...

    def _validate_spec_decode(self, speculative_config: object) -> None:
        self.refused += 1


@pytest.mark.parametrize(
    ("speculative", "refused"),
    [
        (SimpleNamespace(model=PROPOSER, wanspec_runner=front.MRV2), 0),
        (SimpleNamespace(model=PROPOSER, wanspec_runner=front.V1), 1),
        (SimpleNamespace(model=PROPOSER), 1),
        (SimpleNamespace(model="other", wanspec_runner=front.MRV2), 1),
        (None, 1),
    ],
)
def test_min_p_and_logit_bias_pass_where_the_runner_applies_them(
    monkeypatch: pytest.MonkeyPatch, speculative: object, refused: int
) -> None:
    methods = {"verify": SpecParams.verify, "_validate_spec_decode": SpecParams._validate_spec_decode}
    kind: Any = type("Params", (SpecParams,), methods)
    arguments = type("Arguments", (FakeArguments,), {"create_engine_config": FakeArguments.create_engine_config})
    monkeypatch.setattr(front, "attribute", lambda module, name: arguments if name == "EngineArgs" else kind)
    monkeypatch.setattr(front, "repair_cpu_expand", lambda: False)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", ModuleType("arg_utils"))
    front.install(checked)
    params = kind()
    params._validate_spec_decode(speculative)
    assert params.refused == refused
