"""Which forwards were slower than their pace, and servers that pace nothing."""

import json
from pathlib import Path

import pytest

from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.harness.pacing_counts import DRAFTS, Paced, check_paced, paced_since, read_paced


def test_a_server_that_paces_nothing_makes_a_run_invalid(tmp_path: Path) -> None:
    path = tmp_path / "plain.json"
    assert read_paced({"plain": path}) == {}
    with pytest.raises(WanspecError, match="plain: no model forward was paced"):
        check_paced({"plain": path}, read_paced({"plain": path}))
    path.write_text('{"steps": 4, "overruns": 1}')
    check_paced({"plain": path}, read_paced({"plain": path}))
    assert read_paced({"plain": path}) == {"plain": Paced(4, 1)}


def test_only_what_came_after_a_count_counts(tmp_path: Path) -> None:
    path = tmp_path / "plain.json"
    path.write_text('{"steps": 104, "overruns": 3}')
    assert paced_since({"plain": path}, {"plain": Paced(4, 1)}) == {"plain": Paced(100, 2)}
    assert Paced(100, 2).share == 0.02
    assert paced_since({"plain": path}, {}) == {}


def test_paces_are_read_with_the_draft_model_as_a_server_of_its_own(tmp_path: Path) -> None:
    counts = {"steps": 10, "overruns": 1, "draft_steps": 40, "draft_overruns": 2}
    (tmp_path / "a").write_text(json.dumps(counts))
    (tmp_path / "b").write_text(json.dumps({"steps": 5, "overruns": 0}))
    found = read_paced({"draft_model": tmp_path / "a", "none": tmp_path / "b", "ngram": tmp_path / "missing"})
    assert found == {"draft_model": Paced(10, 1), DRAFTS: Paced(40, 2), "none": Paced(5, 0)}
