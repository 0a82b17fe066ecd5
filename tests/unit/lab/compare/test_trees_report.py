"""The tree bench's figures: increases of counters, intervals, and the report on made-up measurements."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.compare.demo_report import Divergence
from vllm_wanspec.lab.compare.trees_figures import Row, arm_figures
from vllm_wanspec.lab.compare.trees_measure import Reference
from vllm_wanspec.lab.compare.trees_report import print_report, write_json, write_markdown, write_plot
from vllm_wanspec.lab.compare.trees_result import TreesResult
from vllm_wanspec.lab.compare.trees_setup import Arm, TreesOptions, parse_arms
from vllm_wanspec.lab.harness.client import Completion
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.models import Prompt
from vllm_wanspec.lab.harness.pacing_counts import Paced
from vllm_wanspec.lab.stats import Interval, Timed, paired_ratio

ARMS = parse_arms(
    "main-line=max_branches=1; theta-inf=entropy_threshold_nats=inf; theta-1=entropy_threshold_nats=1;"
    "theta-0=entropy_threshold_nats=0; default=; plain=off"
)
PACES = {"main-line": 30.0, "theta-inf": 29.0, "theta-1": 27.1, "theta-0": 27.0, "default": 27.3, "plain": 40.0}
DRAFTED = {"main-line": 90, "theta-inf": 95, "theta-1": 300, "theta-0": 900, "default": 310, "plain": 0}


def samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    """Samples from lines of name, value and labels."""
    found = []
    for line in text.split(";"):
        name, value, *labels = line.split()
        found.append((f"wanspec_{name}_total", dict(label.split("=") for label in labels), float(value)))
    return found


def test_increases_of_counters_and_positions() -> None:
    names = ("steps", "hits", "misses", "waits")
    before = Counters.of(samples("steps 5; hits 3; other 9; waits 8; positions 2 entropy=0-1 outcome=agreed"), names)
    after = Counters.of(
        samples(
            "steps 9; hits 3; waits 1; positions 6 entropy=0-1 outcome=agreed;"
            "positions 1 entropy=1-inf outcome=leaf; positions 4 entropy=0.5-1"
        ),
        names,
    )
    gained = after.since(before)
    assert gained.values == {"steps": 4.0, "hits": 0.0}  # waits fell: the server was started again
    assert gained.get("misses") is None
    assert gained.positions == {("0-1", "agreed"): 4.0, ("1-inf", "leaf"): 1.0}
    assert gained.as_json()["positions"]["1-inf"] == {"agreed": 0.0, "branch": 0.0, "leaf": 1.0, "outside": 0.0}


def test_a_counter_that_appears_later_began_at_zero() -> None:
    assert Counters({"hits": 3.0}).since(Counters()).values == {"hits": 3.0}
    total = Counters.total([Counters({"hits": 3.0}), Counters({"steps": 1.0}), Counters({"hits": 1.0})])
    assert total.values == {"hits": 4.0, "steps": 1.0}


def test_counters_are_summed_over_labels() -> None:
    assert Counters.of(samples("hits 1 link=a; hits 2 link=b"), ["hits"]).values == {"hits": 3.0}


def test_entropy_ranges_are_in_the_order_of_numbers() -> None:
    names = ["10-inf", "0.5-2", "odd", "2-10", "empty"]
    counters = Counters(positions={(name, "leaf"): float(name != "empty") for name in names})
    assert counters.ranges() == ["0.5-2", "2-10", "10-inf", "odd"]


def test_a_ratio_of_constant_times_has_no_width() -> None:
    pairs = [(Timed(90.0 * n, n), Timed(100.0 * n, n)) for n in (10, 20, 30)]
    ratio = paired_ratio(pairs)
    assert ratio is not None
    assert ratio == pytest.approx((0.9, 0.9, 0.9))


def test_the_interval_of_a_known_ratio_is_as_wide_as_theory_says() -> None:
    rng = random.Random(1)
    count, spread = 100, 0.1
    pairs = [(Timed(rng.gauss(0.9, spread) * 1000.0, 10), Timed(1000.0, 10)) for _ in range(count)]
    ratio = paired_ratio(pairs)
    assert ratio is not None
    assert ratio.low < 0.9 < ratio.high
    assert ratio.high - ratio.low == pytest.approx(2 * 1.96 * spread / count**0.5, rel=0.25)
    assert paired_ratio(pairs) == ratio
    assert paired_ratio(pairs, seed=1) != ratio


def test_pairing_removes_what_prompts_differ_in() -> None:
    rng = random.Random(2)
    paces = [rng.uniform(10.0, 40.0) for _ in range(40)]
    below = [Timed(pace * 50, 50) for pace in paces]
    above = [Timed(pace * 50 * rng.uniform(0.89, 0.91), 50) for pace in paces]
    paired = paired_ratio(list(zip(above, below, strict=True)))
    rng.shuffle(below)
    mixed = paired_ratio(list(zip(above, below, strict=True)))
    assert paired is not None and mixed is not None
    assert paired.high - paired.low < 0.1 * (mixed.high - mixed.low)


@pytest.mark.parametrize("pairs", [[], [(Timed(1.0, 1), Timed(0.0, 0))], [(Timed(1.0, 1), Timed(0.0, 5))]])
def test_nothing_to_divide_by_is_no_ratio(pairs: list[tuple[Timed, Timed]]) -> None:
    assert paired_ratio(pairs) is None


def test_repeats_of_a_prompt_are_one_in_the_bootstrap() -> None:
    arm = Arm("a")
    rows = [Row(0, repeat, name, Timed(100.0, 10), 1.0, Counters()) for repeat in range(3) for name in ("a", "b")]
    figures = arm_figures(arm, rows, "b", {0: Timed(50.0, 10)})
    assert figures.timed == (300.0, 30)
    assert figures.ratio == (1.0, 1.0, 1.0)
    assert figures.plain_ratio == (2.0, 2.0, 2.0)


def counters_of(name: str) -> Counters:
    if name == "plain":
        return Counters({"drafted_tokens": 0.0, "branch_seconds": 0.0})
    values = {"steps": 20.0, "committed_tokens": 50.0, "hits": 15.0, "misses": 5.0, "received_bytes": 2700.0}
    values |= {"sent_bytes": 300.0, "drafted_tokens": float(DRAFTED[name]), "branch_seconds": 3.0}
    caught = 0.0 if name in ("main-line", "theta-inf") else 3.0
    positions = {("0-0.5", "agreed"): 30.0, ("1-inf", "agreed"): 10.0, ("1-inf", "leaf"): 6.0 - caught}
    return Counters(values, positions | {("1-inf", "branch"): caught, ("1-inf", "outside"): 2.0})


def result_with(prompts: int = 40, **changes: Any) -> TreesResult:
    """A made-up measurement."""
    rng = random.Random(5)
    done = Completion((1,), tuple(range(50)), "", 50.0, 2000.0, None)
    short = Completion((1,), tuple(range(9)), "", 50.0, 400.0, None)
    references = [Reference(i, Prompt(f"m{i}", "x"), done, 128, Timed(39.0 * 49, 49)) for i in range(prompts)]
    references.append(Reference(prompts, Prompt("loops", "x"), short, 128, Timed(39.0 * 8, 8)))
    rows = []
    for index in range(prompts):
        hard = rng.uniform(0.7, 1.4)
        for arm in ARMS:
            time_ms = PACES[arm.name] * 49 * hard * rng.uniform(0.98, 1.02)
            rows.append(Row(index, 0, arm.name, Timed(time_ms, 49), 1.5, counters_of(arm.name)))
    fields: dict[str, Any] = {
        "options": TreesOptions(arms=ARMS),
        "references": references,
        "rows": rows,
        "differences": [],
        "paced": {"drafter": Paced(5000, 10), "wanspec": Paced(5000, 10)},
        "seconds": 900.0,
    }
    return TreesResult(**(fields | changes))


def report(result: TreesResult) -> str:
    screen = Console(file=io.StringIO(), width=200)
    print_report(result, screen)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_the_figures_of_a_made_up_measurement() -> None:
    result = result_with()
    figures = {one.arm.name: one for one in result.figures}
    default = figures["default"]
    assert default.ratio is not None
    assert default.ratio.value == pytest.approx(0.91, abs=0.01)
    assert default.ratio.low < 0.91 < default.ratio.high < 0.93
    assert default.tokens_per_step == 2.5
    assert default.running_branches == 2.0
    assert default.bytes_per_accepted_token == 100.0
    assert default.share_of_misses("1-inf", "branch") == pytest.approx(3 / 8)
    assert default.share("1-inf", "agreed") == pytest.approx(10 / 18)
    assert default.share_of_misses("0-0.5", "branch") is None
    assert figures["main-line"].share_of_misses(None, "branch") == 0.0
    assert figures["plain"].tokens_per_step is None
    assert result.held is True
    assert result.short_prompts == 1
    assert result.frugal is not None
    assert result.frugal.arm.name == "theta-1"  # within 1 % of theta-0 with a third of the nodes


def test_the_report_shows_tables_and_verdict(tmp_path: Path) -> None:
    result = result_with()
    text = report(result)
    for expected in (
        "what redundancy buys",
        "theta-inf",
        "12,400",
        "38%",
        "held",
        "40 held-out prompts (1 of 41 dropped",
    ):
        assert expected in text
    assert "INVALID" not in text
    write_markdown(result, tmp_path / "trees.md")
    page = (tmp_path / "trees.md").read_text()
    assert "| default | 0% |" not in page
    assert "| default | – | 38% | 38% |" in page
    assert "- `theta-1`: `entropy_threshold_nats=1`" in page
    assert "python -m vllm_wanspec.lab.compare.trees" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    blocks = page.split("\n\n")
    for block in (block for block in blocks if block.startswith("|")):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert len(lines) > 20


def test_unknown_figures_are_dashes() -> None:
    result = result_with()
    bare = [Row(row.prompt, 0, row.arm, row.timed, row.elapsed_s, Counters()) for row in result.rows]
    text = report(result_with(rows=bare))
    assert text.count("–") > 50
    assert result_with(rows=bare).frugal is None


def test_json_has_everything(tmp_path: Path) -> None:
    path = tmp_path / "trees.json"
    write_json(result_with(), path)
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
        write_json(result_with(), tmp_path)


def test_a_target_that_missed_its_pace_is_said_loudly() -> None:
    result = result_with(paced={"wanspec": Paced(1000, 11), "drafter": Paced(1000, 30)})
    assert not result.is_valid
    assert result.held is None
    text = report(result)
    assert "INVALID: 1.1% of the target's forwards" in text
    assert "3.0% of the drafter's" in text
    assert "INVALID" in report(result_with(paced={}))


def test_a_bar_that_was_missed_is_said() -> None:
    slow = [row for row in result_with().rows if row.arm != "default"]
    slow += [Row(r.prompt, 0, "default", r.timed, 1.5, r.counters) for r in slow if r.arm == "theta-inf"]
    result = result_with(rows=slow)
    assert result.held is False
    assert "missed" in report(result)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": 31},
        {"ended_by": "the run was interrupted"},
        {"differences": [("default", Divergence(Prompt("m", "x"), 3, False, 1, 2))]},
        {"options": TreesOptions(arms=ARMS, baseline="theta-inf")},
        {"options": TreesOptions(arms=ARMS[:4])},
    ],
)
def test_a_run_that_cannot_tell_gives_no_verdict(changes: dict[str, Any]) -> None:
    assert result_with(**changes).held is None
    assert "asked for" not in report(result_with(**changes))


def test_arms_in_which_nothing_was_drafted_are_named() -> None:
    rows = [Row(0, 0, arm.name, Timed(9.0, 9), 1.0, Counters({"hits": 0.0})) for arm in ARMS]
    text = report(result_with(rows=rows))
    assert "No draft was ever used in main-line, theta-inf, theta-1, theta-0, default." in " ".join(text.split())


def test_the_plot_is_drawn_where_matplotlib_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trees.png"
    if importlib.util.find_spec("matplotlib") is not None:
        assert write_plot(result_with(), path)
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not write_plot(result_with(), path)
    write_markdown(result_with(), tmp_path / "trees.md")
    assert "![" not in (tmp_path / "trees.md").read_text()


def test_an_interval_is_three_numbers_in_json() -> None:
    assert Interval(0.91234567, 0.9, 0.92).as_json() == [0.9123, 0.9, 0.92]
