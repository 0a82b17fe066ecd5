"""A drafter with another vocabulary: the tokens that differ are named, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import LogLines
from proposer_engine import MAX_LEN, TOY, pool_of, running, stub_vllm, vllm_config
from toys import VOCAB_SIZE, VOCABULARY, DrafterServer, draft_model, toy, wait_until

from vllm_wanspec.controller import service
from vllm_wanspec.controller.v1.proposer import RemoteProposer
from vllm_wanspec.core.messages import vocabulary_fingerprint
from vllm_wanspec.core.vocabulary import Tokens
from vllm_wanspec.drafter.host import DraftModel

pytestmark = pytest.mark.usefixtures("short_waits")

LARGE = {f"t{index}": index for index in range(5000)}


def model_of(vocabulary: dict[str, int]) -> DraftModel:
    tokens = Tokens.of(vocabulary).by_id
    return draft_model(
        fingerprint=vocabulary_fingerprint(vocabulary),
        vocab_size=len(vocabulary),
        tokens=tokens,
        max_context=MAX_LEN,
    )


@contextmanager
def refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: LogLines,
    ours: dict[str, int],
    theirs: dict[str, int],
    more: str = "",
) -> Iterator[str]:
    """The line that says so."""
    stub_vllm(monkeypatch)
    monkeypatch.setattr(service, "_vocabulary", lambda config: ours)
    with DrafterServer(toy(), model=model_of(theirs)) as server:
        remote = RemoteProposer(vllm_config(tmp_path, server.url, more=more))
        assert remote.pool is not None
        try:
            wait_until(log.warnings)
            [line] = log.warnings()
            yield line
        finally:
            remote.pool.stop()


def renamed(vocabulary: dict[str, int], *ids: int, to: str = "<other{}>") -> dict[str, int]:
    return {to.format(index) if index in ids else token: index for token, index in vocabulary.items()}


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (VOCABULARY, renamed(VOCABULARY, 7), ("7: 't7' here, '<other7>' there",)),
        (LARGE, renamed(LARGE, 4711), ("4711: 't4711' here, '<other4711>' there",)),
        (LARGE, renamed(LARGE, 0, 4999), ("0: 't0' here, '<other0>' there",)),
        (VOCABULARY, VOCABULARY | {"<more>": VOCAB_SIZE}, (f"{VOCAB_SIZE}: nothing here, '<more>' there",)),
        (VOCABULARY | {"<more>": VOCAB_SIZE}, VOCABULARY, (f"{VOCAB_SIZE}: '<more>' here, nothing there",)),
        (VOCABULARY, renamed(VOCABULARY, 3, to="\x1b[2J\nevil"), (r"3: 't3' here, '\x1b[2J\nevil' there",)),
    ],
    ids=range(6),
)
def test_the_first_tokens_that_differ_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: LogLines,
    ours: dict[str, int],
    theirs: dict[str, int],
    says: tuple[str, ...],
) -> None:
    with refused(tmp_path, monkeypatch, log, ours, theirs) as line:
        assert all(text in line for text in says), line
        assert "target's tokenizer" in line
        assert "\n" not in line
        assert "\x1b" not in line


def test_what_is_named_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: LogLines) -> None:
    theirs = {f"{index}{'x' * 3000}": index for index in LARGE.values()}
    with refused(tmp_path, monkeypatch, log, LARGE, theirs) as line:
        assert "0: 't0' here" in line
        assert len(line) < 1000


# Ids that may differ


@pytest.mark.parametrize("theirs", [renamed(VOCABULARY, 7, 9), VOCABULARY, {**VOCABULARY, "<more>": 9}], ids=range(3))
def test_ids_that_may_differ_are_never_sent_or_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: LogLines, theirs: dict[str, int]
) -> None:
    stub_vllm(monkeypatch)
    with (
        DrafterServer(TOY, model=model_of(theirs)) as server,
        running(vllm_config(tmp_path, server.url, more="vocabulary_may_differ: [7, 9]\n")) as engine,
    ):
        engine.add("with", [1, 7, 3])
        engine.step()
        assert pool_of(engine).length("with") is None
        engine.remove("with")
        apart = {7, 9}
        for number in range(40):
            name, prompt = f"r{number}", [number, 1, 2]
            if not apart.isdisjoint(prompt):
                continue
            engine.add(name, prompt)
            for _ in range(30):
                drafts = engine.step()
                assert all(apart.isdisjoint(draft) for draft in drafts)
                text = engine.contexts[name]
                assert (pool_of(engine).length(name) is None) == (not apart.isdisjoint(text))
            engine.remove(name)
        sent = [token for session in server_sessions(server) for token in session]
        assert apart.isdisjoint(sent)
        assert not log.warnings()


def server_sessions(server: DrafterServer) -> list[list[int]]:
    """The contexts that a drafter has now."""
    return [
        list(session._context) for connection in server.host.connections for session in connection._sessions.values()
    ]


def test_others_are_refused_and_named_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: LogLines
) -> None:
    with refused(
        tmp_path,
        monkeypatch,
        log,
        VOCABULARY,
        renamed(VOCABULARY, 7, 9),
        more="vocabulary_may_differ: [7]\n",
    ) as line:
        assert "9: 't9' here, '<other9>' there" in line
        assert "7:" not in line


def test_a_context_that_begins_anew_with_such_an_id_has_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_vllm(monkeypatch)
    with (
        DrafterServer(TOY, model=model_of(VOCABULARY)) as server,
        running(vllm_config(tmp_path, server.url, more="vocabulary_may_differ: [7]\n")) as engine,
    ):
        engine.add("a", [1, 2, 3])
        engine.step()
        engine.contexts["a"], engine.drafts["a"] = [7, 2], []
        engine.step()
        assert pool_of(engine).length("a") is None
        assert pool_of(engine).counters.opened_sessions <= 1


def test_a_draft_ends_before_such_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_vllm(monkeypatch)
    with (
        DrafterServer(TOY, model=model_of(VOCABULARY)) as server,
        running(vllm_config(tmp_path, server.url, more="vocabulary_may_differ: [7]\n")) as engine,
    ):
        for name in "abc":
            engine.add(name, [1, 2, 3])
        monkeypatch.setattr(pool_of(engine), "draft", lambda rows, limit: [[1, 7, 2], [7], [1, 2]])
        assert engine.step() == [[1], [], [1, 2]]
