"""A played model runner that drives a RemoteProposer through whole steps, as vLLM does."""

import atexit
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toys import VOCAB_SIZE, VOCABULARY, toy, wait_until

from vllm_wanspec.controller import service
from vllm_wanspec.controller.v1 import hooks
from vllm_wanspec.controller.v1.proposer import RemoteProposer
from vllm_wanspec.sim.target import Runner, new_request, scheduled

TOY = toy(seed=6)
MAX_LEN = 6000
K = 4


class Engine:
    """Drives a proposer through whole steps, and verifies what it drafts."""

    def __init__(self, remote: RemoteProposer) -> None:
        self.remote = remote
        self.runner = Runner(8, MAX_LEN)
        self.runner.effective_drafter_max_model_len = 100
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
        drafts = {name: self.drafts[name] for name in self.contexts if self.drafts[name]}
        counts = {name: 1 + len(self.drafts[name]) for name in self.contexts}
        for request in self.new:
            counts[request.req_id] = len(request.prompt_token_ids or ())
        output = scheduled(self.new, set(self.finished), counts, drafts, self.limit)
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
            self.runner.hold(row, context)
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


def stub_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's part: the vocabulary, the rank, and the probes."""
    monkeypatch.setattr(service, "_vocabulary", lambda config: VOCABULARY)
    monkeypatch.setattr(service, "_is_first_rank", lambda: True)
    monkeypatch.setattr(hooks, "install_in_engine", lambda: None)


def vllm_config(
    tmp_path: Path, url: str, *, speculative: int = K, more: str = "", parallel: int = 1
) -> SimpleNamespace:
    path = tmp_path / "wanspec.yaml"
    path.write_text(f'draft_endpoints: [{{name: eu, url: "{url}"}}]\nfallback: []\n{more}', encoding="utf-8")
    return SimpleNamespace(
        additional_config={"wanspec": str(path)},
        speculative_config=SimpleNamespace(num_speculative_tokens=speculative),
        model_config=SimpleNamespace(get_vocab_size=lambda: 80, model="big", max_model_len=MAX_LEN),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=parallel),
    )


@contextmanager
def running(config: SimpleNamespace) -> Iterator[Engine]:
    """An engine whose proposer is connected."""
    remote = RemoteProposer(config)
    assert remote.pool is not None
    pool = remote.pool
    atexit.unregister(pool.stop)
    try:
        wait_until(lambda: pool.links[0].welcome is not None)
        remote.load_model(object())
        yield Engine(remote)
    finally:
        pool.stop()


def pool_of(engine: Engine) -> Any:
    return engine.remote.pool
