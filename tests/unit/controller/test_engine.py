"""How many requests wait for the engine core of this process, on a fake."""

import gc
import queue

import pytest

from vllm_wanspec.controller import engine as hooks


class FakeCore:
    """As much of vLLM's engine core as is wrapped."""

    def __init__(self) -> None:
        self.input_queue: queue.Queue[int] = queue.Queue()

    def post_step(self, model_executed: bool) -> str:
        return f"posted {model_executed}"


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> type[FakeCore]:
    kind = type("Core", (FakeCore,), {"post_step": FakeCore.post_step})
    monkeypatch.setattr(hooks, "attribute", lambda module, name: kind)
    monkeypatch.setattr(hooks, "_engine_core", None)
    for _ in range(3):
        hooks.install()
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
    hooks.install()
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
    monkeypatch.setattr(hooks, "attribute", lambda module, name: bare)
    hooks.install()
    assert not hasattr(bare, "post_step")
