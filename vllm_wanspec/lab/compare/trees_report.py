"""The tree bench's result for people: tables on the console, a Markdown page, a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_wanspec.core.learned.calibration import OUTCOMES
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.compare.trees_figures import ArmFigures
from vllm_wanspec.lab.compare.trees_result import MAX_RATIO, MIN_PROMPTS, TARGET, TreesResult, command_line, git_commit
from vllm_wanspec.lab.compare.trees_setup import DEFAULT_ARM, MAIN_LINE
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.models import MIN_CUT
from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE
from vllm_wanspec.lab.harness.running import write_output
from vllm_wanspec.lab.report.cells import interval, number, share

__all__ = ["print_report", "write_json", "write_markdown", "write_plot"]

_Column = tuple[str, Callable[[ArmFigures], str]]
_Grid = tuple[list[str], list[list[str]]]


def _count(name: str) -> _Column:
    return name.replace("_", " "), lambda one: number(one.counters.get(name))


def _main_columns(baseline: str) -> list[_Column]:
    """What width costs and buys."""
    return [
        ("arm", lambda one: one.arm.name),
        ("ms per token", lambda one: number(one.timed.per_token_ms, 2)),
        (f"÷ {baseline} (95 %)", lambda one: interval(one.ratio)),
        ("tokens per step", lambda one: number(one.tokens_per_step, 2)),
        ("nodes drafted", lambda one: number(one.counters.get("drafted_tokens"))),
        ("running branches", lambda one: number(one.running_branches, 1)),
        _count("branch_hits"),
        _count("misses"),
        ("bytes per accepted token", lambda one: number(one.bytes_per_accepted_token)),
    ]


DETAIL_COLUMNS: list[_Column] = [
    ("arm", lambda one: one.arm.name),
    ("÷ off (95 %)", lambda one: interval(one.plain_ratio)),
    ("median ms", lambda one: number(one.median_ms, 2)),
    ("nodes sent", lambda one: number(one.counters.get("received_nodes"))),
    _count("hits"),
    ("no draft", lambda one: number(one.counters.get("blind_steps"))),
    ("late", lambda one: number(one.counters.get("late_drafts"))),
    ("stale", lambda one: number(one.counters.get("stale_nodes"))),
    ("withheld", lambda one: number(one.counters.get("unpaid_steps"))),
    ("waits", lambda one: number(one.counters.get("waits"))),
    ("waited s", lambda one: number(one.counters.get("wait_seconds"), 2)),
]


def _grid(columns: Sequence[_Column], figures: Sequence[ArmFigures]) -> _Grid:
    return [title for title, _ in columns], [[text(one) for _, text in columns] for one in figures]


def _entropy_ranges(result: TreesResult) -> list[str]:
    """Entropy ranges that any arm has positions in, rising."""
    return Counters.total(one.counters for one in result.figures).ranges()


def _caught_grid(result: TreesResult) -> _Grid:
    """Share of misses caught by a branch, arms × entropy ranges."""
    ranges = _entropy_ranges(result)
    rows = [
        [one.arm.name, *(share(one.share_of_misses(entropy, "branch")) for entropy in (*ranges, None))]
        for one in result.figures
        if one.arm.drafts
    ]
    return ["arm", *ranges, "all"], rows


def _outcome_grid(one: ArmFigures) -> _Grid:
    """One arm's positions by entropy range: how often the draft model was right, and what became of its misses."""
    rows = []
    for entropy in one.counters.ranges():
        total = sum(one.counters.outcomes(entropy).values())
        misses = (share(one.share_of_misses(entropy, outcome)) for outcome in OUTCOMES[1:])
        rows.append([entropy, number(total), share(one.share(entropy, "agreed")), *misses])
    return ["nats", "positions", "agreed", "misses: in a branch", "as a leaf", "not in the tree"], rows


def _shown_arm(result: TreesResult) -> ArmFigures:
    return next((one for one in result.figures if one.arm.name == DEFAULT_ARM), result.figures[-1])


def _remarks(result: TreesResult) -> list[str]:
    """Sentences on what the tables mean."""
    texts = []
    shown = _shown_arm(result)
    if result.held is not None and shown.ratio is not None:
        verdict = "held" if result.held else "missed"
        texts.append(
            f"Trees ({DEFAULT_ARM}) take {shown.ratio.value:.3f} of the time per token of {MAIN_LINE}; "
            f"at most {MAX_RATIO} is asked for: {verdict}."
        )
    if result.frugal is not None:
        texts.append(f"Of the arms within 1 % of the fastest, {result.frugal.arm.name} drafts the fewest nodes.")
    return texts


