"""The result of `wanspec bench`: tables and sentences for people, and the result file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_wanspec.lab.compare.figures import Bar, Figures, KindRow, figures, kind_rows
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.plots import draw_figures
from vllm_wanspec.lab.compare.result import Result, label
from vllm_wanspec.lab.compare.rows import Row
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE
from vllm_wanspec.lab.records import Reference
from vllm_wanspec.lab.report.cells import MARKS, UNKNOWN, interval, number, share
from vllm_wanspec.lab.report.document import Column, Document, Table, table_of
from vllm_wanspec.lab.report.writing import Publication
from vllm_wanspec.lab.stats import rounded

#: Lists of the result file with one line for each of their many entries.
FLAT = ("rows", "kinds", "references", "records")


def _trip(row: Row) -> str:
    return UNKNOWN if row.cell.rtt_ms is None else f"{row.cell.rtt_ms:g}"


def _load(row: Row) -> str:
    return f"{row.cell.concurrency}" if row.cell.rate is None else f"{row.cell.rate:g}/s"


def _setting(row: Row) -> str:
    return UNKNOWN if row.setting is None else str(row.setting)


ARM: Column[Row] = ("arm", lambda row: row.cell.arm)
TRIP: Column[Row] = ("R ms", _trip)
STREAMS: Column[Row] = ("streams", _load)
PER_TOKEN: Column[Row] = ("ms per token", lambda row: number(row.tpot_ms, 2))
TO_COLOCATED: Column[Row] = ("÷ co-located (95 %)", lambda row: interval(row.to_draft_model))
TO_BEHIND: Column[Row] = ("÷ co-located with lookup (95 %)", lambda row: interval(row.to_draft_model_lookup))
TO_PLAIN: Column[Row] = ("÷ plain (95 %)", lambda row: interval(row.to_none))
PER_STEP: Column[Row] = ("tokens per step", lambda row: number(row.tokens_per_step, 2))
PASSES: Column[Row] = ("local passes", lambda row: number(row.local_draft_passes))
FIRST: Column[Row] = ("first token ms", lambda row: number(row.ttft_ms, 1))

SINGLE_COLUMNS: list[Column[Row]] = [ARM, TRIP, PER_TOKEN, TO_COLOCATED, TO_BEHIND, TO_PLAIN, PER_STEP, PASSES, FIRST]
CONCURRENT_COLUMNS: list[Column[Row]] = [
    ARM,
    TRIP,
    STREAMS,
    ("tokens/s", lambda row: number(row.throughput_tok_s, 1)),
    *SINGLE_COLUMNS[2:],
]
OPEN_COLUMNS: list[Column[Row]] = [
    *CONCURRENT_COLUMNS[:4],
    ("goodput, requests/s", lambda row: number(row.goodput, 2)),
    ("p95 ms", lambda row: number(row.p95_ms, 1)),
    *SINGLE_COLUMNS[2:],
]
SOURCE_COLUMNS: list[Column[Row]] = [
    ARM,
    TRIP,
    STREAMS,
    ("accepted", lambda row: share(row.acceptance)),
    ("from main line", lambda row: number(row.accepted_main_line)),
    ("from branches", lambda row: number(row.accepted_branch)),
    ("from lookup", lambda row: number(row.accepted_lookup)),
    ("drafted", lambda row: number(row.drafted)),
    ("wasted", lambda row: number(row.wasted)),
    ("bytes up", lambda row: number(row.bytes_up_per_token)),
    ("bytes down", lambda row: number(row.bytes_down_per_token)),
    ("waits", lambda row: number(row.waits)),
    ("waited s", lambda row: number(row.wait_s, 2)),
]
IDEAL_COLUMNS: list[Column[Row]] = [
    ARM,
    TRIP,
    PER_TOKEN,
    ("ideal ms", lambda row: number(row.ideal_tpot_ms, 2)),
    ("÷ ideal (95 %)", lambda row: interval(row.to_ideal)),
    ("as wide, ms", lambda row: number(row.ideal_width_tpot_ms, 2)),
    ("÷ as wide (95 %)", lambda row: interval(row.to_ideal_width)),
]
DETAIL_COLUMNS: list[Column[Row]] = [
    ARM,
    TRIP,
    STREAMS,
    ("setting", _setting),
    ("R measured", lambda row: number(row.measured_rtt_ms, 1)),
    ("median ms", lambda row: number(row.median_tpot_ms, 2)),
    ("p50 ms", lambda row: number(row.p50_ms, 1)),
    ("p95 ms", lambda row: number(row.p95_ms, 1)),
    ("p99 ms", lambda row: number(row.p99_ms, 1)),
    ("÷ plain constrained (95 %)", lambda row: interval(row.to_constrained)),
    ("target CPU", lambda row: share(row.cpu_target)),
    ("drafter CPU", lambda row: share(row.cpu_drafter)),
    ("target overruns", lambda row: _percent(row.target_overruns)),
    ("drafter overruns", lambda row: _percent(row.drafter_overruns)),
    ("ties", lambda row: number(row.ties)),
    ("wrong", lambda row: number(row.wrong)),
]
KIND_COLUMNS: list[Column[KindRow]] = [
    ("arm", lambda one: one.row.cell.arm),
    ("R ms", lambda one: _trip(one.row)),
    ("kind", lambda one: one.kind),
    ("prompts", lambda one: number(one.prompts)),
    ("ms per token", lambda one: number(one.tpot_ms, 2)),
    ("÷ co-located (95 %)", lambda one: interval(one.to_draft_model)),
    ("÷ co-located with lookup (95 %)", lambda one: interval(one.to_draft_model_lookup)),
]
SINGLE_NOTE = (
    "`co-located`: arm `draft_model`, which has no lookup; `with lookup`: arm `draft_model_lookup`, which has ours. "
    "Both paired by prompt. `plain`: arm `none`. `local passes`: forwards of a draft model in the target's process, "
    "counted there."
)
SOURCE_NOTE = (
    "`accepted`: share of the verified drafts that the target took, and beside it how many, by who made them; those "
    "of a request's last step count although its text ends before them. `drafted`: tokens that a draft model "
    "computed, of co-located ones those that were verified, without what is drafted after a request's last step; "
    "`wasted`: those of them that the target did not take. Bytes: per token, to the drafter (up) and from it. "
    "`waited`: by the rule for late drafts."
)
IDEAL_NOTE = (
    "`ideal`: each arm at its best for these texts: its round trip, lookup or none, γ; forwards at their paces, and "
    "nothing else takes any time. `as wide`: the same with the alternatives, the depth of branches and the pace of "
    "the drafter's running branches as configured."
)
DETAIL_NOTE = (
    "`p50`, `p95`, `p99`: between a token and the next, over all requests; two that came with one step are 0 ms "
    "apart. `plain constrained`: plain vLLM without async scheduling, which is arm `none` where that has none. `R "
    "measured`: by the link, with the time scale in it. CPU: processor time per second, 100 % is one core. Overruns: "
    "forwards that took longer than their pace."
)


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2%}"


def bench_report(run: Result) -> Publication:
    """Return what is published of a run."""
    found = figures(run)
    return Publication(
        document(run, found), as_json(run, found), FLAT, draw=lambda path: draw_figures(found, path, run.pacing)
    )


METHOD = (
    "Ratios: sums over prompts, paired by prompt; intervals: 95 %, bootstrap over prompts; throughput has none. The "
    "proxy's round trip is changed without a restart. vLLM's own arms run at the settings that were fastest in a "
    "pre-pass, under each load (tables below)."
)
BAR_TITLES = ("", "time per token, or what else is said", "at most", "is", "95 % up to")
BAR_NOTE = f"The upper end of the interval is judged. {UNKNOWN}: this run cannot tell."


def document(run: Result, found: Figures) -> Document:
    """Return the result for people."""
    measured = dict.fromkeys(row.cell.arm for row in found.rows)
    arms = "\n".join(f"- `{name}`: {_described(run, name)}" for name in measured)
    return Document(
        title="Remote drafting beside the alternatives",
        tables=[*_tables(run, found), Table("What was asked for", BAR_TITLES, _bar_rows(found), 2, BAR_NOTE)],
        warnings=_warnings(run, found),
        remarks=_remarks(run, found),
        method=[arms, run.conditions(f"{len(run.references)} prompts, the same in all arms"), METHOD],
        provenance=str(run.provenance),
        plots="time per token, throughput, local draft passes, time between tokens",
        conditions=run.haves,
    )


def _described(run: Result, name: str) -> str:
    """What an arm is and has."""
    arm = run.options.arm(name)
    ahead = run.observed(arm, "async_scheduling")
    scheduling = {True: "async scheduling", False: "no async scheduling", None: "async scheduling not observed"}[ahead]
    lookup = {"ours": "our lookup", "vLLM's": "vLLM's lookup", "none": "no lookup"}[arm.lookup]
    return f"{arm.text} ({lookup}, {scheduling})"


def _tables(run: Result, found: Figures) -> Iterator[Table]:
    single = [row for row in found.rows if row.cell.single]
    several = [row for row in found.rows if row.cell.concurrency > 1]
    at_rates = [row for row in found.rows if row.cell.rate is not None]
    ideal = [row for row in single if row.ideal_tpot_ms is not None]
    for title, columns, rows, keys, note in (
        ("Single stream", SINGLE_COLUMNS, single, 2, SINGLE_NOTE),
        ("Several streams at a time", CONCURRENT_COLUMNS, several, 3, SINGLE_NOTE),
        ("Requests at random times", OPEN_COLUMNS, at_rates, 3, _open_note(run)),
        ("Who the accepted tokens came from", SOURCE_COLUMNS, found.rows, 3, SOURCE_NOTE),
        ("Each arm against its own ideal", IDEAL_COLUMNS, ideal, 2, IDEAL_NOTE),
        ("Details", DETAIL_COLUMNS, found.rows, 3, DETAIL_NOTE),
    ):
        if rows:
            yield table_of(title, columns, rows, keys, note=note, wrong=lambda row: bool(row.wrong))
    if kinds := kind_rows(run, found):
        yield table_of("Single stream, by kind of prompt", KIND_COLUMNS, kinds, 3)
    if run.records.trials:
        yield Table("Pre-pass", ["arm", "load", "setting", "ms per token"], list(_trial_rows(run)), 3)
    yield from run.pace_tables()


def _open_note(run: Result) -> str:
    first_ms, gap_ms = run.options.slo_ms
    return (
        f"`goodput`: the rate × the share of its requests whose first token came within {first_ms:g} ms, and 95 % of "
        f"the others within {gap_ms:g} ms of the one before, these times the time scale; rates are as measured. "
        f"{SINGLE_NOTE}"
    )


def _trial_rows(run: Result) -> Iterator[list[str]]:
    for trial in run.records.trials:
        best = run.setting(run.options.arm(trial.arm), trial.load) == trial.setting
        yield [trial.arm, str(trial.load), f"{trial.setting}{' (best)' * best}", f"{trial.tpot_ms:.2f}"]


def _bar_rows(found: Figures) -> list[list[str]]:
    def cells(bar: Bar) -> list[str]:
        digits = 3 if bar.limit else 0  # nothing but counts may be 0 at most
        return [MARKS[bar.held], bar.text, *(number(value, digits) for value in (bar.limit, bar.value, bar.upper))]

    return list(map(cells, found.bars))


def _remarks(run: Result, found: Figures) -> list[str]:
    missed = [bar.text for bar in found.bars if bar.held is False]
    unknown = sum(bar.held is None for bar in found.bars)
    if found.doubts:
        return [f"Bars are not judged: {'; '.join(found.doubts)}."]
    if found.held:
        return ["All bars hold."]
    texts = [f"Bars missed: {'; '.join(missed)}."] if missed else []
    return texts + (
        [f"{unknown} of {len(found.bars)} bars cannot be judged: their rows are missing."] if unknown else []
    )


def _warnings(run: Result, found: Figures) -> list[str]:
    remote = {arm.name for arm in run.options.started if arm.target.drafter and arm.drafts}
    idle = dict.fromkeys(row.cell.arm for row in found.rows if row.cell.arm in remote and row.drafted == 0)
    texts = run.warnings(run.faults())
    texts += [f"Nothing was drafted in {', '.join(idle)}."] if idle else []
    return texts + doubtful(run, found)


def doubtful(run: Result, found: Figures) -> list[str]:
    """Name the cells in which a side was too slow, though the run as a whole may be valid."""
    slow = [text for row in found.rows if (text := _slow(row))]
    if not slow or run.options.target_pace is None:
        return []
    problem = f"more than {MAX_OVERRUN_SHARE:.0%} of the forwards were slower than their pace"
    return [f"DOUBTFUL: {problem} in {'; '.join(slow)}."]


def _slow(row: Row) -> str:
    """Name a cell in which a side was too slow; nothing where none was."""
    sides = (
        ("target", row.target_overruns),
        ("drafter", row.drafter_overruns),
        ("draft model beside the target", row.local_draft_overruns),
    )
    shares = [f"{side} {share:.1%}" for side, share in sides if share is not None and share > MAX_OVERRUN_SHARE]
    return f"{label(row.cell)} ({', '.join(shares)})" if shares else ""


def as_json(run: Result, found: Figures) -> dict[str, Any]:
    """Return the result file's content."""
    options, faults = run.options, run.faults()
    ranked = any(rank is not None for reference in run.references for rank in reference.ranks)
    return {
        "kind": "bench",
        **run.state_json(not faults),
        "faults": faults,
        "held": found.held,
        "doubts": list(found.doubts),
        "bars": [bar.as_json() for bar in found.bars],
        "pacing": run.pacing_json(),
        "time_scale": options.time_scale,
        "arms": {arm.name: _arm_json(run, arm.name) for arm in options.started},
        "rows": [row.as_json() for row in found.rows],
        "kinds": [one.as_json() for one in kind_rows(run, found)],
        "differences": list(run.wrong),
        **run.overruns_json(),
        "references": [_reference_json(reference, ranked) for reference in run.references],
        "options": shown_options(options),
        "records": run.records.as_json(),
        **run.provenance.as_json(),
    }


def _arm_json(run: Result, name: str) -> dict[str, Any]:
    """What an arm is, has, and was seen to run with."""
    arm = run.options.arm(name)
    servings = [one for one in run.records.servings.values() if name in one.arms]
    return {
        "text": arm.text,
        "lookup": arm.lookup,
        "async_scheduling": run.observed(arm, "async_scheduling"),
        "settings": {str(load): str(run.setting(arm, load) or "") for load in run.options.loads(arm)},
        "servers": {one.server: one.facts for one in servings},
    }


def shown_options(options: Options) -> dict[str, Any]:
    """Return the options as result files have them: without the way to the checkout."""
    values = options.as_json().items()
    return {name: machine.portable(value) if isinstance(value, str) else value for name, value in values}


def _reference_json(reference: Reference, ranked: bool) -> dict[str, Any]:
    """A prompt without its text: how long the target's own is, and how often the draft model agrees with it."""
    ranks = reference.ranks if ranked else ()
    return {
        "index": reference.index,
        "name": reference.name,
        "kind": reference.kind,
        "tokens": len(reference.expected),
        "agreement": rounded(ranks.count(0) / len(ranks)) if ranks else None,
        "outside": rounded(ranks.count(None) / len(ranks)) if ranks else None,
    }
