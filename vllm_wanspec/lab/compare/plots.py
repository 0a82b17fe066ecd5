"""The plots of `wanspec bench`: time per token and draft passes against R, throughput against load, a CDF of gaps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_wanspec.lab.compare.figures import PEERS, Figures
from vllm_wanspec.lab.compare.rows import MIN_RUNS, Row
from vllm_wanspec.lab.report.plotting import draw_panels

#: Tree arms take the next free colours.
COLOURS = {
    "none": "0.35",
    "none_constrained": "0.6",
    "ngram": "C2",
    "lookup": "C6",
    "draft_model": "C1",
    "draft_model_lookup": "C8",
    "oracle": "C4",
    "wanspec": "C0",
    "wanspec_no_lookup": "C7",
    "wanspec_no_wait": "C9",
    "wanspec_dead": "C3",
    "wanspec_random": "C5",
}
#: Drawn as horizontal lines: no round trip changes them.
LEVEL_ARMS = ("none", "ngram", "lookup", "draft_model", "draft_model_lookup", "oracle")
#: Where one round trip has to stand for all, the measured one next to this is taken.
SHOWN_RTT_MS = 30.0
#: Between tokens, gaps of these arms are drawn.
GAP_ARMS = ("none", "draft_model", "draft_model_lookup", "wanspec", "wanspec_no_lookup")
#: Round trips are drawn to scale up to here, beyond on a logarithmic scale.
LINEAR_RTT_MS = 100.0


def draw_figures(found: Figures, path: Path, title: str) -> bool:
    """Draw the four panels under a title; whether there is a picture.

    Raises:
        WanspecError: The file cannot be written.
    """

    def draw(times: Any, speeds: Any, passes: Any, gaps: Any) -> None:
        _plot_times(times, found)
        _plot_speeds(speeds, found)
        _plot_passes(passes, found)
        _plot_gaps(gaps, found)

    return draw_panels(path, draw, size=(14.0, 11.0), widths=(1.25, 1.0), rows=2, title=title)


def _style(arm: str) -> dict[str, Any]:
    return {"color": COLOURS.get(arm), "marker": "o", "markersize": 4}


def _remote(found: Figures) -> list[str]:
    """Arms that were measured at round trips."""
    return list(dict.fromkeys(row.cell.arm for row in found.rows if row.cell.rtt_ms is not None))


def _line(found: Figures, arm: str) -> list[tuple[float, Row]]:
    """An arm's rows of a single stream by round trip, rising."""
    rows = [row for row in found.rows if row.cell.arm == arm and row.cell.single]
    return sorted(((row.cell.rtt_ms, row) for row in rows if row.cell.rtt_ms is not None), key=lambda one: one[0])


def _plot_times(axes: Any, found: Figures) -> None:
    for arm in LEVEL_ARMS:
        level = found.row(arm)
        if level is not None and level.tpot_ms is not None:
            dashes = "--" if arm in PEERS else ":"
            axes.axhline(level.tpot_ms, color=COLOURS[arm], linewidth=1.6, linestyle=dashes, label=arm)
    for arm in _remote(found):
        points = [(rtt_ms, row.tpot_ms, _error_ms(row)) for rtt_ms, row in _line(found, arm) if row.tpot_ms is not None]
        if points:
            rtts_ms, paces, errors = zip(*points, strict=True)
            bars = list(zip(*errors, strict=True))
            axes.errorbar(rtts_ms, paces, yerr=bars, label=arm, **_style(arm), capsize=3)
    for arm in ("wanspec", "wanspec_no_lookup"):
        line = _line(found, arm)
        ideal = [(rtt_ms, row.ideal_tpot_ms) for rtt_ms, row in line if row.ideal_tpot_ms is not None]
        if ideal:
            axes.plot(*zip(*ideal, strict=True), color=COLOURS[arm], linestyle="--", linewidth=1, label=f"{arm}, ideal")
    axes.set_ylabel("time per token, ms")
    axes.set_title("single stream; bars: 95 %, paired by prompt", fontsize=10)
    axes.set_ylim(bottom=0.0)
    _finish(axes, _trips(found))


def _error_ms(row: Row) -> tuple[float, float]:
    """How far the interval of the ratio to draft_model (else to plain) reaches below and above, in ms per token."""
    ratio = row.to_draft_model or row.to_constrained or row.to_none
    if ratio is None or row.tpot_ms is None or not ratio.value:
        return 0.0, 0.0
    scale = row.tpot_ms / ratio.value
    return max(0.0, (ratio.value - ratio.low) * scale), max(0.0, (ratio.high - ratio.value) * scale)