def _warnings(result: TreesResult) -> list[str]:
    """Sentences on why the figures may mean nothing."""
    texts = []
    if result.ended_by is not None:
        texts.append(f"INCOMPLETE: {result.ended_by}; complete rounds: {len(result.rows) // len(result.figures)}.")
    if not result.is_valid:
        paced = result.paced.get(TARGET)
        known = "it is unknown how many" if paced is None else f"{paced.share:.1%}"
        texts.append(
            f"INVALID: {known} of the target's forwards took longer than their pace (at most {MAX_OVERRUN_SHARE:.0%}): "
            "this machine is too slow or too busy for these figures."
        )
    for arm, found in result.errors:
        texts.append(f"DIFFERENT OUTPUT in arm {arm}, {found}.")
    drafter = result.paced.get("drafter")
    if drafter is not None and drafter.share > MAX_OVERRUN_SHARE:
        texts.append(f"{drafter.share:.1%} of the drafter's forwards took longer than their pace.")
    if result.measured_prompts < MIN_PROMPTS:
        texts.append(f"Fewer than {MIN_PROMPTS} prompts: too few for a judgement.")
    idle = [one.arm.name for one in result.figures if one.arm.drafts and one.counters.get("hits") == 0]
    if idle:
        texts.append(f"No draft was ever used in {', '.join(idle)}.")
    return texts


def _conditions(result: TreesResult) -> str:
    options = result.options
    short, sent = result.short_prompts, len(result.references)
    dropped = f" ({short} of {sent} dropped: they end or repeat before {MIN_CUT} tokens)" if short else ""
    times = "once" if options.repeats == 1 else f"{options.repeats} times"
    return (
        f"{result.measured_prompts} held-out prompts{dropped}, up to "
        f"{options.max_tokens} tokens each, cut where the text begins to repeat 16 tokens; {times} "
        f"through each arm; one stream; emulated round trip {options.rtt_ms:g} ms; up to {options.speculative_tokens} "
        f"drafts verified per step. Paced by sleeping in the model forward: target {options.target_pace}, draft "
        f"{options.draft_pace}. Everything else is real. All arms ran in one run on one target, each prompt through "
        "all of them in changing order (what the target learns of the draft model, they share); outputs are compared "
        f"with the target's own: {len(result.errors)} differ, {len(result.differences) - len(result.errors)} "
        "floating-point ties."
    )


def _provenance(result: TreesResult) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    shares = ", ".join(f"{name} {paced.share:.2%} of {paced.steps:,}" for name, paced in result.paced.items())
    commit = git_commit() or "unknown"
    slow = f"forwards slower than their pace: {shares}" if shares else "pacing unknown"
    return f"{machine.describe()}; {packages}; commit {commit}; {slow}; {result.seconds:,.0f} s."


def print_report(result: TreesResult, console: Console) -> None:
    """Print tables, remarks and warnings."""
    grids = [
        ("what redundancy buys", _grid(_main_columns(result.options.baseline), result.figures)),
        ("details", _grid(DETAIL_COLUMNS, result.figures)),
        ("share of misses caught by a branch, by entropy in nats", _caught_grid(result)),
        (f"positions by entropy, arm {_shown_arm(result).arm.name}", _outcome_grid(_shown_arm(result))),
    ]
    for title, grid in grids:
        console.print(_rich_table(title, grid))
    console.print(_conditions(result), highlight=False)
    for text in _remarks(result):
        console.print(text, style="bold", highlight=False)
    console.print(_provenance(result), style="dim", highlight=False)
    for text in _warnings(result):
        console.print(escape(text), style="bold red", highlight=False)


