"""The side-by-side bench's tables, files and plots, of invented runs."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compare_runs import FAR_MS, TIMES_MS, full_run, options, records, reference
from rich.console import Console

import vllm_wanspec
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.compare.arms import tree_arms
from vllm_wanspec.lab.compare.figures import figures
from vllm_wanspec.lab.compare.plots import draw_figures
from vllm_wanspec.lab.compare.report import SOURCE_COLUMNS, as_json, bench_report
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.running import Outputs
from vllm_wanspec.lab.records import Batch, Records, Serving
from vllm_wanspec.lab.report.console import print_document
from vllm_wanspec.lab.report.markdown import markdown

PACED = "Pace: paced to 35 + 0.1 ms (target), 5 + 0.02 ms (draft)"
RED = "\x1b[31m"


def report(run: Result, width: int = 200, colour: bool = False) -> str:
    colours: dict[str, Any] = {"force_terminal": True, "color_system": "standard"} if colour else {}
    screen = Console(file=io.StringIO(), width=width, **colours)
    print_document(bench_report(run).document, screen)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def write(run: Result, json_path: Path | None = None, markdown_path: Path | None = None) -> None:
    """Write files alone."""
    made, nowhere = bench_report(run), Console(file=io.StringIO())
    made.publish(Outputs(json_path, markdown_path), nowhere)


def page_of(run: Result) -> str:
    return markdown(bench_report(run).document)


def json_of(run: Result) -> dict[str, Any]:
    return as_json(run, figures(run))


def words(text: str) -> str:
    return " ".join(text.split())


def lines_of(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


def with_wrong(count: int) -> Result:
    """The first of wanspec's requests at 30 ms has a wrong output, ``count`` times over."""
    run = full_run()
    place = next(place for place, one in enumerate(run.batches) if one.cell == ("wanspec", 30.0, 1, None))
    batches: list[Batch] = list(run.batches)
    batches[place] = replace(
        batches[place], wrong=tuple(f"[module{n}]: token 3 differs" for n in range(count)), ties=("", "")
    )
    return with_records(run, batches)


def with_records(run: Result, batches: list[Batch], **changes: Any) -> Result:
    parts = run.records
    made = records(
        list(parts.references.values()), batches, parts.trials, changes.get("servings", list(parts.servings.values()))
    )
    return replace(run, records=made)


def test_the_console_shows_all_tables() -> None:
    run = full_run()
    text = report(run)
    found = figures(run)
    row = found.row("wanspec", 30.0)
    assert row is not None and row.to_draft_model is not None and row.to_draft_model_lookup is not None
    assert row.to_ideal is not None
    line = lines_of(text, "wanspec ", "│ 30 ", f"{row.tpot_ms:.2f}")[0]
    for ratio in (row.to_draft_model, row.to_draft_model_lookup):
        assert f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})" in line
    assert lines_of(text, "wanspec ", "│ 30 ", f"{row.ideal_tpot_ms:.2f}", f"{row.to_ideal.value:.3f}")
    assert lines_of(text, "draft_model ", "1,152")  # 48 forwards each
    assert lines_of(text, "wanspec ", "65%", "360", "144", "120", "7,440", "6,936", "1,000")
    assert lines_of(text, "draft_model ", "γ = 4 (best)", "22.00")
    assert lines_of(text, "draft_model ", "concurrency 8", "γ = 3 (best)", "22.00")
    assert lines_of(text, "ngram ", "γ = 8, n-grams of 2 to 4 (best)")
    assert lines_of(text, "drafter", "0.00%")
    assert lines_of(text, "✓", "without lookup ÷ plain, R = 500 ms", "1.020")
    assert lines_of(text, "wanspec ", "│ 30 ", "prose", "12")
    assert "All bars hold." in text
    assert "INVALID" not in text and "INCOMPLETE" not in text and "DIFFERENT" not in text


LOOKUP = (
    "Prompt lookup: ours in `lookup`, `draft_model_lookup`, `wanspec`, `wanspec_no_wait`; vLLM's in `ngram`; none in "
    "the others. "
)
AHEAD = (
    "Async scheduling: in no arm, plain vLLM's included (its CPU build has none; on a GPU plain and co-located arms "
    "would have it). "
)


def under_tables(page: str) -> list[str]:
    """What stands below each table's heading."""
    blocks = page.split("\n\n")
    return [after for block, after in itertools.pairwise(blocks) if block.startswith("## ")][:-1]


def test_every_table_says_what_the_arms_have() -> None:
    run = full_run()
    have = under_tables(page_of(run))
    assert len(have) == 9
    assert set(have) == {f"{LOOKUP}{AHEAD}{PACED}."}
    assert words(report(run)).count(words(have[0])) == 9
    bare = full_run(options=options(target_pace=None, draft_pace=None))
    assert all(text.endswith("Pace: not paced.") for text in under_tables(page_of(bare)))
    assert "nothing is paced" in page_of(bare) and "paced to" not in page_of(bare)


