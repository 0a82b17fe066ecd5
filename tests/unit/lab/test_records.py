"""The journal of the side-by-side bench: what is written comes back, also after an interruption."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.records import (
    Batch,
    Cell,
    Journal,
    Load,
    Part,
    Records,
    Reference,
    Request,
    Serving,
    Setting,
    Trial,
)

RUN: dict[str, Any] = {"target": "big", "rtt_ms": [0.0, 20.0], "versions": {"vllm": "1"}}
REFERENCE = Reference(3, "bisect", "def f(", (1, 2), (7, 8, 9), (0, None, 2), 40, 81.5, "docstring")
CELL = Cell("wanspec", 20.0, 1)
REQUEST = Request(3, ((40.0, 1), (80.5, 3), (120.0, 1)))
GAINED = Counters({"hits": 4.0}, {("0-1", "agreed"): 3.0, ("1-inf", "leaf"): 1.0})
BATCH = Batch(CELL, 1, 0.5, (REQUEST,), GAINED, {"target": 0.1}, ("bisect: at 1",), ("bisect: at 2",), 20.4)
PART = Part(12.5)
TRIALS = [Trial("draft_model", Load(8), Setting(4), 21.5), Trial("ngram", Load(0, 2.5), Setting(8, 2, 4), 30.0)]
SERVING = Serving("draft_model-4", ("draft_model",), {"command": ["vllm", "serve"], "observed": None})


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
    for record in (REFERENCE, *TRIALS, SERVING, BATCH, PART):
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
        assert journal.trials == TRIALS
        assert journal.servings == {"draft_model-4": SERVING}
        assert journal.batches == [BATCH]
        assert journal.parts == [PART]


def test_a_result_file_holds_the_records_without_the_prompts_texts(tmp_path: Path, take_up: Opening) -> None:
    told = json.loads(json.dumps(filled(take_up(tmp_path / "journal")).as_json()))
    assert told[0] == {"counters": ["hits"]}
    assert next(one["batch"]["counters"]["values"] for one in told if "batch" in one) == [4]
    again = Records(told)
    assert again.references == {3: replace(REFERENCE, text="")}
    assert (again.trials, again.servings, again.batches, again.parts) == (
        TRIALS,
        {"draft_model-4": SERVING},
        [BATCH],
        [PART],
    )
    assert json.loads(json.dumps(again.as_json())) == told


def test_a_counter_that_one_batch_lacks_is_lacking_when_it_is_read(tmp_path: Path, take_up: Opening) -> None:
    journal = filled(take_up(tmp_path / "journal"))
    other = replace(BATCH, repeat=2, counters=Counters({"misses": 0.0}))
    journal.add(other)
    again = Records(json.loads(json.dumps(journal.as_json())))
    assert [batch.counters.values for batch in again.batches] == [{"hits": 4}, {"misses": 0}]


def test_a_target_that_was_started_again_is_told_once(tmp_path: Path, take_up: Opening) -> None:
    journal = filled(take_up(tmp_path / "journal"))
    journal.add(replace(SERVING, facts={"command": ["again"]}))
    assert [one.facts for one in journal.servings.values()] == [{"command": ["again"]}]


def test_a_request_by_hand() -> None:
    # Tokens at 40, 80.5, 80.5, 80.5 and 120 ms.
    assert (REQUEST.ttft_ms, REQUEST.time_ms, REQUEST.tokens, REQUEST.steps) == (40.0, 80.0, 4, 2)
    assert REQUEST.gaps_ms == [40.5, 0.0, 0.0, 39.5]
    only = Request(0, ((40.0, 1),))
    assert (only.time_ms, only.tokens, only.steps, only.gaps_ms) == (0.0, 0, 0, [])


def test_loads_and_settings_have_names() -> None:
    assert (str(Load(8)), str(Load(0, 2.5))) == ("concurrency 8", "2.5 requests per second")
    assert (str(Setting(4)), str(Setting(8, 2, 4))) == ("γ = 4", "γ = 8, n-grams of 2 to 4")
    assert CELL.single and not Cell("none", None, 2).single and not Cell("none", None, 0, 1.0).single


def test_what_is_done_is_known_by_cell_and_repeat(tmp_path: Path, take_up: Opening) -> None:
    journal = filled(take_up(tmp_path / "journal"))
    assert journal.done(CELL, 1) == {3}
    assert journal.done(CELL, 0) == set()
    assert journal.done(Cell("wanspec", 30.0, 1), 1) == set()
    assert journal.done(Cell("wanspec", 20.0, 8), 1) == set()
    assert journal.done(Cell("wanspec", 20.0, 1, 2.0), 1) == set()


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