def _rich_table(title: str, grid: _Grid) -> Table:
    titles, rows = grid
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(titles):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _markdown_table(grid: _Grid) -> str:
    titles, rows = grid
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(result: TreesResult, plot: str | None) -> str:
    """Return the Markdown page.

    Args:
        result: What was found.
        plot: File name of the plot beside the page; None has none.
    """
    shown = _shown_arm(result)
    overrides = "\n".join(f"- `{one.arm.name}`: `{one.arm.override or 'as configured'}`" for one in result.figures)
    parts = [
        "# What redundancy buys",
        *(f"**{text}**" for text in _warnings(result)),
        *_remarks(result),
        _markdown_table(_grid(_main_columns(result.options.baseline), result.figures)),
        "`nodes drafted`: tokens that the draft model computed. `running branches`: mean over the requests' time. "
        "`branch hits`: commits that left the most probable path but stayed in the tree; `misses`: commits that left "
        "it.",
        *([f"![time per token and misses caught]({plot})"] if plot else []),
        "## Share of misses caught by a branch, by the draft model's entropy in nats",
        _markdown_table(_caught_grid(result)),
        f"Arm `{shown.arm.name}`: where the target took the draft model's best token (agreed), and what became of the "
        "other positions:",
        _markdown_table(_outcome_grid(shown)),
        "## Details",
        _markdown_table(_grid(DETAIL_COLUMNS, result.figures)),
        "`nodes sent`: alternatives included. `no draft`: commits made while an earlier one was still unknown to the "
        "tree. `late`: positions whose drafts came after they were committed. `withheld`: steps whose drafts would "
        "have cost more than they yield.",
        "What the arms ask for:",
        overrides,
        "## How it was measured",
        _conditions(result),
        f"Intervals: 95 %, bootstrap over prompts, paired. `{command_line()}`; {_provenance(result)}",
    ]
    return "\n\n".join(parts) + "\n"


def write_json(result: TreesResult, path: Path) -> None:
    """Write the result file, each of its many rows on one line.

    Raises:
        WanspecError: The file cannot be written.
    """
    data = result.as_json()
    rows = ",\n  ".join(json.dumps(row) for row in data["rows"])
    text = json.dumps(data | {"rows": []}, indent=1)
    write_output("--json", path, text.replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n")


def write_markdown(result: TreesResult, path: Path) -> None:
    """Write the Markdown page, and the plot beside it where matplotlib is installed.

    Raises:
        WanspecError: A file cannot be written.
    """
    plot = path.with_suffix(".png")
    write_output("--markdown", path, markdown(result, plot.name if write_plot(result, plot) else None))


def write_plot(result: TreesResult, path: Path) -> bool:
    """Draw time per token against the threshold, and misses caught against entropy.

    Returns:
        Whether there is a plot; not without matplotlib.

    Raises:
        WanspecError: The file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_times(left, result)
    _plot_caught(right, result)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise WanspecError(f"--markdown: cannot write {path}: {error.strerror}") from error
    return True


def _by_threshold(result: TreesResult) -> list[ArmFigures]:
    """Arms with a threshold of their own, from none to all positions, then the other ones that draft."""
    fixed = [one for one in result.figures if one.arm.threshold_nats is not None]
    fixed.sort(key=lambda one: -(one.arm.threshold_nats or 0.0))
    return fixed + [one for one in result.figures if one not in fixed and one.arm.drafts]


def _label(one: ArmFigures) -> str:
    nats = one.arm.threshold_nats
    return one.arm.name if nats is None else f"θ = {'∞' if math.isinf(nats) else f'{nats:g}'}"


def _plot_times(axes: Any, result: TreesResult) -> None:
    base = next(one for one in result.figures if one.arm.name == result.options.baseline).timed.per_token_ms or 0.0
    arms = (one for one in _by_threshold(result) if one.arm.name != result.options.baseline)
    shown = [one for one in arms if one.ratio is not None]
    for place, one in enumerate(shown):
        value, low, high = one.ratio or (0.0, 0.0, 0.0)
        bars = [[(value - low) * base], [(high - value) * base]]
        colour = "C0" if one.arm.threshold_nats is not None else "C1"
        axes.errorbar([place], [value * base], yerr=bars, fmt="o", color=colour, capsize=4)
    axes.axhline(base, color="0.5", linewidth=1, linestyle="--", label=result.options.baseline)
    axes.axhline(base * MAX_RATIO, color="C2", linewidth=1, linestyle=":", label=f"{MAX_RATIO} of it")
    axes.set_xticks(range(len(shown)), [_label(one) for one in shown], rotation=30, ha="right")
    axes.set_ylabel("time per token, ms")
    axes.set_title(f"R = {result.options.rtt_ms:g} ms; bars: 95 % of the paired ratio", fontsize=10)
    axes.legend(fontsize=8)


def _plot_caught(axes: Any, result: TreesResult) -> None:
    ranges = _entropy_ranges(result)
    for one in _by_threshold(result):
        points = [(place, one.share_of_misses(entropy, "branch")) for place, entropy in enumerate(ranges)]
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
