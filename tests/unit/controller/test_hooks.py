"""The ledger, the probes, and the wraps: on fakes, and on the installed vLLM (marked `vllm`)."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_wanspec.controller import hooks
from vllm_wanspec.errors import UnsupportedError


def vllm_config(stages: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        speculative_config=SimpleNamespace(model=hooks.PROPOSER),
        additional_config={},
    )


class GoodRunner:
    """As much of a model runner as the probe looks at."""

    def __init__(self) -> None:
        self.effective_drafter_max_model_len = 100
        self._draft_token_ids: Any = None
        self.drafter: Any = None

    def _update_states(self, scheduler_output: object) -> str:
        return f"updated {scheduler_output}"

    def take_draft_token_ids(self) -> object:
        return ("taken", self._draft_token_ids)

    def propose_draft_token_ids(self) -> None: ...


def use_runner(monkeypatch: pytest.MonkeyPatch, runner: type) -> None:
    monkeypatch.setattr(hooks, "_attribute", lambda module, name: runner)


# The ledger


def test_every_entry_says_what_why_how_and_until_when() -> None:
    assert len({wrap.target for wrap in hooks.LEDGER}) == len(hooks.LEDGER)
    for wrap in hooks.LEDGER:
        assert all((wrap.target, wrap.why, wrap.how, wrap.until))


def test_every_wrap_in_the_code_has_an_entry() -> None:
    text = " ".join(wrap.target for wrap in hooks.LEDGER)
    source = Path(hooks.__file__).read_text(encoding="utf-8")
    for name in (
        "_update_states",
        "take_draft_token_ids",
        "effective_drafter_max_model_len",
        "create_engine_config",
        "_expand_kernel_impl",
        "apply_top_k_only",
    ):
        assert name in source
        assert name in text
    assert len(hooks.LEDGER) == 6


# The probe


def test_the_probe_passes_where_everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    use_runner(monkeypatch, GoodRunner)
    hooks.check(vllm_config())


def one_sentence(config: SimpleNamespace, *fragments: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        hooks.check(config)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("name", ["_update_states", "take_draft_token_ids", "propose_draft_token_ids"])
def test_a_runner_that_lacks_a_method(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    use_runner(monkeypatch, type("Runner", (GoodRunner,), {name: None}))
    one_sentence(vllm_config(), f"GPUModelRunner.{name}", "use vLLM")


def test_a_runner_whose_method_takes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner(GoodRunner):
        def _update_states(self, output: object, more: int) -> str:  # type: ignore[override]
            return ""

    use_runner(monkeypatch, Runner)
    one_sentence(vllm_config(), "another GPUModelRunner._update_states", "use vLLM")


def test_a_runner_that_lacks_an_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner(GoodRunner):
        def __init__(self) -> None:
            self.drafter = None

    use_runner(monkeypatch, Runner)
    one_sentence(vllm_config(), "GPUModelRunner.", "use vLLM")


def test_pipeline_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    use_runner(monkeypatch, GoodRunner)
    one_sentence(vllm_config(stages=2), "--pipeline-parallel-size is 2, use 1")


def test_a_vllm_without_the_module() -> None:
    with pytest.raises(UnsupportedError, match=r"has no vllm_wanspec\.nothing\.GPUModelRunner; use vLLM"):
        hooks._attribute("vllm_wanspec.nothing", "GPUModelRunner")
    with pytest.raises(UnsupportedError, match=r"has no vllm_wanspec\.errors\.Nothing; use vLLM"):
        hooks._attribute("vllm_wanspec.errors", "Nothing")


# The wraps


class Proposer:
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def begin_step(self, runner: object, output: object) -> None:
        self.calls.append(("begin", runner, output))

    def redraft(self, drafts: object) -> None:
        self.calls.append(("redraft", drafts))


def test_update_states_tells_the_proposer_first_and_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runner_class = type("Runner", (GoodRunner,), {"_update_states": GoodRunner._update_states})
    use_runner(monkeypatch, runner_class)
    for _ in range(3):
        hooks._wrap_update_states()
    runner = runner_class()
    runner.drafter = Proposer()
    assert runner._update_states("output") == "updated output"
    assert runner.drafter.calls == [("begin", runner, "output")]
    hooks.check(vllm_config())  # the wrap itself passes the probe
    for other in (None, object()):
        runner.drafter = other
        assert runner._update_states("output") == "updated output"
    del runner.drafter
    assert runner._update_states("output") == "updated output"


def test_attach_drafts_again_before_drafts_are_taken() -> None:
    runner, proposer = GoodRunner(), Proposer()
    hooks.attach(runner, proposer)
    drafts = [[1], [2]]
    runner._draft_token_ids = drafts
    assert runner.take_draft_token_ids() == ("taken", drafts)
    assert proposer.calls == [("redraft", drafts)]
    assert runner.effective_drafter_max_model_len == hooks.NO_DRAFTER_LIMIT


class FakeArguments:
    config = vllm_config()

    def create_engine_config(self, usage: str = "") -> object:
        return self.config


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    kind = type("Arguments", (FakeArguments,), {"create_engine_config": FakeArguments.create_engine_config})

    def attribute(module: str, name: str) -> type:
        return kind if name == "EngineArgs" else GoodRunner

    monkeypatch.setattr(hooks, "_attribute", attribute)
    for _ in range(3):
        hooks._wrap_create_engine_config()
    return kind


def wrong_file(path: Path) -> SimpleNamespace:
    path.write_text("tree: {}\n", encoding="utf-8")
    return SimpleNamespace(**{**vars(vllm_config()), "additional_config": {"wanspec": str(path)}})


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
    config = wrong_file(tmp_path / "wanspec.yaml")
    (tmp_path / "wanspec.yaml").write_text("draft_endpoints: [{name: a, url: 'http://h'}]\n", encoding="utf-8")
    arguments.config = config
    assert arguments().create_engine_config(usage="x") is config


@pytest.mark.parametrize(
    "speculative", [None, SimpleNamespace(model="other"), SimpleNamespace(method="ngram"), SimpleNamespace(model=None)]
)
def test_configurations_without_us_are_left_alone(arguments: Any, speculative: object) -> None:
    arguments.config = SimpleNamespace(**{**vars(vllm_config(stages=4)), "speculative_config": speculative})
    assert arguments().create_engine_config() is arguments.config


# The installed vLLM


def pristine(name: str) -> ModuleType:
    """A module of vLLM as installed, whatever has been repaired in this process."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cpu() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the faults are the CPU build's")


