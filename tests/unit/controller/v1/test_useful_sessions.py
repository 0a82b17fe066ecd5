"""Sessions are open only while their drafts can be used: neither for one token, nor past a draft model's context."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LogLines
from proposer_engine import MAX_LEN, TOY, Engine, pool_of, running, stub_vllm, vllm_config
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, draft_model, wait_until

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.core.events import Record

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(TOY, model=draft_model(max_context=MAX_LEN)) as server:
        yield server


@contextmanager
def engine_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *servers: DrafterServer, max_model_len: int = MAX_LEN
) -> Iterator[Engine]:
    stub_vllm(monkeypatch)
    config = vllm_config(tmp_path, servers[0].url)
    endpoints = ", ".join(f'{{name: "d{index}", url: "{server.url}"}}' for index, server in enumerate(servers))
    (tmp_path / "wanspec.yaml").write_text(f"draft_endpoints: [{endpoints}]\nfallback: []\n", encoding="utf-8")
    config.model_config.max_model_len = max_model_len
    with running(config) as engine:
        links = pool_of(engine).links
        wait_until(lambda: all(link.welcome is not None for link in links))
        yield engine


def up_to(max_tokens: int | None) -> dict[str, SimpleNamespace]:
    """A request for so many tokens."""
    return {"sampling_params": SimpleNamespace(extra_args=None, max_tokens=max_tokens)}


# Nothing left to draft


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "max_model_len"),
    [
        (900, 1, MAX_LEN),  # scoring, echo with log-probabilities, a choice of one token, a beam
        (900, 0, MAX_LEN),
        (900, 2, MAX_LEN),  # the prefill gives the first, and the step after it the second, with drafts or without
        (99, None, 100),  # a prompt that leaves room for one token
        (98, 50, 100),
    ],
)
def test_no_session_is_opened_where_no_draft_can_be_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: DrafterServer,
    prompt: int,
    max_tokens: int | None,
    max_model_len: int,
) -> None:
    with engine_with(tmp_path, monkeypatch, server, max_model_len=max_model_len) as engine:
        for number in range(40):
            engine.new.append(_scored(f"s{number}", [number] * prompt, max_tokens))
        engine.step()
        engine.add("other", [1, 2, 3])
        engine.run_until_accepted("other", 5)
        assert pool_of(engine).counters.opened_sessions == 1
        assert server.sessions == 1


def _scored(name: str, prompt: list[int], max_tokens: int | None) -> SimpleNamespace:
    return SimpleNamespace(
        req_id=name, prompt_token_ids=prompt, mm_features=[], prompt_embeds=None, **up_to(max_tokens)
    )


def test_requests_that_are_pooled_have_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: DrafterServer
) -> None:
    with engine_with(tmp_path, monkeypatch, server) as engine:
        engine.add("pooled", [1, 2, 3], sampling_params=None)
        engine.step()
        assert pool_of(engine).counters.opened_sessions == 0


@pytest.mark.parametrize(("prompt", "max_tokens", "max_model_len"), [(5, 3, MAX_LEN), (97, 50, 100), (5, None, 100)])
def test_a_session_is_opened_for_one_token_that_can_be_drafted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: DrafterServer,
    prompt: int,
    max_tokens: int | None,
    max_model_len: int,
) -> None:
    with engine_with(tmp_path, monkeypatch, server, max_model_len=max_model_len) as engine:
        engine.new.append(_scored("a", [1] * prompt, max_tokens))
        engine.step()
        assert pool_of(engine).counters.opened_sessions == 1


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(12, MAX_LEN), (None, 15), (500, 15)])
def test_a_session_ends_with_the_last_token_that_could_be_drafted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: DrafterServer,
    max_tokens: int | None,
    max_model_len: int,
) -> None:
    with engine_with(tmp_path, monkeypatch, server, max_model_len=max_model_len) as engine:
        engine.add("a", [1, 2, 3], **up_to(max_tokens))
        engine.step()
        wait_until(lambda: server.sessions == 1)
        while len(engine.contexts["a"]) < 14:  # of 15: the next step gives the last one
            assert pool_of(engine).counters.opened_sessions <= 1
            engine.step()
        wait_until(lambda: server.sessions == 0)
        assert engine.step() == [[]]
        assert pool_of(engine).counters.opened_sessions == 1


def test_the_event_log_tells_it_from_a_lost_link(server: DrafterServer) -> None:
    records: list[Record] = []
    settings = Settings.model_validate({"draft_endpoints": [{"name": "eu", "url": server.url}]})
    pool = DraftPool(
        settings, fingerprint=FINGERPRINT, vocab_size=VOCAB_SIZE, speculation_length=4, sink=records.append
    )
    pool.start()
    try:
        wait_until(lambda: pool.links[0].welcome is not None)
        pool.begin([], [("a", [1, 2, 3])], ends=[6])
        for token in (1, 2):  # at a length of 5 the next step gives the last token
            pool.step([("a", [token])])
        pool.begin(["a"], [])
    finally:
        pool.stop()
    calls = [record["call"] for record in records if record["call"] != "receive"]
    assert calls == ["begin", "link", "open", "commit", "commit", "leave", "link_lost", "close"]


def test_a_drafter_that_comes_back_is_not_asked_for_what_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: DrafterServer
) -> None:
    with engine_with(tmp_path, monkeypatch, server) as engine:
        engine.add("a", [1, 2, 3], **up_to(12))
        server.stop()
        wait_until(lambda: pool_of(engine).links[0].welcome is None)
        while len(engine.contexts["a"]) < 14:
            engine.step()
        opened = pool_of(engine).counters.opened_sessions
        server.start()
        wait_until(lambda: pool_of(engine).links[0].welcome is not None)
        engine.step()
        assert pool_of(engine).counters.opened_sessions == opened
        assert server.sessions == 0


# A draft model with a shorter context


def test_a_session_past_the_draft_model_s_context_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        DrafterServer(TOY, model=draft_model(max_context=31)) as small,
        engine_with(tmp_path, monkeypatch, small, max_model_len=4000) as engine,
    ):
        engine.add("a", [1, 2, 3])
        engine.step()
        wait_until(lambda: small.sessions == 1)
        while len(engine.contexts["a"]) <= 31:
            engine.step()
        wait_until(lambda: small.sessions == 0)
        sent = pool_of(engine).links[0].sent_bytes
        for _ in range(200):
            engine.step()
        assert pool_of(engine).counters.opened_sessions == 1
        assert pool_of(engine).links[0].sent_bytes - sent < 200  # pings, no commits
        engine.remove("a")
        engine.step()


def test_it_goes_on_at_a_drafter_with_a_longer_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        DrafterServer(TOY, model=draft_model(max_context=31)) as small,
        DrafterServer(TOY, model=draft_model(max_context=MAX_LEN)) as large,
        engine_with(tmp_path, monkeypatch, small, large) as engine,
    ):
        small_link = pool_of(engine).links[0]
        monkeypatch.setattr(small_link._rtt_s, "get", lambda default: 0.0)  # the nearest
        engine.add("a", [1, 2, 3])
        while len(engine.contexts["a"]) <= 31:
            engine.step()
        wait_until(lambda: small.sessions == 0 and large.sessions == 1)
        engine.run_until_accepted("a", 10)
        assert pool_of(engine).counters.opened_sessions == 2


def test_a_shorter_context_is_told_once_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: LogLines
) -> None:
    with (
        DrafterServer(TOY, model=draft_model(max_context=31)) as small,
        DrafterServer(TOY, model=draft_model(max_context=3999)) as large,
        engine_with(tmp_path, monkeypatch, small, large, max_model_len=4000) as engine,
    ):
        [line] = log.warnings()
        assert "drafter d0" in line
        assert " 31 " in line
        assert " 4000" in line
        small.stop()
        wait_until(lambda: pool_of(engine).links[0].welcome is None)
        small.start()
        wait_until(lambda: pool_of(engine).links[0].welcome is not None)
        assert sum("context" in line for line in log.warnings()) == 1
