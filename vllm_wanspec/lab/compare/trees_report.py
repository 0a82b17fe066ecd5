"""The tree bench's result: tables and sentences for people, the result file, and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_wanspec.core.learned.calibration import OUTCOMES
from vllm_wanspec.lab.compare.arms import DRAFTER
from vllm_wanspec.lab.compare.trees_figures import (
    DEFAULT_ARM,
    MAIN_LINE,
    MAX_RATIO,
    MIN_PROMPTS,
    ArmFigures,
    TreesFigures,
)
from vllm_wanspec.lab.harness.counters import COUNTERS
from vllm_wanspec.lab.harness.models import MIN_CUT
from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE
from vllm_wanspec.lab.records import Batch, Reference
from vllm_wanspec.lab.report.cells import interval, number, share
from vllm_wanspec.lab.report.document import Column, Document, Table, table_of
from vllm_wanspec.lab.report.plotting import draw_panels
from vllm_wanspec.lab.report.writing import Publication
from vllm_wanspec.lab.stats import Timed, rounded

ROW_COLUMNS = ("prompt", "repeat", "arm", "time_ms", "timed_tokens", "elapsed_s", *COUNTERS)
#: Lists of the result file with one line for each of their many entries.
FLAT = ("rows",)
MAIN_NOTE = (
    "`nodes drafted`: tokens that the draft model computed. `running branches`: mean over the requests' time. `branch "
    "hits`: commits that left the most probable path but stayed in the tree; `misses`: commits that left it."
)
DETAIL_NOTE = (
    "`off`: the target alone. `nodes sent`: alternatives included. `no draft`: commits made while an earlier one was "
    "still unknown to the tree. `late`: positions whose drafts came after they were committed. `withheld`: steps whose "
    "drafts would have cost more than they yield."
)
OUTCOME_NOTE = (
    "Where the target took the draft model's best token (agreed), and what became of the other positions, its misses."
)


def _count(name: str, title: str = "") -> Column[ArmFigures]:
    return title or name.replace("_", " "), lambda one: number(one.row.counters.get(name))


ARM: Column[ArmFigures] = ("arm", lambda one: one.arm.name)
DETAIL_COLUMNS: list[Column[ArmFigures]] = [
    ARM,
    ("÷ off (95 %)", lambda one: interval(one.plain_ratio)),
    ("median ms", lambda one: number(one.row.median_tpot_ms, 2)),
    _count("received_nodes", "nodes sent"),
    _count("hits"),
    _count("blind_steps", "no draft"),
    _count("late_drafts", "late"),
    _count("stale_nodes", "stale"),
    _count("unpaid_steps", "withheld"),
    _count("waits"),
    ("waited s", lambda one: number(one.row.counters.get("wait_seconds"), 2)),
]


def _main_columns(baseline: str) -> list[Column[ArmFigures]]:
    """What width costs and buys."""
    return [
        ARM,
        ("ms per token", lambda one: number(one.row.tpot_ms, 2)),
        (f"÷ {baseline} (95 %)", lambda one: interval(one.ratio)),
        ("tokens per step", lambda one: number(one.row.committed_per_step, 2)),
        _count("drafted_tokens", "nodes drafted"),
        ("running branches", lambda one: number(one.row.running_branches, 1)),
        _count("branch_hits"),
        _count("misses"),
        ("bytes per accepted token", lambda one: number(one.row.bytes_per_accepted_token)),
    ]


def _caught_columns(ranges: Sequence[str]) -> list[Column[ArmFigures]]:
    """Share of misses caught by a branch, by entropy range."""

    def caught(entropy: str | None) -> Column[ArmFigures]:
        return entropy or "all", lambda one: share(one.row.counters.share_of_misses(entropy, "branch"))

    return [ARM, *map(caught, ranges), caught(None)]


def _outcomes(one: ArmFigures) -> Table:
    """One arm's positions by entropy range: how often the draft model was right, and what became of its misses."""

    def missed(title: str, outcome: str) -> Column[str]:
        return title, lambda entropy: share(one.row.counters.share_of_misses(entropy, outcome))

    columns: list[Column[str]] = [
        ("nats", str),
        ("positions", lambda entropy: number(sum(one.row.counters.outcomes(entropy).values()))),
        ("agreed", lambda entropy: share(one.row.counters.share(entropy, "agreed"))),
        *map(missed, ("misses: in a branch", "as a leaf", "not in the tree"), OUTCOMES[1:]),
    ]
    title = f"Positions by entropy, arm {one.arm.name}"
    return replace(table_of(title, columns, one.row.counters.ranges(), note=OUTCOME_NOTE), level=3)


