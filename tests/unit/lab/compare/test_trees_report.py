"""The tree bench's figures and report on made-up measurements."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compare_runs import provenance, records, request
from rich.console import Console

from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.compare.arms import TREES, Arm, tree_arms
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.trees_figures import TARGET, TreesFigures, trees_figures
from vllm_wanspec.lab.compare.trees_report import draw_figures, trees_report
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.running import Outputs
from vllm_wanspec.lab.records import Batch, Cell, Reference
from vllm_wanspec.lab.report.console import print_document
from vllm_wanspec.lab.report.document import Document

ARMS = tree_arms(
    "--arms",
    "main-line=max_branches=1; theta-inf=entropy_threshold_nats=inf; theta-1=entropy_threshold_nats=1;"
    "theta-0=entropy_threshold_nats=0; default=; plain=off",
    replace(TREES, name=TARGET),
)
FOUR = [arm.name for arm in ARMS[:4]]
PACES = {"main-line": 30.0, "theta-inf": 29.0, "theta-1": 27.1, "theta-0": 27.0, "default": 27.3, "plain": 40.0}
DRAFTED = {"main-line": 90, "theta-inf": 95, "theta-1": 300, "theta-0": 900, "default": 310, "plain": 0}


def batch(prompt: int, repeat: int, arm: str, time_ms: float, tokens: int, counters: Counters, **wrong: Any) -> Batch:
    requests = (request(prompt, time_ms, tokens, tokens, 3000.0 - time_ms),)
    return Batch(Cell(arm, 30.0, 1), repeat, 1.5, requests, counters, **wrong)


def options_with(arms: Sequence[Arm] = ARMS, repeats: int = 1) -> Options:
    settings = Options("big", "small", Path("p"), tuple(arms), (30.0,), count=None, repeats=repeats)
    return replace(settings, ranked=False)


def test_repeats_of_a_prompt_are_one_in_the_bootstrap() -> None:
    arms = tree_arms("--arms", "a=; b=off")
    batches = [batch(0, repeat, arm.name, 100.0, 10, Counters()) for repeat in range(3) for arm in arms]
    alone = Reference(0, "m", "x", (1,), tuple(range(30)), (None,) * 30, 30, 5.0 * 29)
    (figures, _) = figures_with(options=options_with(arms, 3), references=[alone], batches=batches, baseline="b").arms
    assert (figures.row.tpot_ms, figures.row.tokens) == (10.0, 30)
    assert figures.ratio == (1.0, 1.0, 1.0)
    assert figures.plain_ratio == (2.0, 2.0, 2.0)


def counters_of(name: str) -> Counters:
    if name == "plain":
        return Counters({"drafted_tokens": 0.0, "branch_seconds": 0.0})
    values = {"steps": 20.0, "committed_tokens": 50.0, "hits": 15.0, "misses": 5.0, "received_bytes": 2700.0}
    values |= {"sent_bytes": 300.0, "drafted_tokens": float(DRAFTED[name]), "branch_seconds": 6.0}
    caught = 0.0 if name in ("main-line", "theta-inf") else 3.0
    positions = {("0-0.5", "agreed"): 30.0, ("1-inf", "agreed"): 10.0, ("1-inf", "leaf"): 6.0 - caught}
    return Counters(values, positions | {("1-inf", "branch"): caught, ("1-inf", "outside"): 2.0})


def made_up(prompts: int = 40) -> dict[str, Any]:
    """A made-up measurement."""
    rng = random.Random(5)
    ids, short = tuple(range(50)), tuple(range(9))
    taken = [Reference(i, f"m{i}", "x", (1,), ids, (None,) * 50, 128, 39.0 * 49) for i in range(prompts)]
    taken.append(Reference(prompts, "loops", "x", (1,), short, (None,) * 9, 128, 39.0 * 8))
    batches = []
    for index in range(prompts):
        hard = rng.uniform(0.7, 1.4)
        for arm in ARMS:
            time_ms = PACES[arm.name] * 49 * hard * rng.uniform(0.98, 1.02)
            batches.append(batch(index, 0, arm.name, time_ms, 49, counters_of(arm.name)))
    return {"options": options_with(), "references": taken, "batches": batches, "provenance": provenance(900.0)}


def figures_with(
    prompts: int = 40, baseline: str = "main-line", overruns: tuple[int, int] | None = (10, 10), **changes: Any
) -> TreesFigures:
    """Figures of a measurement with some of 5,000 forwards of target and drafter slower than their pace."""
    parts = made_up(prompts) | changes
    first, *others = parts.pop("batches")
    if overruns is not None:
        counts = {f"{side}_forwards": 5000.0 for side in ("target", "drafter")}
        counts |= {"target_overruns": float(overruns[0]), "drafter_overruns": float(overruns[1])}
        first = replace(first, counters=Counters({**first.counters.values, **counts}, first.counters.positions))
    made = records(parts.pop("references"), [first, *others])
    return trees_figures(Result(**parts, records=made), baseline)


def document_of(found: TreesFigures) -> Document:
    made = trees_report(found)
    assert made is not None
    return made.document


def report(found: TreesFigures) -> str:
    screen = Console(file=io.StringIO(), width=200)
    print_document(document_of(found), screen)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def write(found: TreesFigures, json_path: Path | None = None, markdown_path: Path | None = None) -> None:
    made, nowhere = trees_report(found), Console(file=io.StringIO())
    assert made is not None
    made.publish(Outputs(json_path, markdown_path), nowhere)


def test_the_figures_of_a_made_up_measurement() -> None:
    result = figures_with()
    figures = {one.arm.name: one for one in result.arms}
    default = figures["default"]
    assert default.ratio is not None
    assert default.ratio.value == pytest.approx(0.91, abs=0.01)
    assert default.ratio.low < 0.91 < default.ratio.high < 0.93
    assert default.row.committed_per_step == 2.5
    assert default.row.running_branches == 2.0
    assert default.row.bytes_per_accepted_token == 100.0
    assert default.row.counters.share_of_misses("1-inf", "branch") == pytest.approx(3 / 8)
    assert default.row.counters.share("1-inf", "agreed") == pytest.approx(10 / 18)
    assert default.row.counters.share_of_misses("0-0.5", "branch") is None
    assert figures["main-line"].row.counters.share_of_misses(None, "branch") == 0.0
    assert figures["plain"].row.committed_per_step is None
    assert result.held is True
    assert result.short_prompts == 1
    assert result.frugal is not None
    assert result.frugal.arm.name == "theta-1"  # within 1 % of theta-0 with a third of the nodes


def test_the_report_shows_tables_and_verdict(tmp_path: Path) -> None:
    result = figures_with()
    text = report(result)
    for expected in (
        "Pace: paced to 35 + 0.1 ms (target), 5 + 0.02 ms (draft).",
        "theta-inf",
        "12,400",
        "38%",
        "held",
        "40 held-out prompts (1 of 41 dropped",
    ):
        assert expected in text
    assert "INVALID" not in text
    write(result, markdown_path=tmp_path / "trees.md")
    page = (tmp_path / "trees.md").read_text()
    assert "| default | 0% |" not in page
    assert "| default | – | 38% | 38% |" in page
    assert "- `theta-1`: `entropy_threshold_nats=1`" in page
    assert "`wanspec bench --check`; a machine; python 3; commit abc1234; 900 s." in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    blocks = page.split("\n\n")
    for block in (block for block in blocks if block.startswith("|")):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert len(lines) > 20


def test_unknown_figures_are_dashes() -> None:
    bare = [replace(one, counters=Counters()) for one in made_up()["batches"]]
    text = report(figures_with(batches=bare))
    assert text.count("–") > 50
    assert figures_with(batches=bare).frugal is None


def test_json_has_everything(tmp_path: Path) -> None:
    path = tmp_path / "trees.json"
    write(figures_with(), path)
    data = json.loads(path.read_text())
    assert data["held"] is True
    assert data["frugal_arm"] == "theta-1"
    assert data["overruns"] == {"drafter": 0.002, "wanspec": 0.002}
    assert len(data["rows"]) == 240
    assert data["rows"][0][:3] == [0, 0, "main-line"]
    assert all(len(row) == len(data["row_columns"]) for row in data["rows"])
    assert len(path.read_text().splitlines()) < 1000
    assert len(data["references"]) == 41
    assert {"machine", "versions", "commit", "command", "pacing", "seconds"} <= data.keys()
    with pytest.raises(WanspecError, match="--json: cannot write"):
        write(figures_with(), tmp_path)


def test_a_target_that_missed_its_pace_is_said_loudly() -> None:
    result = figures_with(overruns=(55, 150))
    assert not result.is_valid
    assert result.held is None
    text = report(result)
    assert "INVALID: more forwards than 1% took longer than their pace (1.1% of wanspec's)" in text
    assert "3.0% of the drafter's" in text
    assert figures_with(overruns=(50, 150)).is_valid
    assert "INVALID" in report(figures_with(overruns=None))


def test_a_bar_that_was_missed_is_said() -> None:
    slow = [one for one in made_up()["batches"] if one.cell.arm != "default"]
    slow += [replace(one, cell=Cell("default", 30.0, 1)) for one in slow if one.cell.arm == "theta-inf"]
    result = figures_with(batches=slow)
    assert result.held is False
    assert "missed" in report(result)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": 31},
        {"ended_by": "the run was interrupted"},
        {"batches": [replace(one, wrong=("m: at 3",)) for one in made_up()["batches"]]},
        {"baseline": "theta-inf"},
        {"options": options_with(ARMS[:4]), "batches": [one for one in made_up()["batches"] if one.cell.arm in FOUR]},
    ],
)
def test_a_run_that_cannot_tell_gives_no_verdict(changes: dict[str, Any]) -> None:
    assert figures_with(**changes).held is None
    assert "asked for" not in report(figures_with(**changes))


def test_arms_in_which_nothing_was_drafted_are_named() -> None:
    batches = [batch(0, 0, arm.name, 9.0, 9, Counters({"hits": 0.0})) for arm in ARMS]
    text = report(figures_with(batches=batches))
    assert "No draft was ever used in main-line, theta-inf, theta-1, theta-0, default." in " ".join(text.split())


def test_the_plot_is_drawn_where_matplotlib_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trees.png"
    if importlib.util.find_spec("matplotlib") is not None:
        assert draw_figures(figures_with(), path)
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_figures(figures_with(), path)
    write(figures_with(), markdown_path=tmp_path / "trees.md")
    assert "![" not in (tmp_path / "trees.md").read_text()


def test_rounds_that_are_not_complete_do_not_count() -> None:
    batches = made_up()["batches"]
    found = figures_with(batches=batches[:-1])
    assert found.measured_prompts == 39
    assert len(found.batches) == 39 * len(ARMS)
    assert trees_report(figures_with(batches=batches[:5])) is None
