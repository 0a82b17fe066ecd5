"""The ledger, the probes, and the wraps, on fakes; on the installed vLLM: test_hooks_vllm."""

import gc
import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_wanspec.controller.v1 import hooks
from vllm_wanspec.errors import UnsupportedError


def vllm_config(stages: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages, data_parallel_size=1),
        model_config=SimpleNamespace(skip_tokenizer_init=False),
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


class GoodParams:
    """As much of a request's sampling parameters as the probe looks at."""

    def verify(self, speculative_config: object) -> None: ...


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
        "post_step",
        "SamplingParams.verify",
    ):
        assert name in source
        assert name in text
    assert len(hooks.LEDGER) == 8


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

    def draft(self, drafts: object) -> None:
        self.calls.append(("draft", drafts))


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


def test_attach_drafts_before_drafts_are_taken() -> None:
    runner, proposer = GoodRunner(), Proposer()
    hooks.attach(runner, proposer)
    drafts = [[1], [2]]
    runner._draft_token_ids = drafts
    assert runner.take_draft_token_ids() == ("taken", drafts)
    assert proposer.calls == [("draft", drafts)]
    assert runner.effective_drafter_max_model_len == hooks.NO_DRAFTER_LIMIT


class FakeArguments:
    config = vllm_config()

    def create_engine_config(self, usage: str = "") -> object:
        return self.config


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    kind = type("Arguments", (FakeArguments,), {"create_engine_config": FakeArguments.create_engine_config})

    def attribute(module: str, name: str) -> type:
        return {"EngineArgs": kind, "SamplingParams": GoodParams}.get(name, GoodRunner)

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


# How many requests wait for the engine


class FakeCore:
    """As much of vLLM's engine core as is wrapped."""

    def __init__(self) -> None:
        self.input_queue: queue.Queue[int] = queue.Queue()

    def post_step(self, model_executed: bool) -> str:
        return f"posted {model_executed}"


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> type[FakeCore]:
    kind = type("Core", (FakeCore,), {"post_step": FakeCore.post_step})
    monkeypatch.setattr(hooks, "_attribute", lambda module, name: kind)
    monkeypatch.setattr(hooks, "_engine_core", None)
    for _ in range(3):
        hooks._wrap_post_step()
    return kind


def test_the_queue_is_that_of_the_core_that_steps_here(core: type[FakeCore]) -> None:
    assert hooks.queued_requests() is None
    engine, other = core(), core()
    engine.input_queue.put(1)
    assert hooks.queued_requests() is None  # it has not stepped yet
    assert engine.post_step(True) == "posted True"
    assert engine.post_step(model_executed=False) == "posted False"
    assert hooks.queued_requests() == 1
    engine.input_queue.put(2)
    assert hooks.queued_requests() == 2
    other.post_step(True)
    assert hooks.queued_requests() == 0
    engine.post_step(True)
    assert hooks.queued_requests() == 2
    engine.input_queue.get()
    assert hooks.queued_requests() == 1


def test_the_wrap_keeps_no_engine_alive(core: type[FakeCore]) -> None:
    engine = core()
    engine.input_queue.put(1)
    engine.post_step(True)
    del engine
    gc.collect()
    assert hooks.queued_requests() is None


def test_a_core_is_wrapped_once(core: type[FakeCore]) -> None:
    wrapped = core.post_step
    hooks._wrap_post_step()
    assert core.post_step is wrapped
    assert wrapped.__wrapped__ is FakeCore.post_step  # type: ignore[attr-defined]


def test_a_core_without_the_method_or_the_queue_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, core: type[FakeCore]
) -> None:
    engine = core()
    del engine.input_queue
    engine.post_step(True)
    assert hooks.queued_requests() is None
    bare = type("Bare", (), {})
    monkeypatch.setattr(hooks, "_attribute", lambda module, name: bare)
    hooks._wrap_post_step()
    assert not hasattr(bare, "post_step")


def test_the_general_plugin_imports_no_engine_arguments() -> None:
    """A process that makes no configuration does not pay for importing vLLM's arguments."""
    code = (
        "import sys, types\n"
        "from vllm_wanspec.controller.v1 import hooks\n"
        "hooks.repair_cpu_expand = lambda: False\n"
        "hooks.install()\n"
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