@pytest.mark.vllm
def test_the_installed_vllm_passes_the_probe() -> None:
    hooks.check(vllm_config())


@pytest.mark.vllm
def test_every_entry_of_the_ledger_is_there_in_the_installed_vllm() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for wrap in hooks.LEDGER:
        target = wrap.target.split(" ")[0]
        if target.startswith("GPUModelRunner."):
            name = target.split(".")[1]
            assert hasattr(GPUModelRunner, name) or name in inspect.unwrap(GPUModelRunner.__init__).__code__.co_names
            continue
        parts = target.split(".")
        depth = next(n for n in range(len(parts), 0, -1) if _is_module(".".join(parts[:n])))
        owner: Any = importlib.import_module(".".join(parts[:depth]))
        for part in parts[depth:]:
            owner = getattr(owner, part)
        assert callable(owner)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.vllm
@pytest.mark.usefixtures("cpu")
def test_the_repair_of_expand_is_still_needed() -> None:
    """Where this fails, vLLM has mended it: take the repair and its ledger entry out."""
    assert hooks.expand_is_faulty(pristine("vllm.utils.cpu_triton_utils")._expand_kernel_impl)


@pytest.mark.vllm
@pytest.mark.usefixtures("cpu")
def test_the_repair_of_top_k_is_still_needed() -> None:
    """Where this fails, vLLM has mended it: take the repair and its ledger entry out."""
    import torch

    original = pristine("vllm.v1.sample.ops.topk_topp_sampler").apply_top_k_only
    with pytest.raises((IndexError, RuntimeError)):
        original(torch.empty(0, 2), torch.empty(0, dtype=torch.int32))