def test_async_scheduling_is_told_as_it_was_observed() -> None:
    run = full_run()

    def observed(ahead: dict[str, bool | None]) -> Result:
        facts = {
            arm.name: {"observed": {"async_scheduling": ahead.get(arm.name, False)}} for arm in run.options.started
        }
        servings = [Serving(name, (name,), one) for name, one in facts.items()]
        return with_records(run, list(run.batches), servings=servings)

    some = observed({"none": True, "draft_model": True})
    assert "Async scheduling: in `none`, `draft_model` alone. " in some.haves
    assert "- `draft_model`: vLLM's co-located draft model, its γ tuned (no lookup, async scheduling)" in page_of(some)
    assert "(our lookup, no async scheduling)" in page_of(some)
    assert "Async scheduling: not observed in all arms. " in observed({"none": None}).haves
    on_gpu = replace(run, provenance=replace(run.provenance, machine="a machine, NVIDIA GPU"))
    assert "Async scheduling: in no arm. " in on_gpu.haves


def test_every_table_says_the_time_scale() -> None:
    run = full_run(options=options(time_scale=1.5))
    assert all(text.endswith(f"{PACED}, these and R × 1.5.") for text in under_tables(page_of(run)))
    assert "R = 30 ms took 45 ms" in page_of(run)
    assert "Times are as measured" not in page_of(full_run())
    assert (json_of(run)["time_scale"], json_of(run)["pacing"]) == (1.5, json_of(full_run())["pacing"])


def test_who_the_accepted_tokens_came_from_stands_under_their_names() -> None:
    """Each of 24 requests took 15 tokens of the main line, 6 of branches and 5 of lookup; 310 were drafted for it."""
    found = figures(full_run())
    row = next(row for row in found.rows if row.cell == ("wanspec", 30.0, 1, None))
    shown = {name: text(row) for name, text in SOURCE_COLUMNS}
    names = ("from main line", "from branches", "from lookup", "drafted", "wasted")
    assert [shown[name] for name in names] == ["360", "144", "120", "7,440", "6,936"]
    told = row.as_json()
    names = ("accepted_main_line", "accepted_branch", "accepted_lookup", "drafted", "wasted")
    assert [told[name] for name in names] == [360.0, 144.0, 120.0, 7440.0, 6936.0]


@pytest.mark.parametrize("width", [72, 80, 100, 132])
def test_no_figure_is_broken_in_a_narrow_terminal(width: int) -> None:
    run = full_run()
    text = report(run, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for row in figures(run).rows:
        for ratio in (row.to_draft_model, row.to_draft_model_lookup, row.to_constrained, row.to_none):
            if ratio is not None:
                assert lines_of(text, row.cell.arm, f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})")
        assert lines_of(text, row.cell.arm, f" {row.tpot_ms:.2f} ")
        if not row.cell.single:
            assert lines_of(text, row.cell.arm, f" {row.throughput_tok_s:.1f} ")
    assert lines_of(text, "wanspec", " 7,440 ")
    if width < 100:
        assert "Single stream, continued" in text


def test_wrong_outputs_are_red_and_named() -> None:
    text = report(with_wrong(12), colour=True)
    red = lines_of(text, RED, "wanspec")
    assert any("30" in line for line in red)
    assert not lines_of(text, RED, "none_constrained")
    plain = words(report(with_wrong(12)))
    assert "DIFFERENT OUTPUT in wanspec, R = 30 ms: [module0]: token 3 differs" in plain
    assert plain.count("DIFFERENT OUTPUT") == 10
    assert "… and 2 more." in plain
    assert "Bars are not judged: there are wrong outputs." in plain
    assert "12 differ, 2 floating-point ties" in plain
    assert not lines_of(report(full_run(), colour=True), RED, "wanspec")


def test_what_makes_figures_worthless_is_said() -> None:
    run = full_run()

    def changed(**counters: float) -> Result:
        batches = [replace(one, counters=Counters({**one.counters.values, **counters})) for one in run.batches]
        return replace(with_records(run, batches), ended_by="Ctrl-C")

    text = words(report(changed(target_forwards=1000.0, target_overruns=25.0)))
    assert "INCOMPLETE: Ctrl-C." in text
    assert "INVALID: more forwards than 1% took longer than their pace (2.5% of none's, 2.5% of" in text
    off = [replace(one, rtt_ms=15.0) if one.cell == ("wanspec", 30.0, 1, None) else one for one in run.batches]
    told = words(report(with_records(run, off)))
    assert "INVALID: wanspec, R = 30 ms: the link measured 15.0 ms where 30.0 ms were emulated." in told
    assert "Nothing was drafted in wanspec, wanspec_no_lookup" in words(report(changed(drafted_tokens=0.0)))


