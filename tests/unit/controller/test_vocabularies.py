"""A drafter with another vocabulary: the tokens that differ are named, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import LogLines
from proposer_engine import stub_vllm, vllm_config
from toys import VOCABULARY, DrafterServer, Toy, draft_model, wait_until

from vllm_wanspec.controller.v1 import proposer
from vllm_wanspec.controller.v1.proposer import RemoteProposer
from vllm_wanspec.core.messages import vocabulary_fingerprint
from vllm_wanspec.core.vocabulary import Tokens

pytestmark = pytest.mark.usefixtures("short_waits")

LARGE = {f"t{index}": index for index in range(5000)}


@contextmanager
def refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: LogLines,
    ours: dict[str, int],
    theirs: dict[str, int],
) -> Iterator[str]:
    """The line that says so."""
    stub_vllm(monkeypatch)
    monkeypatch.setattr(proposer, "_vocabulary", lambda config: ours)
    model = draft_model(
        fingerprint=vocabulary_fingerprint(theirs), vocab_size=len(theirs), tokens=Tokens.of(theirs).by_id
    )
    with DrafterServer(Toy(), model=model) as server:
        remote = RemoteProposer(vllm_config(tmp_path, server.url))
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
        (VOCABULARY, VOCABULARY | {"<more>": 50}, ("50: nothing here, '<more>' there",)),
        (VOCABULARY | {"<more>": 50}, VOCABULARY, ("50: '<more>' here, nothing there",)),
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