@pytest.mark.vllm
def test_our_expand_is_right() -> None:
    assert not hooks.expand_is_faulty(hooks._expand)


@pytest.mark.vllm
def test_expand_against_a_loop() -> None:
    import torch

    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.int32, torch.int64, torch.float32):
        for _ in range(20):
            counts = torch.randint(0, 5, (6,), generator=generator)
            values = torch.randint(0, 4, (6,), generator=generator).to(dtype)
            output = torch.full((int(counts.sum()) + 3,), -9).to(dtype)
            hooks._expand(output, values, counts.cumsum(0).to(torch.int32), 0, 1, MAX_NUM_TOKENS=32)
            expected = [
                1 if value == 0 else value
                for value, count in zip(values.tolist(), counts.tolist(), strict=True)
                for _ in range(count)
            ]
            assert output.tolist() == [*expected, -9, -9, -9]


def broken(*args: object, **kwargs: object) -> None:
    raise AttributeError("no such thing")


@pytest.mark.vllm
@pytest.mark.parametrize("expand", [broken, lambda *args, **kwargs: None])
def test_expands_that_fail_or_do_nothing_are_faulty(expand: Callable) -> None:
    assert hooks.expand_is_faulty(expand)


@pytest.mark.vllm
@pytest.mark.usefixtures("cpu")
def test_installing_twice_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    # Set first as installed, so that pytest puts everything back.
    expand = pristine("vllm.utils.cpu_triton_utils")._expand_kernel_impl
    top_k = pristine("vllm.v1.sample.ops.topk_topp_sampler").apply_top_k_only
    monkeypatch.setattr(cpu_triton_utils, "_expand_kernel_impl", expand)
    monkeypatch.setattr(topk_topp_sampler, "apply_top_k_only", top_k)
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config)
    monkeypatch.setattr(GPUModelRunner, "_update_states", GPUModelRunner._update_states)
    hooks.install()
    hooks.install_in_engine(vllm_config())
    first = (
        cpu_triton_utils._expand_kernel_impl,
        topk_topp_sampler.apply_top_k_only,
        EngineArgs.create_engine_config,
        GPUModelRunner._update_states,
    )
    assert first[0] is not expand
    assert not hooks.expand_is_faulty(first[0])
    assert first[1] is not top_k
    empty = torch.empty(0, 2)
    assert first[1](empty, torch.empty(0, dtype=torch.int32)) is empty
    hooks.install()
    hooks.install_in_engine(vllm_config())
    assert not hooks.repair_cpu_expand()
    assert not hooks.repair_empty_top_k()
    assert first == (
        cpu_triton_utils._expand_kernel_impl,
        topk_topp_sampler.apply_top_k_only,
        EngineArgs.create_engine_config,
        GPUModelRunner._update_states,
    )


@pytest.mark.vllm
@pytest.mark.usefixtures("cpu")
def test_top_k_with_rows_is_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler

    original = pristine("vllm.v1.sample.ops.topk_topp_sampler").apply_top_k_only
    monkeypatch.setattr(topk_topp_sampler, "apply_top_k_only", original)
    assert hooks.repair_empty_top_k()
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
    k = torch.tensor([1, 2], dtype=torch.int32)
    wrapped = topk_topp_sampler.apply_top_k_only(logits.clone(), k)
    assert wrapped.tolist() == original(logits.clone(), k).tolist()


def test_the_general_plugin_imports_no_engine_arguments() -> None:
    """A process that makes no configuration does not pay for importing vLLM's arguments."""
    code = (
        "import sys, types\n"
        "from vllm_wanspec.controller import hooks\n"
        "hooks.repair_cpu_expand = lambda: False\n"
        "hooks.install()\n"
        "print('vllm.engine.arg_utils' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