def test_a_cell_that_was_too_slow_in_a_valid_run_is_named() -> None:
    run = full_run()
    cell = ("wanspec", 30.0, 8, None)
    slow = [
        replace(one, counters=Counters({**one.counters.values, "drafter_overruns": 48.0})) if one.cell == cell else one
        for one in run.batches
    ]
    text = words(report(with_records(run, slow)))
    assert "INVALID" not in text
    told = (
        "more than 1% of the forwards were slower than their pace in wanspec, R = 30 ms, concurrency 8 (drafter 2.0%)."
    )
    assert f"DOUBTFUL: {told}" in text
    assert "DOUBTFUL" not in report(run)


def test_a_peer_whose_drafts_were_too_slow_in_a_valid_run_is_named() -> None:
    """20 of its 1,152 draft forwards at 8 streams: of those of both its cells they are 0.9 %."""
    run = full_run()
    cell = ("draft_model", None, 8, None)
    slow = [
        replace(one, counters=Counters({**one.counters.values, "local_draft_overruns": 20.0}))
        if one.cell == cell
        else one
        for one in run.batches
    ]
    text = words(report(with_records(run, slow)))
    assert "INVALID" not in text
    assert "slower than their pace in draft_model, concurrency 8 (draft model beside the target 1.7%)" in text
    assert lines_of(report(run), "draft_model_lookup drafts", "1,152")  # each peer's of its own


def test_missed_and_open_bars_are_named() -> None:
    text = report(full_run(times_ms=TIMES_MS | {FAR_MS: 40.0}))
    assert "Bars missed: without lookup ÷ plain, R = 500 ms." in text
    assert lines_of(text, "✗", "R = 500 ms")
    some = report(full_run(options=options(concurrency=(1,), far_rtt_ms=())))
    assert "1 of 4 bars cannot be judged: their rows are missing." in some
    assert "Several streams" not in some