def trees_report(found: TreesFigures) -> Publication | None:
    """Return what is published of a run; nothing before the first complete round."""
    if not found.arms:
        return None
    return Publication(document(found), as_json(found), FLAT, draw=lambda path: draw_figures(found, path))


def document(found: TreesFigures) -> Document:
    """Return the result for people."""
    result, arms = found.result, found.arms
    asked = "\n".join(f"- `{one.arm.name}`: `{one.arm.override or 'as configured'}`" for one in arms)
    caught = "Share of misses caught by a branch, by the draft model's entropy in nats"
    return Document(
        title="What redundancy buys",
        tables=[
            table_of("Time per token, and what it took", _main_columns(found.baseline), arms, note=MAIN_NOTE),
            table_of(caught, _caught_columns(found.entropy_ranges), [one for one in arms if one.arm.drafts]),
            _outcomes(found.shown),
            table_of("Details", DETAIL_COLUMNS, arms, note=DETAIL_NOTE),
            *result.pace_tables(),
        ],
        warnings=_warnings(found),
        remarks=_remarks(found),
        method=[f"What the arms ask for:\n\n{asked}", _method(found)],
        provenance=str(result.provenance),
        plots="time per token and misses caught",
        conditions=result.haves,
    )


def _remarks(found: TreesFigures) -> list[str]:
    texts = []
    shown = found.shown
    if found.held is not None and shown.ratio is not None:
        verdict = "held" if found.held else "missed"
        texts.append(
            f"Trees ({DEFAULT_ARM}) take {shown.ratio.value:.3f} of the time per token of {MAIN_LINE}; "
            f"at most {MAX_RATIO} is asked for: {verdict}."
        )
    if found.frugal is not None:
        texts.append(f"Of the arms within 1 % of the fastest, {found.frugal.arm.name} drafts the fewest nodes.")
    return texts


def _warnings(found: TreesFigures) -> list[str]:
    texts = found.result.warnings(found.faults)
    if found.result.ended_by is not None:
        texts.insert(1, f"Complete rounds: {len(found.batches) // len(found.arms)}.")
    drafter = found.result.paced.get(DRAFTER)
    if drafter is not None and drafter.share > MAX_OVERRUN_SHARE:
        texts.append(f"{drafter.share:.1%} of the drafter's forwards took longer than their pace.")
    if found.measured_prompts < MIN_PROMPTS:
        texts.append(f"Fewer than {MIN_PROMPTS} prompts: too few for a judgement.")
    idle = [one.arm.name for one in found.arms if one.arm.drafts and one.row.counters.get("hits") == 0]
    if idle:
        texts.append(f"No draft was ever used in {', '.join(idle)}.")
    return texts


def _method(found: TreesFigures) -> str:
    short, sent = found.short_prompts, len(found.result.taken)
    dropped = f" ({short} of {sent} dropped: they end or repeat before {MIN_CUT} tokens)" if short else ""
    return (
        f"{found.result.conditions(f'{found.measured_prompts} held-out prompts{dropped}')} R = "
        f"{found.result.options.rtt_ms[0]:g} ms, one stream, no prompt lookup, complete rounds alone. All arms ran in "
        "one run on one target, each prompt through all of them (what the target learns of the draft model, they "
        "share). Intervals: 95 %, bootstrap over prompts, paired."
    )


def as_json(found: TreesFigures) -> dict[str, Any]:
    """Return the result file's content."""
    result, options = found.result, found.result.options
    return {
        **result.state_json(found.is_valid),
        "bars": {"ratio_to_main_line": MAX_RATIO, "prompts": MIN_PROMPTS},
        "held": found.held,
        "rtt_ms": options.rtt_ms[0],
        "pacing": result.pacing_json(),
        "prompts": {
            "sent": len(result.taken),
            "too_short": found.short_prompts,
            "shortest_tokens": MIN_CUT,
            "measured": found.measured_prompts,
        },
        "max_tokens": options.max_tokens,
        "repeats": options.repeats,
        "speculative_tokens": options.speculative_tokens,
        "seed": options.seed,
        "baseline": found.baseline,
        "frugal_arm": found.frugal and found.frugal.arm.name,
        "arms": [one.as_json() for one in found.arms],
        "ties": len(result.ties),
        "differences": list(result.wrong),
        **result.overruns_json(),
        "references": [_reference_json(one) for one in result.taken],
        "row_columns": list(ROW_COLUMNS),
        "rows": [_row_json(batch) for batch in found.batches],
        **result.provenance.as_json(),
    }


