"""RemoteProposer with a played model runner, a real pool and a real drafter."""

import atexit
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import LogLines
from toys import VOCAB_SIZE, VOCABULARY, DrafterServer, Toy, draft_model, wait_until

from vllm_wanspec.controller import hooks, proposer
from vllm_wanspec.controller.proposer import RemoteProposer
from vllm_wanspec.core.messages import MAX_COMMIT_TOKENS
from vllm_wanspec.errors import ConfigError

pytestmark = pytest.mark.usefixtures("short_waits")
TOY = Toy(seed=6)
MAX_LEN = 6000
K = 4


def new_request(name: str, prompt: list[int] | None, **changes: Any) -> SimpleNamespace:
    """What the scheduler says of a new request, as far as we look."""
    values = {
        "req_id": name,
        "prompt_token_ids": prompt,
        "mm_features": [],
        "prompt_embeds": None,
        "sampling_params": SimpleNamespace(extra_args=None),
        **changes,
    }
    return SimpleNamespace(**values)


class Runner:
    """A model runner: rows, contexts, and the drafts that the scheduler would take."""

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(req_ids=[])
        self.contexts = np.zeros((8, MAX_LEN), dtype=np.int32)
        self.lengths = np.zeros(8, dtype=np.int32)
        self.effective_drafter_max_model_len = 100
        self._draft_token_ids: Any = None

    def take_draft_token_ids(self) -> Any:
        return self._draft_token_ids


class Engine:
    """Drives a proposer through whole steps, and verifies what it drafts."""

    def __init__(self, remote: RemoteProposer) -> None:
        self.remote = remote
        self.runner = Runner()
        self.contexts: dict[str, list[int]] = {}
        self.prompts: dict[str, int] = {}
        self.drafts: dict[str, list[int]] = {}
        self.accepted: dict[str, int] = {}
        self.finished: list[str] = []
        self.new: list[SimpleNamespace] = []
        self.limit: int | None = None

    def add(self, name: str, prompt: list[int], **changes: Any) -> None:
        self.new.append(new_request(name, prompt, **changes))
        self.contexts[name] = list(prompt)
        self.prompts[name] = len(prompt)
        self.drafts[name] = []
        self.accepted[name] = 0

    def remove(self, name: str) -> None:
        del self.contexts[name]
        self.finished.append(name)

    def step(self, prefill: tuple[str, ...] = ()) -> list[list[int]]:
        output = SimpleNamespace(
            scheduled_new_reqs=self.new, finished_req_ids=set(self.finished), num_spec_tokens_to_schedule=self.limit
        )
        self.new, self.finished = [], []
        self.remote.begin_step(self.runner, output)
        sampled = []
        self.runner.input_batch.req_ids = list(self.contexts)
        for row, (name, context) in enumerate(self.contexts.items()):
            draft = self.drafts[name]
            assert draft == TOY.drafted(context, len(draft))
            tokens = [] if name in prefill else TOY.verify(context, draft)
            self.accepted[name] += max(0, len(tokens) - 1)
            context += tokens
            sampled.append(tokens)
            self.runner.contexts[row, : len(context)] = context
            self.runner.lengths[row] = len(context)
        return self.propose(sampled)

    def propose(self, sampled: list[list[int]]) -> list[list[int]]:
        proposed = self.remote.propose(sampled, self.runner.lengths, self.runner.contexts)
        assert len(proposed) == len(sampled)
        self.runner._draft_token_ids = proposed
        taken = self.runner.take_draft_token_ids()
        assert taken is proposed  # replaced in place
        for draft in taken:
            assert type(draft) is list
            assert len(draft) <= K
            assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in draft)
        self.drafts = dict(zip(self.contexts, taken, strict=True))
        return taken

    def run_until_accepted(self, name: str, count: int) -> None:
        wanted, end, pause = self.accepted[name] + count, time.monotonic() + 20.0, threading.Event()
        while self.accepted[name] < wanted:
            assert time.monotonic() < end, self.accepted
            self.step()
            pause.wait(0.003)
        for key, context in self.contexts.items():
            start = self.prompts[key]
            assert context[start:] == TOY.continuation(context[:start], len(context) - start)


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(TOY, model=draft_model(max_context=MAX_LEN)) as server:
        yield server


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's part: the vocabulary, the rank, and the probes."""
    monkeypatch.setattr(proposer, "_vocabulary", lambda config: VOCABULARY)
    monkeypatch.setattr(proposer, "_is_first_rank", lambda: True)
    monkeypatch.setattr(hooks, "install_in_engine", lambda config: None)


