"""RemoteProposer's contract with vLLM. What requests and the configuration ask of it: test_proposer_settings."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import LogLines
from proposer_engine import MAX_LEN, TOY, Engine, K, new_request, pool_of, running, stub_vllm, vllm_config
from toys import DrafterServer, draft_model, wait_until

from vllm_wanspec.core.messages import MAX_COMMIT_TOKENS

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(TOY, model=draft_model(max_context=MAX_LEN)) as server:
        yield server


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_vllm(monkeypatch)


@pytest.fixture
def engine(tmp_path: Path, server: DrafterServer, stubs: None) -> Iterator[Engine]:
    with running(vllm_config(tmp_path, server.url)) as engine:
        yield engine


def test_drafts_for_a_batch(engine: Engine) -> None:
    engine.add("a", [1, 2, 3])
    engine.add("b", [4])
    engine.run_until_accepted("a", 50)
    engine.run_until_accepted("b", 20)
    assert pool_of(engine).counters.opened_sessions == 2
    assert engine.runner.effective_drafter_max_model_len > 10**6


def test_requests_come_and_go(engine: Engine, server: DrafterServer) -> None:
    for number in range(6):
        engine.add(f"r{number}", [number, number])
        engine.run_until_accepted(f"r{number}", 10)
        if number >= 2:
            engine.remove(f"r{number - 2}")
    for name in list(engine.contexts):
        engine.remove(name)
    engine.step()
    wait_until(lambda: server.sessions == 0)


def test_rows_still_in_prefill_get_no_draft(engine: Engine) -> None:
    engine.add("a", [1, 2, 3])
    engine.add("long", [5] * 100)
    for _ in range(20):
        taken = engine.step(prefill=("long",))
        assert taken[1] == []
    engine.run_until_accepted("long", 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"mm_features": [object()]},
        {"prompt_embeds": object()},
        {"sampling_params": None},
    ],
)
def test_requests_that_no_drafter_can_follow(engine: Engine, changes: dict[str, Any]) -> None:
    engine.add("odd", [1, 2], **changes)
    engine.add("plain", [3, 4])
    engine.run_until_accepted("plain", 10)
    assert engine.accepted["odd"] == 0
    assert pool_of(engine).length("odd") is None


def test_a_prompt_of_embeddings_alone(engine: Engine) -> None:
    engine.new.append(new_request("odd", None, prompt_embeds=object()))
    engine.step()
    assert pool_of(engine).length("odd") is None


def test_an_id_that_returns_in_the_same_step(engine: Engine) -> None:
    engine.add("a", [1, 2, 3])
    engine.run_until_accepted("a", 10)
    engine.remove("a")
    engine.add("a", [7, 7])
    engine.run_until_accepted("a", 10)
    assert pool_of(engine).counters.opened_sessions == 2


def test_a_context_that_does_not_fit_begins_anew(engine: Engine) -> None:
    engine.add("a", [1, 2, 3])
    engine.run_until_accepted("a", 10)
    opened = pool_of(engine).counters.opened_sessions
    engine.contexts["a"] = [1, 2, 3, 9]  # the scheduler went back, for whatever reason
    engine.drafts["a"] = []
    engine.step()
    assert pool_of(engine).length("a") == len(engine.contexts["a"])
    assert pool_of(engine).counters.opened_sessions == opened + 1
    engine.contexts["a"] = engine.contexts["a"][:3]
    engine.drafts["a"] = []
    engine.prompts["a"] = 3
    engine.run_until_accepted("a", 10)


def test_tokens_that_were_missed_are_made_up_for(engine: Engine) -> None:
    engine.add("a", [1, 2, 3])
    engine.run_until_accepted("a", 5)
    engine.contexts["a"] += TOY.continuation(engine.contexts["a"], 7)  # steps of which the proposer was not told
    engine.drafts["a"] = []
    engine.run_until_accepted("a", 10)
    assert pool_of(engine).counters.opened_sessions == 1


def test_more_tokens_than_one_commit_may_carry(engine: Engine) -> None:
    engine.add("a", [1, 2, 3])
    engine.run_until_accepted("a", 5)
    engine.contexts["a"] += [1] * (MAX_COMMIT_TOKENS + 1)
    engine.prompts["a"] = len(engine.contexts["a"])
    engine.drafts["a"] = []
    engine.run_until_accepted("a", 5)
    assert pool_of(engine).links[0].welcome is not None
    assert pool_of(engine).counters.opened_sessions == 2


def test_lists_that_are_not_those_proposed_are_left_alone(engine: Engine) -> None:
    engine.add("a", [1, 2, 3])
    engine.run_until_accepted("a", 5)
    wait_until(lambda: pool_of(engine)._sessions["a"].core.tree.best_path(K))
    before = pool_of(engine).counters.offered_tokens
    other = [[1, 2, 3]]
    engine.remote.draft(other)
    engine.remote.draft(None)
    assert other == [[1, 2, 3]]
    assert pool_of(engine).counters.offered_tokens == before


def test_before_the_first_step_there_is_nothing(engine: Engine) -> None:
    assert engine.remote.propose([[1], []], None, None) == [[], []]


@pytest.mark.parametrize("broken", ["begin", "step_begins", "step", "draft", "known"])
def test_a_fault_of_ours_ends_drafting_not_the_engine(
    engine: Engine, log: LogLines, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    engine.add("a", [1, 2, 3])
    engine.run_until_accepted("a", 5)

    def fail(*args: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(pool_of(engine), broken, fail)
    engine.add("b", [4])
    for _ in range(5):
        taken = engine.step()
        assert taken == [[], []]
    errors = [r for r in log.records if r.name == "vllm.wanspec.proposer"]
    assert len(errors) == 1
    assert errors[0].exc_info is not None
    assert "requests are served on" in errors[0].getMessage()


@pytest.mark.parametrize("nonsense", [None, SimpleNamespace()])
def test_a_scheduler_output_that_is_not_understood(engine: Engine, log: LogLines, nonsense: object) -> None:
    engine.remote.begin_step(engine.runner, nonsense)
    assert engine.remote.propose([[1], [2]], None, None) == [[], []]
    assert len([r for r in log.records if r.exc_info]) == 1
