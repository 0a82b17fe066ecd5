"""What a pacer's file says, at any moment, and servers that pace nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vllm_wanspec.emulate.pacing import STATS_WIDTH, Pacer, Pacing
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.harness import pacing_counts
from vllm_wanspec.lab.harness.pacing_counts import (
    DRAFTS,
    READ_ATTEMPTS,
    Paced,
    PacingCounts,
    check_paced,
    paced_since,
    read_counts,
    read_paced,
)

#: Ten steps at 35 + 0.1 ms per row, each of one row, and thirty draft forwards at 5 + 0.02.
COUNTS = PacingCounts(10, 1, 351.0, 80.0, 30, 2, 150.6, 40.0, False, 3)


def write(path: Path, counts: PacingCounts) -> Path:
    path.write_text(json.dumps(asdict(counts)).ljust(STATS_WIDTH))
    return path


def test_what_a_pacer_writes_is_read_after_each_forward(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    pacer = Pacer(Pacing(1.0, 0.5), Pacing(0.5), path)
    assert read_counts(path) is None
    pacer.run(lambda: None, tokens=2)
    first = read_counts(path)
    assert first is not None
    assert (first.steps, first.paced_ms_total, first.draft_steps) == (1, 2.0, 0)
    pacer.async_scheduling, pacer.num_spec_tokens = True, 7
    pacer.run_draft(lambda: None, tokens=1)
    pacer.run_draft(lambda: None, tokens=1)
    then = read_counts(path)
    assert then is not None
    grown = then.since(first)
    assert (grown.steps, grown.draft_steps, grown.draft_paced_ms_total) == (0, 2, 1.0)
    assert (grown.async_scheduling, grown.num_spec_tokens) == (True, 7)


def test_counts_are_subtracted_and_settings_are_the_later_ones() -> None:
    earlier = PacingCounts(4, 1, 140.5, 30.0, 10, 0, 50.25, 15.0, True, 0)
    assert COUNTS.since(earlier) == PacingCounts(6, 0, 210.5, 50.0, 20, 2, 100.35, 25.0, False, 3)


def test_a_text_that_is_being_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stats.json"
    path.touch()
    texts = [json.dumps(asdict(COUNTS))[:90], json.dumps(asdict(COUNTS)).ljust(STATS_WIDTH)]
    monkeypatch.setattr(pacing_counts.time, "sleep", lambda seconds: path.write_text(texts.pop(0)))
    assert read_counts(path) == COUNTS
    assert not texts


def test_a_text_that_changes_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = json.dumps(asdict(COUNTS)), json.dumps(asdict(replace(COUNTS, steps=11)))
    texts = iter([old, new, new, new])
    monkeypatch.setattr(Path, "read_text", lambda *unused: next(texts))
    assert read_counts(tmp_path) == replace(COUNTS, steps=11)


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", '{"steps": 4}'])
def test_a_file_that_holds_no_counts_is_given_up(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept_s: list[float] = []
    monkeypatch.setattr(pacing_counts.time, "sleep", slept_s.append)
    path = tmp_path / "stats.json"
    path.write_text(text)
    assert read_counts(path) is None
    assert len(slept_s) == READ_ATTEMPTS
    assert sum(slept_s) < 0.1


def test_a_draft_model_that_runs_unpaced_is_seen() -> None:
    assert COUNTS.kept(Pacing(35.0, 0.1)) and COUNTS.drafts_kept(Pacing(5.0, 0.02))
    assert not COUNTS.kept(Pacing(35.0, 0.2)) and not COUNTS.drafts_kept(Pacing(5.0, 0.03))
    assert not replace(COUNTS, draft_paced_ms_total=0.0).drafts_kept(Pacing(5.0, 0.02))  # only counted
    assert not replace(COUNTS, draft_steps=0, draft_paced_ms_total=0.0).drafts_kept(Pacing(5.0, 0.02))  # not seen
    assert not replace(COUNTS, draft_paced_ms_total=150.6 - 5.02).drafts_kept(Pacing(5.0, 0.02))  # one of thirty
    assert not replace(COUNTS, paced_ms_total=0.0).kept(Pacing(35.0, 0.1))


def test_a_server_that_paces_nothing_makes_a_run_invalid(tmp_path: Path) -> None:
    path = tmp_path / "plain.json"
    assert read_paced({"plain": path}) == {}
    with pytest.raises(WanspecError, match="plain: no model forward was paced"):
        check_paced({"plain": path}, read_paced({"plain": path}))
    write(path, replace(COUNTS, steps=4, overruns=1, draft_steps=0))
    check_paced({"plain": path}, read_paced({"plain": path}))
    assert read_paced({"plain": path}) == {"plain": Paced(4, 1)}


def test_only_what_came_after_a_count_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "plain.json", replace(COUNTS, steps=104, overruns=3, draft_steps=0))
    assert paced_since({"plain": path}, {"plain": Paced(4, 1)}) == {"plain": Paced(100, 2)}
    assert Paced(100, 2).share == 0.02
    assert paced_since({"plain": path}, {}) == {}


def test_paces_are_read_with_the_draft_model_as_a_server_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a", replace(COUNTS, draft_steps=40))
    write(tmp_path / "b", replace(COUNTS, steps=5, overruns=0, draft_steps=0, draft_overruns=0))
    found = read_paced({"draft_model": tmp_path / "a", "none": tmp_path / "b", "ngram": tmp_path / "missing"})
    assert found == {"draft_model": Paced(10, 1), DRAFTS: Paced(40, 2), "none": Paced(5, 0)}
