"""The V1 model runner's probe and wraps, on fakes; on the installed vLLM: test_hooks_vllm."""

from typing import Any

import pytest

from vllm_wanspec.controller import engine
from vllm_wanspec.controller.v1 import hooks
from vllm_wanspec.errors import UnsupportedError


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
    monkeypatch.setattr(hooks, "attribute", lambda module, name: runner)
    monkeypatch.setattr(engine, "install", lambda: None)
    monkeypatch.setattr(hooks, "repair_empty_top_k", lambda: False)


# The probe


def test_the_probe_passes_where_everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    use_runner(monkeypatch, GoodRunner)
    hooks.check()


def one_sentence(*fragments: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        hooks.check()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("name", ["_update_states", "take_draft_token_ids", "propose_draft_token_ids"])
def test_a_runner_that_lacks_a_method(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    use_runner(monkeypatch, type("GPUModelRunner", (GoodRunner,), {name: None}))
    one_sentence(f"GPUModelRunner.{name}", "use vLLM")


def test_a_runner_whose_method_takes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class GPUModelRunner(GoodRunner):
        def _update_states(self, output: object, more: int) -> str:  # type: ignore[override]
            return ""

    use_runner(monkeypatch, GPUModelRunner)
    one_sentence("another GPUModelRunner._update_states", "use vLLM")


def test_a_runner_that_lacks_an_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    class GPUModelRunner(GoodRunner):
        def __init__(self) -> None:
            self.drafter = None

    use_runner(monkeypatch, GPUModelRunner)
    one_sentence("GPUModelRunner.", "use vLLM")


# The wraps


class Proposer:
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def begin_step(self, runner: object, output: object) -> None:
        self.calls.append(("begin", runner, output))

    def draft(self, drafts: object) -> None:
        self.calls.append(("draft", drafts))


def test_update_states_tells_the_proposer_first_and_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runner_class = type("GPUModelRunner", (GoodRunner,), {"_update_states": GoodRunner._update_states})
    use_runner(monkeypatch, runner_class)
    for _ in range(3):
        hooks.install_in_engine()
    runner = runner_class()
    runner.drafter = Proposer()
    assert runner._update_states("output") == "updated output"
    assert runner.drafter.calls == [("begin", runner, "output")]
    hooks.check()  # the wrap itself passes the probe
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
