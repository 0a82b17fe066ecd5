"""The page of ``make bench-more``: a table for each condition, and two sentences on what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_wanspec.lab.compare.figures import Figures, figures
from vllm_wanspec.lab.compare.plots import COLOURS
from vllm_wanspec.lab.compare.report import (
    ARM,
    CONCURRENT_COLUMNS,
    OPEN_COLUMNS,
    SINGLE_COLUMNS,
    STREAMS,
    TRIP,
    doubtful,
)
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.rows import Row
from vllm_wanspec.lab.compare.studies import BASE, RTT_MS, STUDIES
from vllm_wanspec.lab.report.cells import interval, number
from vllm_wanspec.lab.report.document import Column, Document, Table, table_of
from vllm_wanspec.lab.report.plotting import draw_panels
from vllm_wanspec.lab.report.writing import Publication
from vllm_wanspec.lab.stats import Interval

#: Remote drafts without lookup and with it, each with the row's ratio to the peer that has the same.
PAIRS: tuple[tuple[str, str, Callable[[Row], Interval | None]], ...] = (
    ("without lookup on either side", "wanspec_no_lookup", lambda row: row.to_draft_model),
    ("with ours on both", "wanspec", lambda row: row.to_draft_model_lookup),
)
TO_IDEAL: Column[Row] = ("÷ ideal (95 %)", lambda row: interval(row.to_ideal))
COLUMNS: dict[str, Sequence[Column[Row]]] = {
    "streams": CONCURRENT_COLUMNS,
    "rates": OPEN_COLUMNS,
    "scale5": (*SINGLE_COLUMNS, TO_IDEAL),
    "useless": (ARM, TRIP, STREAMS, *SINGLE_COLUMNS[2:3], ("÷ plain (95 %)", lambda row: interval(row.to_none))),
}


def more_report(results: Mapping[str, Result]) -> Publication:
    """Return what is published of some studies, by name."""
    found = {name: figures(result) for name, result in results.items()}
    return Publication(_document(results, found), {}, draw=lambda path: _draw(found, path))


def _document(results: Mapping[str, Result], found: Mapping[str, Figures]) -> Document:
    warnings = [
        f"{name}: {text}"
        for name, result in results.items()
        for text in (*result.warnings(result.faults()), *doubtful(result, found[name]))
    ]
    sources = [f"- {name}: {result.provenance}" for name, result in results.items()]
    said = {
        name: f"- {name}: {result.conditions(f'{len(result.references)} prompts')}" for name, result in results.items()
    }
    return Document(
        title="Remote drafting under further conditions",
        tables=[_table(name, results[name], found) for name in results],
        warnings=warnings,
        remarks=[],
        method=["\n".join(said), "Intervals: 95 %, over prompts. Raw data: one file for each condition."],
        provenance="\n".join(sources),
        plots="what each condition does",
    )


def _table(name: str, result: Result, found: Mapping[str, Figures]) -> Table:
    rows = found[name].rows
    made = table_of(STUDIES[name].title, COLUMNS.get(name, SINGLE_COLUMNS), rows, 2, note=result.haves)
    return replace(made, remarks=list(sentences(name, found)))


def sentences(name: str, found: Mapping[str, Figures]) -> Iterable[str]:
    """Say in two sentences what a study found."""
    rows = found[name].rows
    if name == "useless":
        for streams in (1, 8):
            parts = [
                f"{row.cell.arm} {interval(row.to_none)}"
                for row in rows
                if row.cell.concurrency == streams and row.cell.arm != "none"
            ]
            yield f"At {streams} streams, time per token ÷ plain: {', '.join(parts)}."
        return
    for text, arm, ratio in PAIRS:
        own = [row for row in rows if row.cell.arm == arm]
        if name == "rates":
            yield f"Goodput {text}, requests per second: {_pairs(own, rows, arm, lambda row: number(row.goodput, 2))}."
        elif name == "streams":
            speeds = _pairs(own, rows, arm, lambda row: number(row.throughput_tok_s, 0))
            yield f"Tokens per second {text}: {speeds}."
        elif name == "scale5":
            if own:
                shares = ", ".join(f"{_ratio(row.to_ideal)} at R = {row.cell.rtt_ms:g} ms" for row in own)
                yield f"Where fixed costs vanish remote drafts take so many times the ideal's time: {shares}."
                against = ", ".join(f"{interval(ratio(row))} at R = {row.cell.rtt_ms:g} ms" for row in own)
                yield f"Of co-located drafting's time they take {against}."
        elif own:
            before = found[BASE].row(arm, RTT_MS) if BASE in found and name != BASE else None
            changed = "" if before is None else f"; with nothing changed {interval(ratio(before))}"
            yield f"Time per token of remote drafts ÷ co-located ones, {text}: {interval(ratio(own[0]))}{changed}."


def _ratio(value: Interval | None) -> str:
    return "–" if value is None else f"{value.value:.2f}"


def _pairs(own: Sequence[Row], rows: Sequence[Row], arm: str, show: Callable[[Row], str]) -> str:
    """A figure of remote drafts beside the peer's, load by load."""
    peer = {"wanspec": "draft_model_lookup", "wanspec_no_lookup": "draft_model"}[arm]
    peers = {row.cell.load: row for row in rows if row.cell.arm == peer}
    parts = [
        f"{show(row)} remote, {show(peers[row.cell.load])} co-located at {row.cell.load}"
        for row in own
        if row.cell.load in peers
    ]
    return "; ".join(parts)


