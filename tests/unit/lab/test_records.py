"""The journal of the side-by-side bench: what is written comes back, also after an interruption."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.records import Batch, Cell, Journal, Part, Reference, Request, Trial

RUN: dict[str, Any] = {"target": "big", "rtt_ms": [0.0, 20.0], "versions": {"vllm": "1"}}
REFERENCE = Reference(3, "bisect", "def f(", (1, 2), (7, 8, 9), (0, None, 2), 40, 81.5)
CELL = Cell("wanspec", 20.0, 1)
GAINED = Counters({"hits": 4.0}, {("0-1", "agreed"): 3.0, ("1-inf", "leaf"): 1.0})
BATCH = Batch(
    CELL, 1, 0.5, (Request(3, 40.0, 80.0, 2, 1),), GAINED, {"target": 0.1}, ("bisect: at 1",), ("bisect: at 2",)
)
PART = Part(12.5, {"drafter": (100, 2)})


Opening = Callable[[Path], Journal]


@pytest.fixture
def take_up() -> Iterator[Opening]:
    """Takes up journals, and closes them at the end."""
    with contextlib.ExitStack() as stack:

        def take_up(path: Path) -> Journal:
            journal = Journal(path, RUN)
            stack.callback(journal.close)
            return journal

        yield take_up


def filled(journal: Journal) -> Journal:
    for record in (REFERENCE, Trial(4, 21.5), BATCH, PART):
        journal.add(record)
    return journal


def test_what_was_added_comes_back(tmp_path: Path, take_up: Opening) -> None:
    first = filled(take_up(tmp_path / "journal"))
    assert not first.resumed
    first.close()
    again = take_up(tmp_path / "journal")
    assert again.resumed
    for journal in (first, again):
        assert journal.references == {3: REFERENCE}
        assert journal.trials == [Trial(4, 21.5)]
        assert journal.batches == [BATCH]
        assert journal.parts == [PART]


def test_what_is_done_is_known_by_cell_and_repeat(tmp_path: Path, take_up: Opening) -> None:
    journal = filled(take_up(tmp_path / "journal"))
    assert journal.done(CELL, 1) == {3}
    assert journal.done(CELL, 0) == set()
    assert journal.done(Cell("wanspec", 30.0, 1), 1) == set()
    assert journal.done(Cell("wanspec", 20.0, 8), 1) == set()


def test_a_record_that_was_cut_off_is_made_again(tmp_path: Path, take_up: Opening) -> None:
    path = tmp_path / "journal"
    filled(take_up(path)).close()
    path.write_text(path.read_text().rstrip("\n")[:-5])
    journal = take_up(path)
    assert journal.parts == []
    assert journal.batches == [BATCH]
    journal.add(PART)
    journal.close()
    again = take_up(path)
    assert again.parts == [PART]
    assert again.batches == [BATCH]


def test_a_journal_that_was_cut_off_at_once_begins_anew(tmp_path: Path, take_up: Opening) -> None:
    path = tmp_path / "journal"
    path.write_text('{"run": {"tar')
    journal = take_up(path)
    assert not journal.resumed
    journal.add(BATCH)
    journal.close()
    assert take_up(path).batches == [BATCH]


def test_another_run_is_refused_and_named(tmp_path: Path, take_up: Opening) -> None:
    path = tmp_path / "journal"
    filled(take_up(path)).close()
    other = RUN | {"target": "small", "seed": 1}
    with pytest.raises(ConfigError, match=r"another target, seed: delete it"):
        Journal(path, other)
    assert take_up(path).batches == [BATCH]


def test_a_journal_lies_in_its_file_until_it_is_removed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "bench.json.journal", RUN)
    assert journal.path == tmp_path / "bench.json.journal"
    assert json.loads(journal.path.read_text()) == {"run": RUN}
    journal.remove()
    assert not journal.path.exists()


def test_a_journal_that_cannot_be_kept_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot keep the journal"):
        Journal(tmp_path / "missing" / "journal", RUN)
