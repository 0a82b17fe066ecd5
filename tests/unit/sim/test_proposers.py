"""What proposes drafts inside vLLM for measurements: the ceiling and the floor."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vllm_wanspec.sim.proposers import EmptyProposer, OracleProposer, write_references


def oracle(path: Path, tokens: int = 3) -> OracleProposer:
    config = SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=tokens))
    return OracleProposer(config, {"WANSPEC_ORACLE": str(path)})


def test_the_oracle_proposes_what_comes_next(tmp_path: Path) -> None:
    write_references(tmp_path / "known.json", [([1, 2], [5, 6, 7, 8]), ([3], [9])])
    proposer = oracle(tmp_path / "known.json")
    contexts = np.array([[1, 2, 5, 0], [3, 0, 0, 0], [1, 2, 9, 0], [1, 2, 5, 6]], np.int32)
    # The third row has left its text, the last one is still in prefill.
    drafts = proposer.propose([[5], [3], [9], []], np.array([3, 1, 3, 4]), contexts, slot_mappings=None)
    assert drafts == [[6, 7, 8], [9], [], []]
    assert all(type(token) is int for draft in drafts for token in draft)


def test_the_oracle_reads_again_what_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    proposer = oracle(path)
    assert proposer.next_tokens([1, 2]) == []
    write_references(path, [([1], [2, 3])])
    assert proposer.next_tokens([1, 2]) == [3]
    write_references(path, [([7], [8])])
    os.utime(path, ns=(1, 1))
    assert proposer.next_tokens([1, 2]) == [3]  # known: no need to look
    assert proposer.next_tokens([7]) == [8]
    path.write_text("[[")
    os.utime(path, ns=(2, 2))
    assert proposer.next_tokens([5]) == []
    assert proposer.next_tokens([7]) == [8]


def test_the_empty_proposer_proposes_nothing() -> None:
    assert EmptyProposer(None).propose([[1], []], None, None, slot_mappings=None) == [[], []]