def vllm_config(tmp_path: Path, url: str, *, speculative: int = K, more: str = "") -> SimpleNamespace:
    path = tmp_path / "wanspec.yaml"
    path.write_text(f'draft_endpoints: [{{name: eu, url: "{url}"}}]\n{more}', encoding="utf-8")
    return SimpleNamespace(
        additional_config={"wanspec": str(path)},
        speculative_config=SimpleNamespace(num_speculative_tokens=speculative),
        model_config=SimpleNamespace(get_vocab_size=lambda: 64),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )


@pytest.fixture
def engine(tmp_path: Path, server: DrafterServer, stubs: None) -> Iterator[Engine]:
    remote = RemoteProposer(vllm_config(tmp_path, server.url))
    assert remote.pool is not None
    pool = remote.pool
    atexit.unregister(pool.stop)
    wait_until(lambda: pool.links[0].welcome is not None)
    remote.load_model(object())
    yield Engine(remote)
    pool.stop()


def pool_of(engine: Engine) -> Any:
    return engine.remote.pool


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


def test_opting_out(engine: Engine) -> None:
    engine.add("off", [1, 2], sampling_params=SimpleNamespace(extra_args={"wanspec": "off"}))
    engine.add("on", [3, 4], sampling_params=SimpleNamespace(extra_args={"wanspec": "on", "other": 1}))
    engine.run_until_accepted("on", 20)
    assert engine.accepted["off"] == 0
    assert pool_of(engine).counters.opened_sessions == 1


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


@pytest.mark.parametrize("limit", [0, 1, 2, 99])
def test_vllm_s_dynamic_limit_is_obeyed(engine: Engine, limit: int) -> None:
    engine.add("a", [1, 2, 3])
    engine.run_until_accepted("a", 5)
    engine.limit = limit
    for _ in range(10):
        [draft] = engine.step()
        assert len(draft) <= min(limit, K)
    engine.limit = None
    engine.run_until_accepted("a", 5)


def test_length_max_is_obeyed(tmp_path: Path, server: DrafterServer, stubs: None) -> None:
    remote = RemoteProposer(vllm_config(tmp_path, server.url, speculative=8, more="length: {max: 2}\n"))
    pool = remote.pool
    assert pool is not None
    atexit.unregister(pool.stop)
    try:
        wait_until(lambda: pool.links[0].welcome is not None)
        engine = Engine(remote)
        engine.add("a", [1, 2])
        wait_until(lambda: len(engine.step()[0]) == 2)
        for _ in range(10):
            assert len(engine.step()[0]) <= 2
    finally:
        pool.stop()


def test_lists_that_are_not_those_proposed_are_left_alone(engine: Engine) -> None:
    engine.add("a", [1, 2, 3])
    engine.run_until_accepted("a", 5)
    wait_until(lambda: pool_of(engine)._sessions["a"].core.draft(K))
    before = pool_of(engine).counters.offered_tokens
    other = [[1, 2, 3]]
    engine.remote.redraft(other)
    engine.remote.redraft(None)
    assert other == [[1, 2, 3]]
    assert pool_of(engine).counters.offered_tokens == before


def test_before_the_first_step_there_is_nothing(engine: Engine) -> None:
    assert engine.remote.propose([[1], []], None, None) == [[], []]


@pytest.mark.parametrize("broken", ["begin", "step_begins", "step", "redraft", "length"])
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


def test_other_ranks_do_not_connect(
    tmp_path: Path, server: DrafterServer, stubs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposer, "_is_first_rank", lambda: False)
    remote = RemoteProposer(vllm_config(tmp_path, server.url))
    assert remote.pool is None
    engine = Engine(remote)
    engine.add("a", [1, 2])
    for _ in range(3):
        assert engine.step() == [[]]
    assert server.attempts == 0


def test_a_wrong_configuration_is_said_when_it_is_built(tmp_path: Path, stubs: None) -> None:
    config = vllm_config(tmp_path, "nonsense")
    with pytest.raises(ConfigError, match="must be a base URL"):
        RemoteProposer(config)
    config.additional_config = {"wanspec": str(tmp_path / "absent.yaml")}
    with pytest.raises(ConfigError, match="cannot be read"):
        RemoteProposer(config)


def test_metrics_are_served_where_configured(
    tmp_path: Path, server: DrafterServer, stubs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports: list[int] = []
    monkeypatch.setattr(proposer, "serve_metrics", lambda pool, settings: ports.append(settings.port))
    remote = RemoteProposer(vllm_config(tmp_path, server.url, more="metrics: {port: 9464}\n"))
    assert remote.pool is not None
    pool = remote.pool
    atexit.unregister(pool.stop)
    wait_until(lambda: pool.links[0].welcome is not None)
    pool.stop()
    assert ports == [9464]