def _plot_passes(axes: Any, found: Figures) -> None:
    for arm in PEERS:
        level = found.row(arm)
        if level is not None and level.passes_per_token is not None:
            axes.axhline(level.passes_per_token, color=COLOURS[arm], linestyle="--", label=arm)
    for arm in _remote(found):
        line = _line(found, arm)
        points = [(rtt_ms, row.passes_per_token) for rtt_ms, row in line if row.passes_per_token is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=arm, **_style(arm), clip_on=False)
    axes.set_ylabel("draft passes on the target's side per token")
    axes.set_title("single stream", fontsize=10)
    axes.set_ylim(bottom=0.0)
    _finish(axes, _trips(found))


def _trips(found: Figures) -> list[float]:
    return sorted({rtt_ms for arm in _remote(found) for rtt_ms, _ in _line(found, arm)})


def _finish(axes: Any, trips_ms: Sequence[float]) -> None:
    """Label the axis of round trips, and the lines."""
    far = bool(trips_ms) and trips_ms[-1] > LINEAR_RTT_MS
    if far:
        axes.set_xscale("symlog", linthresh=LINEAR_RTT_MS, linscale=2.0)
    if trips_ms:
        margin = 0.04 * min(trips_ms[-1] - trips_ms[0], LINEAR_RTT_MS) or 1.0
        axes.set_xlim(trips_ms[0] - margin, trips_ms[-1] + (0.1 * trips_ms[-1] if far else margin))
        axes.set_xticks(trips_ms, [f"{rtt_ms:g}" for rtt_ms in trips_ms])
        axes.set_xticks([], minor=True)
    axes.set_xlabel("round trip R, ms" + (f" (logarithmic above {LINEAR_RTT_MS:g})" if far else ""))
    _legend(axes)


def _legend(axes: Any) -> None:
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _nearest(rows: Sequence[Row]) -> list[Row]:
    """Those without a round trip, and of the others those with the one to show."""
    trips_ms = {row.cell.rtt_ms for row in rows if row.cell.rtt_ms is not None}
    shown_ms = min(trips_ms, key=lambda rtt_ms: abs(rtt_ms - SHOWN_RTT_MS), default=None)
    return [row for row in rows if row.cell.rtt_ms in (None, shown_ms)]


def _plot_speeds(axes: Any, found: Figures) -> None:
    """Throughput; of arms with a round trip at the one to show."""
    rows = [row for row in found.rows if row.cell.rate is None]
    several = _nearest([row for row in rows if row.cell.concurrency > 1] or rows)
    ticks: set[int] = set()
    for arm in dict.fromkeys(row.cell.arm for row in several):
        trip_ms = next(row.cell.rtt_ms for row in several if row.cell.arm == arm)
        points = [
            (row.cell.concurrency, row.throughput_tok_s, min(row.throughput_runs), max(row.throughput_runs))
            for row in rows
            if row.cell.arm == arm and row.cell.rtt_ms == trip_ms and row.throughput_tok_s is not None
        ]
        if not points:
            continue
        streams, speeds, lows, highs = zip(*sorted(points), strict=True)
        bars = [
            [max(0.0, speed - low) for speed, low in zip(speeds, lows, strict=True)],
            [max(0.0, high - speed) for speed, high in zip(speeds, highs, strict=True)],
        ]
        name = next(row.name for row in several if row.cell.arm == arm)
        axes.errorbar(streams, speeds, yerr=bars, label=name, **_style(arm), capsize=3)
        ticks |= set(streams)
    if ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
        axes.set_xticks([], minor=True)
    axes.set_xlabel("requests at a time")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0.0)
    once = all(len(row.throughput_runs) < MIN_RUNS for row in several)
    axes.set_title(f"throughput; {'each measured once' if once else 'bars: lowest and highest repeat'}", fontsize=10)
    _legend(axes)


def _plot_gaps(axes: Any, found: Figures) -> None:
    """How long the next token takes: share of the tokens that come within a time after the one before."""
    rows = [row for row in found.rows if row.cell.single and row.cell.arm in GAP_ARMS]
    for row in _nearest(rows):
        if row.gaps_ms:
            shares = [(place + 1) / len(row.gaps_ms) for place in range(len(row.gaps_ms))]
            axes.step(row.gaps_ms, shares, where="post", color=COLOURS.get(row.cell.arm), label=row.name)
    axes.set_xlabel("time between a token and the next, ms (0: in one step)")
    axes.set_ylabel("share of the tokens")
    axes.set_ylim(0.0, 1.0)
    axes.set_title("single stream", fontsize=10)
    _legend(axes)
