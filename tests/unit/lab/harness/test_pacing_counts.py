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
    READ_ATTEMPTS,
    Paced,
    PacingCounts,
    check_counted,
    read_counts,
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
    assert (then.steps, then.draft_steps, then.draft_paced_ms_total) == (1, 2, 1.0)
    assert (then.async_scheduling, then.num_spec_tokens) == (True, 7)


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


def test_a_server_that_counts_nothing_makes_a_run_invalid(tmp_path: Path) -> None:
    path = tmp_path / "plain.json"
    with pytest.raises(WanspecError, match="plain: no model forward was paced"):
        check_counted({"plain": path})
    check_counted({"plain": write(path, COUNTS)})


def test_the_share_of_overruns() -> None:
    assert (Paced(100, 2).share, Paced(0, 0).share) == (0.02, 0.0)