def _draw(found: Mapping[str, Figures], path: Path) -> bool:
    def draw(conditions: Any, streams: Any, rates: Any, scale: Any) -> None:
        _draw_conditions(conditions, found)
        _draw_loads(streams, found, "streams", lambda row: row.throughput_tok_s, "tokens per second")
        _draw_loads(rates, found, "rates", lambda row: row.goodput, "requests per second that were fast enough")
        _draw_ideal(scale, found)

    return draw_panels(path, draw, size=(13.0, 9.5), widths=(1.2, 1.0), rows=2)


def _draw_conditions(axes: Any, found: Mapping[str, Figures]) -> None:
    names = [name for name in found if name not in COLUMNS]
    for place, (text, arm, ratio) in enumerate(PAIRS):
        points = [
            (spot, made) for spot, name in enumerate(names) if (made := _made(found[name], arm, ratio)) is not None
        ]
        for spot, made in points:
            bars = [[made.value - made.low], [made.high - made.value]]
            label = text if spot == points[0][0] else None
            at = spot + 0.2 * (place - 0.5)
            axes.errorbar([at], [made.value], yerr=bars, fmt="o", color=COLOURS[arm], capsize=4, label=label)
    axes.axhline(1.0, color="0.5", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("time per token ÷ co-located")
    axes.set_title(f"one stream, R = {RTT_MS:g} ms; bars: 95 %", fontsize=10)
    _legend(axes)


def _bars(axes: Any, points: Sequence[tuple[float, Interval]], colour: str, label: str | None = None) -> None:
    """Draw values with their intervals."""
    ends = [[one.value - one.low for _, one in points], [one.high - one.value for _, one in points]]
    places, values = [place for place, _ in points], [one.value for _, one in points]
    axes.errorbar(places, values, yerr=ends, fmt="o", color=colour, capsize=4, label=label)


def _made(found: Figures, arm: str, ratio: Callable[[Row], Interval | None]) -> Interval | None:
    row = found.row(arm, RTT_MS)
    return None if row is None else ratio(row)


def _draw_loads(
    axes: Any, found: Mapping[str, Figures], name: str, show: Callable[[Row], float | None], title: str
) -> None:
    rows = found[name].rows if name in found else ()
    for arm in dict.fromkeys(row.cell.arm for row in rows):
        own = [(row.cell.rate or row.cell.concurrency, show(row)) for row in rows if row.cell.arm == arm]
        known = [(load, value) for load, value in own if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", markersize=4, color=COLOURS.get(arm), label=arm)
    axes.set_xlabel("requests at a time" if name == "streams" else "requests per second, at random times")
    axes.set_ylabel(title)
    axes.set_ylim(bottom=0.0)
    _legend(axes)


def _draw_ideal(axes: Any, found: Mapping[str, Figures]) -> None:
    rows = [row for row in found["scale5"].rows if row.cell.rtt_ms is not None] if "scale5" in found else []
    points = [(row.cell.rtt_ms or 0.0, row.to_ideal) for row in rows if row.to_ideal is not None]
    if points:
        _bars(axes, points, COLOURS["wanspec_no_lookup"])
    axes.set_xlabel("round trip R, ms")
    axes.set_ylabel("time per token ÷ the ideal's, without lookup")
    axes.set_ylim(bottom=0.0)
    axes.set_title("paces and R five times as long", fontsize=10)
    axes.grid(alpha=0.25)


def _legend(axes: Any) -> None:
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