def _reference_json(one: Reference) -> dict[str, Any]:
    return {
        "prompt": one.index,
        "module": one.name,
        "generated": one.generated,
        "cut": len(one.expected),
        "off_ms_per_token": rounded(Timed(one.time_ms, len(one.expected) - 1).per_token_ms),
    }


def _row_json(batch: Batch) -> list[Any]:
    (request,) = batch.requests
    times = (request.time_ms, request.tokens, (request.ttft_ms + request.time_ms) / 1000.0)
    return [request.prompt, batch.repeat, batch.cell.arm, *map(rounded, (*times, *map(batch.counters.get, COUNTERS)))]


def draw_figures(found: TreesFigures, path: Path) -> bool:
    """Draw time per token against the threshold, and misses caught against entropy; whether there is a picture.

    Raises:
        WanspecError: The file cannot be written.
    """

    def draw(times: Any, caught: Any) -> None:
        _plot_times(times, found)
        _plot_caught(caught, found)

    return draw_panels(path, draw, size=(11.0, 4.2), widths=(1.0, 1.0))


def _by_threshold(found: TreesFigures) -> list[ArmFigures]:
    """Arms with a threshold of their own, from none to all positions, then the other ones that draft."""
    fixed = [one for one in found.arms if one.arm.threshold_nats is not None]
    fixed.sort(key=lambda one: -(one.arm.threshold_nats or 0.0))
    return fixed + [one for one in found.arms if one not in fixed and one.arm.drafts]


def _label(one: ArmFigures) -> str:
    nats = one.arm.threshold_nats
    return one.arm.name if nats is None else f"θ = {'∞' if math.isinf(nats) else f'{nats:g}'}"


def _plot_times(axes: Any, found: TreesFigures) -> None:
    base = next(one for one in found.arms if one.arm.name == found.baseline).row.tpot_ms or 0.0
    arms = (one for one in _by_threshold(found) if one.arm.name != found.baseline)
    shown = [one for one in arms if one.ratio is not None]
    for place, one in enumerate(shown):
        value, low, high = one.ratio or (0.0, 0.0, 0.0)
        bars = [[(value - low) * base], [(high - value) * base]]
        colour = "C0" if one.arm.threshold_nats is not None else "C1"
        axes.errorbar([place], [value * base], yerr=bars, fmt="o", color=colour, capsize=4)
    axes.axhline(base, color="0.5", linewidth=1, linestyle="--", label=found.baseline)
    axes.axhline(base * MAX_RATIO, color="C2", linewidth=1, linestyle=":", label=f"{MAX_RATIO} of it")
    axes.set_xticks(range(len(shown)), [_label(one) for one in shown], rotation=30, ha="right")
    axes.set_ylabel("time per token, ms")
    axes.set_title(f"R = {found.result.options.rtt_ms[0]:g} ms; bars: 95 % of the paired ratio", fontsize=10)
    axes.legend(fontsize=8)


def _plot_caught(axes: Any, found: TreesFigures) -> None:
    ranges = found.entropy_ranges
    for one in _by_threshold(found):
        points = [(place, one.row.counters.share_of_misses(entropy, "branch")) for place, entropy in enumerate(ranges)]
        known = [(place, 100.0 * part) for place, part in points if part is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", markersize=4, label=_label(one))
    axes.set_xticks(range(len(ranges)), ranges, rotation=30, ha="right")
    axes.set_xlabel("entropy of the draft distribution, nats")
    axes.set_ylabel("misses caught by a branch, %")
    axes.set_ylim(0.0, 100.0)
    axes.set_title("share of misses that a running branch had foreseen", fontsize=10)
    if axes.lines:
        axes.legend(fontsize=8)
