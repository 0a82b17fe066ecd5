"""The result of `wanspec bench`: tables and sentences for people, and the result file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_wanspec.lab.compare.figures import Bar, Figures, figures
from vllm_wanspec.lab.compare.plots import draw_figures
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.rows import Row
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.records import Batch, Reference
from vllm_wanspec.lab.report.cells import MARKS, UNKNOWN, interval, number, share, spread
from vllm_wanspec.lab.report.document import Column, Document, Table, table_of
from vllm_wanspec.lab.report.writing import Publication
from vllm_wanspec.lab.stats import rounded

BATCH_COLUMNS = ("arm", "rtt_ms", "concurrency", "repeat", "seconds", "cpu_target", "cpu_drafter", "ties", "wrong")
REQUEST_COLUMNS = ("prompt", "ttft_ms", "time_ms", "tokens", "steps")
#: Lists of the result file with one line for each of their many entries.
FLAT = ("rows", "references", "batches")


def _trip(row: Row) -> str:
    return UNKNOWN if row.cell.rtt_ms is None else f"{row.cell.rtt_ms:g}"


def _passes(row: Row) -> str:
    about = "≈ " if row.passes_estimated and row.local_draft_passes else ""
    return about + number(row.local_draft_passes)


ARM: Column[Row] = ("arm", lambda row: row.cell.arm)
TRIP: Column[Row] = ("R ms", _trip)
STREAMS: Column[Row] = ("streams", lambda row: str(row.cell.concurrency))
PER_TOKEN: Column[Row] = ("ms per token", lambda row: number(row.tpot_ms, 2))
TO_COLOCATED: Column[Row] = ("÷ co-located (95 %)", lambda row: interval(row.to_draft_model))
TO_PLAIN: Column[Row] = ("÷ plain constrained (95 %)", lambda row: interval(row.to_constrained))
PER_STEP: Column[Row] = ("tokens per step", lambda row: number(row.tokens_per_step, 2))
PASSES: Column[Row] = ("local passes", _passes)
FIRST: Column[Row] = ("first token ms", lambda row: number(row.ttft_ms, 1))

SINGLE_COLUMNS: list[Column[Row]] = [
    ARM,
    TRIP,
    PER_TOKEN,
    TO_COLOCATED,
    TO_PLAIN,
    ("ideal ms", lambda row: number(row.ideal_tpot_ms, 2)),
    ("÷ ideal", lambda row: UNKNOWN if row.to_ideal is None else f"{row.to_ideal.value:.3f}"),
    PER_STEP,
    PASSES,
    FIRST,
]
CONCURRENT_COLUMNS: list[Column[Row]] = [
    ARM,
    TRIP,
    STREAMS,
    ("tokens/s", lambda row: number(row.throughput_tok_s, 1)),
    ("of the repeats", lambda row: spread(row.throughput_runs)),
    PER_TOKEN,
    TO_COLOCATED,
    ("÷ plain (95 %)", TO_PLAIN[1]),
    PER_STEP,
    PASSES,
    FIRST,
]
DETAIL_COLUMNS: list[Column[Row]] = [
    ARM,
    TRIP,
    STREAMS,
    ("median ms", lambda row: number(row.median_tpot_ms, 2)),
    ("÷ none (95 %)", lambda row: interval(row.to_none)),
    ("tokens/s", lambda row: number(row.throughput_tok_s, 1)),
    ("accepted", lambda row: share(row.acceptance)),
    ("drafted", lambda row: number(row.drafted)),
    ("wasted", lambda row: number(row.wasted)),
    ("bytes up", lambda row: number(row.bytes_up_per_token)),
    ("bytes down", lambda row: number(row.bytes_down_per_token)),
    ("waits", lambda row: number(row.waits)),
    ("waited s", lambda row: number(row.wait_s, 2)),
    ("target CPU", lambda row: share(row.cpu_target)),
    ("drafter CPU", lambda row: share(row.cpu_drafter)),
    ("ties", lambda row: number(row.ties)),
    ("wrong", lambda row: number(row.wrong)),
]
SINGLE_NOTE = (
    "`co-located`: arm `draft_model`, paired by prompt. `plain constrained`: arm `none_constrained`. `ideal`: what a "
    "drafter across this round trip could do at best for this pair, computed from its recorded texts. `local passes`: "
    "forward passes of a draft model on the target's side, in the whole run."
)
CONCURRENT_NOTE = (
    "`plain`: arm `none_constrained` where it was measured, else `none`. Co-located passes (≈) are inferred from how "
    "many requests ran at a time."
)
DETAIL_NOTE = (
    "`accepted`: share of the verified drafts. `drafted`: tokens that a draft model computed; `wasted`: those of them "
    "that the target did not take. Bytes: per token, to the drafter (up) and from it. `waited`: by the rule for late "
    "drafts. CPU: processor time per second, 100 % is one core."
)


def bench_report(run: Result) -> Publication:
    """Return what is published of a run."""
    found = figures(run)
    return Publication(
        document(run, found), as_json(run, found), FLAT, draw=lambda path: draw_figures(found, path, run.pacing)
    )


METHOD = (
    "Ratios: sums over prompts, paired by prompt; intervals: 95 %, bootstrap over prompts (of throughput: over "
    "repeats). The proxy's round trip is changed without a restart."
)
BAR_TITLES = ("", "time per token, or what else is said", "at most", "is", "95 % up to")
BAR_NOTE = f"The upper end of the interval is judged. {UNKNOWN}: this run cannot tell."


def document(run: Result, found: Figures) -> Document:
    """Return the result for people."""
    measured = dict.fromkeys(row.cell.arm for row in found.rows)
    arms = "\n".join(f"- `{name}`: {run.options.arm(name).text}" for name in measured)
    return Document(
        title="Remote drafting beside the alternatives",
        tables=[Table("What was asked for", BAR_TITLES, _bar_rows(found), 2, BAR_NOTE), *_tables(run, found)],
        warnings=_warnings(run, found),
        remarks=_remarks(run, found),
        method=[arms, run.conditions(f"{len(run.references)} prompts, the same in all arms"), METHOD],
        provenance=str(run.provenance),
        plots="time per token, local draft passes, throughput",
        conditions=run.pacing,
    )


def _tables(run: Result, found: Figures) -> Iterator[Table]:
    single = [row for row in found.rows if row.cell.concurrency == 1]
    several = [row for row in found.rows if row.cell.concurrency > 1]
    for title, columns, rows, keys, note in (
        ("Single stream", SINGLE_COLUMNS, single, 2, SINGLE_NOTE),
        ("Several streams at a time", CONCURRENT_COLUMNS, several, 3, CONCURRENT_NOTE),
        ("Details", DETAIL_COLUMNS, found.rows, 3, DETAIL_NOTE),
    ):
        if rows:
            yield table_of(title, columns, rows, keys, note=note, wrong=lambda row: bool(row.wrong))
    if run.trials:
        trials = [[f"{gamma}{' (best)' * (gamma == run.gamma)}", f"{ms:.2f}"] for gamma, ms in sorted(run.trials)]
        yield Table("Co-located draft model: pre-pass", ["γ", "ms per token"], trials)
    yield from run.pace_tables()


def _bar_rows(found: Figures) -> list[list[str]]:
    def cells(bar: Bar) -> list[str]:
        text = bar.text + (" (hoped for)" if bar.stretch else "")
        digits = 3 if bar.limit else 0  # nothing but counts may be 0 at most
        return [MARKS[bar.held], text, *(number(value, digits) for value in (bar.limit, bar.value, bar.upper))]

    return list(map(cells, found.bars))


def _remarks(run: Result, found: Figures) -> list[str]:
    texts = []
    missed = [bar.text for bar in found.bars if bar.held is False and not bar.stretch]
    unknown = sum(bar.held is None and not bar.stretch for bar in found.bars)
    if found.doubts:
        texts.append(f"Bars are not judged: {'; '.join(found.doubts)}.")
    elif found.held:
        texts.append("All bars hold.")
    else:
        texts += [f"Bars missed: {'; '.join(missed)}."] if missed else []
        texts += [f"{unknown} of {len(found.bars)} bars cannot be judged: their rows are missing."] if unknown else []
    if run.gamma is not None:
        texts.append(f"The co-located draft model runs at its best γ, {run.gamma}.")
    for row in found.rows:
        bare = found.row("wanspec_no_wait", row.cell.rtt_ms, row.cell.concurrency)
        if row.cell.arm == "wanspec" and bare is not None and row.cell.concurrency > 1:
            with_ms, without_ms = number(row.ttft_ms, 1), number(bare.ttft_ms, 1)
            at = f"{row.cell.concurrency} streams, R = {_trip(row)} ms"
            texts.append(f"First token at {at}: {with_ms} ms with the rule for late drafts, {without_ms} ms without.")
    return texts


def _warnings(run: Result, found: Figures) -> list[str]:
    remote = {arm.name for arm in run.options.started if arm.is_remote and arm.drafts}
    idle = dict.fromkeys(row.cell.arm for row in found.rows if row.cell.arm in remote and row.drafted == 0)
    return run.warnings(run.kept_pace()) + ([f"Nothing was drafted in {', '.join(idle)}."] if idle else [])


def as_json(run: Result, found: Figures) -> dict[str, Any]:
    """Return the result file's content."""
    options = run.options
    counters = sorted({name for batch in run.batches for name in batch.counters.values})
    ranked = any(rank is not None for reference in run.references for rank in reference.ranks)
    return {
        **run.state_json(run.kept_pace()),
        "held": found.held,
        "doubts": list(found.doubts),
        "bars": [bar.as_json() for bar in found.bars],
        "pacing": run.pacing_json(),
        "time_scale": options.time_scale,
        "gamma": run.gamma,
        "trials": [{"gamma": trial.gamma, "tpot_ms": rounded(trial.tpot_ms)} for trial in run.trials],
        "rows": [row.as_json() for row in found.rows],
        "differences": list(run.wrong),
        **run.overruns_json(),
        "references": [_reference_json(reference, ranked) for reference in run.references],
        "batch_columns": [*BATCH_COLUMNS, "requests", *counters],
        "request_columns": list(REQUEST_COLUMNS),
        "batches": [_batch_json(batch, counters) for batch in run.batches],
        "options": {name: _shown(value) for name, value in options.as_json().items()},
        **run.provenance.as_json(),
    }


def _shown(value: Any) -> Any:
    """An option's value; a path in the checkout without the way to the checkout."""
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    root = machine.checkout()
    return str(Path(value).relative_to(root)) if Path(value).is_relative_to(root) else value


def _reference_json(reference: Reference, ranked: bool) -> dict[str, Any]:
    """A prompt without its text: how long the target's own is, and how often the draft model agrees with it."""
    ranks = reference.ranks if ranked else ()
    return {
        "index": reference.index,
        "name": reference.name,
        "tokens": len(reference.expected),
        "agreement": rounded(ranks.count(0) / len(ranks)) if ranks else None,
        "outside": rounded(ranks.count(None) / len(ranks)) if ranks else None,
    }


def _batch_json(batch: Batch, counters: Sequence[str]) -> list[Any]:
    figures = (batch.seconds, batch.cpu_s.get("target"), batch.cpu_s.get("drafter"))
    requests = [[rounded(getattr(request, name)) for name in REQUEST_COLUMNS] for request in batch.requests]
    increases = [rounded(batch.counters.get(name)) for name in counters]
    return [*batch.cell, batch.repeat, *map(rounded, figures), len(batch.ties), len(batch.wrong), requests, *increases]