def test_a_run_without_any_figures_can_be_shown(tmp_path: Path) -> None:
    run = full_run(batches=[], trials=[], references=[], ended_by="a server did not start")
    text = report(run)
    assert "INCOMPLETE: a server did not start." in text
    assert "Single stream" not in text
    write(run, tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["rows"] == [] and data["held"] is None
    write(run, markdown_path=tmp_path / "bench.md")


def test_json_has_everything(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    write(full_run(references=[reference(n, (0, None, 0, 0) * 6) for n in range(24)]), path)
    data = json.loads(path.read_text())
    assert (data["command"], data["commit"], data["seconds"]) == ("wanspec bench --check", "abc1234", 3700.0)
    assert (data["complete"], data["ended_by"], data["valid"], data["held"]) == (True, None, True, True)
    assert data["pacing"] == {"target": "35.0+0.1", "draft": "5.0+0.02"}
    assert data["overruns"]["drafter"] == 0 and data["paced_forwards"]["drafter"] == 100 * 24 * (7 + 8) + 2 * 2400
    assert data["references"][1] == {
        "index": 1,
        "name": "module1",
        "kind": "prose",
        "tokens": 24,
        "agreement": 0.75,
        "outside": 0.25,
    }
    assert data["options"]["target_pace"] == "35.0+0.1"
    assert {"machine", "versions", "commit", "seconds", "bars", "faults"} <= data.keys()
    rows = {(row["arm"], row["rtt_ms"], row["concurrency"]): row for row in data["rows"]}
    assert len(rows) == 9 + 7 + 8 + 4
    wanted = {"gamma", "tpot_ms", "ttft_ms", "throughput_tok_s", "tokens_per_step", "local_draft_passes", "drafted"}
    wanted |= {"wasted", "ratio_to_draft_model", "ratio_ci", "ideal_tpot_ms", "ratio_to_ideal", "wait_s", "cpu_target"}
    wanted |= {"p50_ms", "p95_ms", "p99_ms", "ratio_to_draft_model_lookup", "measured_rtt_ms", "accepted_lookup"}
    wanted |= {"target_overruns", "drafter_overruns", "ratio_to_ideal_width", "setting", "rate"}
    assert wanted <= rows["wanspec", 30.0, 1].keys()
    assert (rows["draft_model", None, 1]["gamma"], rows["draft_model", None, 8]["gamma"]) == (4, 3)
    low, high = rows["wanspec", 30.0, 1]["constrained_ci"]
    assert low < rows["wanspec", 30.0, 1]["ratio_to_constrained"] < high
    assert rows["none", None, 1]["acceptance"] is None
    kinds = {(one["arm"], one["rtt_ms"], one["kind"]): one for one in data["kinds"]}
    assert kinds["wanspec", 30.0, "prose"]["prompts"] == 12
    arm = data["arms"]["draft_model"]
    assert arm["settings"] == {"concurrency 1": "γ = 4", "concurrency 8": "γ = 3"}
    assert (arm["lookup"], arm["async_scheduling"]) == ("none", False)
    assert arm["servers"]["draft_model"]["command"][0] == "python"
    assert len(lines_of(path.read_text(), '{"batch": {"cell": ["none", null, 1, null]')) == 24  # one line each


def test_all_figures_can_be_computed_again_from_the_file(tmp_path: Path) -> None:
    made_up = full_run(8)
    # What a journal holds has been written down and read, and has as many digits.
    run = replace(made_up, records=Records(json.loads(json.dumps(made_up.records.as_json()))))
    write(run, tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text())
    again = Result.of_json(data)
    assert figures(again) == figures(run)
    assert again.records.references[0].ranks == run.records.references[0].ranks
    assert json.loads(json.dumps(json_of(again))) == data
    assert page_of(again) == page_of(run)


def test_paths_in_the_checkout_are_told_from_there(tmp_path: Path) -> None:
    root = Path(vllm_wanspec.__file__).resolve().parents[1]
    changes = {"target": str(root / "examples" / "target"), "draft": "/elsewhere/draft", "prompts": root / "p.jsonl"}
    write(full_run(options=options(**changes)), tmp_path / "bench.json")
    shown = json.loads((tmp_path / "bench.json").read_text())["options"]
    assert [shown[name] for name in changes] == ["examples/target", "/elsewhere/draft", "p.jsonl"]


def test_ranks_that_nobody_asked_for_are_no_disagreement(tmp_path: Path) -> None:
    run = full_run(references=[reference(0, (None,) * 30)], options=options(target_pace=None))
    write(run, tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["references"][0]["agreement"] is None and data["references"][0]["outside"] is None
    assert data["pacing"] is None


def test_files_that_cannot_be_written_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(WanspecError, match=r"^--json: cannot write .*: Is a directory$"):
        write(full_run(prompts=2), tmp_path)
    (tmp_path / "bench.md").mkdir()
    with pytest.raises(WanspecError, match="--markdown: cannot write"):
        write(full_run(prompts=2), markdown_path=tmp_path / "bench.md")


def test_the_page_has_sound_tables_and_the_plot(tmp_path: Path) -> None:
    write(full_run(), markdown_path=tmp_path / "bench.md")
    page = (tmp_path / "bench.md").read_text()
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 9
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert "- `wanspec_dead`: remote drafts where nobody answers" in page
    assert "## How it was measured" in page
    if importlib.util.find_spec("matplotlib") is not None:
        assert "](bench.png)" in page
        assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "run",
    [
        full_run(2, options=options(arms=("none",), concurrency=(1,))),
        full_run(2, options=options(arms=("wanspec",), rtt_ms=(0.0,), concurrency=(1,))),
        full_run(2, options=options(concurrency=(8,), concurrent_arms=("none",))),
        full_run(2, options=options(concurrency=(2, 8), concurrent_arms=("wanspec",), concurrent_rtt_ms=(5.0,)),
                 times_ms={5.0: 9.0}),
        full_run(2, batches=[]),
    ],
)  # fmt: skip
def test_plots_of_parts_of_the_bench(run: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw_figures(figures(run), tmp_path / "bench.png", "not paced")


def test_without_matplotlib_the_page_has_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_figures(figures(full_run(2)), tmp_path / "bench.png", "")
    write(full_run(2), markdown_path=tmp_path / "bench.md")
    assert "![" not in (tmp_path / "bench.md").read_text()
    assert not (tmp_path / "bench.png").exists()


def test_tree_arms_stand_beside_the_others(tmp_path: Path) -> None:
    trees = tree_arms("--trees", "wide=running_branches=64; plain=off")
    run = full_run(2, options=options(arms=("none", "wanspec"), rtt_ms=(0.0, 20.0), concurrency=(1,)))
    remote = [one for one in run.batches if one.cell.arm == "wanspec"]
    more = [replace(one, cell=one.cell._replace(arm=arm.name)) for arm in trees for one in remote]
    idle = [replace(one, counters=Counters({"drafted_tokens": 0})) for one in more if one.cell.arm == "plain"]
    batches = [*run.batches, *(one for one in more if one.cell.arm == "wide"), *idle]
    run = replace(with_records(run, batches), options=replace(run.options, arms=(*run.options.arms, *trees)))
    page = page_of(run)
    assert lines_of(page, "| wide | 0 |") and lines_of(page, "| wide | 20 |") and lines_of(page, "| plain | 20 |")
    assert "- `wide`: remote drafts without prompt lookup, asking for `running_branches=64`" in page
    assert "Nothing was drafted" not in page  # an arm that opts out of drafts has none
    if importlib.util.find_spec("matplotlib") is not None:
        assert draw_figures(figures(run), tmp_path / "bench.png", "")
