"""The side-by-side bench's result for people: tables on the console, and a Markdown page with plots beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_wanspec.lab.compare.figures import Bar, Figures, Row, figures
from vllm_wanspec.lab.compare.measure import BenchRun
from vllm_wanspec.lab.compare.plan import ARMS
from vllm_wanspec.lab.compare.plots import write_plot
from vllm_wanspec.lab.compare.result import command_line, write_json
from vllm_wanspec.lab.compare.trees_result import git_commit
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE
from vllm_wanspec.lab.harness.running import write_output
from vllm_wanspec.lab.report.cells import UNKNOWN, interval, number, share

__all__ = ["markdown", "print_report", "write_json", "write_markdown"]

MARKS = {True: "✓", False: "✗", None: UNKNOWN}
STYLES = {True: "green", False: "bold red", None: "dim"}
#: So many wrong outputs are named; the result file has all.
SHOWN_DIFFERENCES = 10
#: What a column takes beside its text.
COLUMN_MARGIN = 3


@dataclass(frozen=True, slots=True)
class Section:
    """A table.

    Attributes:
        title: What it shows.
        titles: Of the columns.
        rows: Cells.
        keys: So many columns at the left say what a row is about.
        note: What the columns mean, in Markdown.
        wrong: Numbers of the rows with wrong outputs.
    """

    title: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1
    note: str = ""
    wrong: Collection[int] = ()


_Column = tuple[str, Callable[[Row], str]]


def _trip(row: Row) -> str:
    return UNKNOWN if row.cell.rtt_ms is None else f"{row.cell.rtt_ms:g}"


def _passes(row: Row) -> str:
    about = "≈ " if row.passes_estimated and row.local_draft_passes else ""
    return about + number(row.local_draft_passes)


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f}–{max(values):.1f}" if values else UNKNOWN


ARM: _Column = ("arm", lambda row: row.cell.arm)
TRIP: _Column = ("R ms", _trip)
STREAMS: _Column = ("streams", lambda row: str(row.cell.concurrency))
PER_TOKEN: _Column = ("ms per token", lambda row: number(row.tpot_ms, 2))
TO_COLOCATED: _Column = ("÷ co-located (95 %)", lambda row: interval(row.to_draft_model))
TO_PLAIN: _Column = ("÷ plain constrained (95 %)", lambda row: interval(row.to_constrained))
PER_STEP: _Column = ("tokens per step", lambda row: number(row.tokens_per_step, 2))
PASSES: _Column = ("local passes", _passes)
FIRST: _Column = ("first token ms", lambda row: number(row.ttft_ms, 1))

SINGLE_COLUMNS: list[_Column] = [
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
CONCURRENT_COLUMNS: list[_Column] = [
    ARM,
    TRIP,
    STREAMS,
    ("tokens/s", lambda row: number(row.throughput_tok_s, 1)),
    ("of the repeats", lambda row: _spread(row.throughput_runs)),
    PER_TOKEN,
    TO_COLOCATED,
    ("÷ plain (95 %)", TO_PLAIN[1]),
    PER_STEP,
    PASSES,
    FIRST,
]
DETAIL_COLUMNS: list[_Column] = [
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


def _pacing(run: BenchRun) -> str:
    """What every table's title says."""
    named = ((run.options.target_pace, "target"), (run.options.draft_pace, "draft"))
    paces = [f"{pace.base_ms:g} + {pace.per_token_ms:g} ms ({name})" for pace, name in named if pace is not None]
    if not paces:
        return "not paced"
    scale = run.options.time_scale
    return f"paced to {', '.join(paces)}" + (f", these and R × {scale:g}" if scale != 1.0 else "")


def _of_rows(title: str, columns: Sequence[_Column], rows: Sequence[Row], keys: int, note: str) -> Section:
    cells = [[text(row) for _, text in columns] for row in rows]
    wrong = [place for place, row in enumerate(rows) if row.wrong]
    return Section(title, [name for name, _ in columns], cells, keys, note, wrong)


def _sections(run: BenchRun, found: Figures) -> Iterator[Section]:
    single = [row for row in found.rows if row.cell.concurrency == 1]
    several = [row for row in found.rows if row.cell.concurrency > 1]
    if single:
        yield _of_rows("Single stream", SINGLE_COLUMNS, single, 2, SINGLE_NOTE)
    if several:
        yield _of_rows("Several streams at a time", CONCURRENT_COLUMNS, several, 3, CONCURRENT_NOTE)
    if found.rows:
        yield _of_rows("Details", DETAIL_COLUMNS, found.rows, 3, DETAIL_NOTE)
    if run.trials:
        trials = [[f"{gamma}{' (best)' * (gamma == run.gamma)}", f"{ms:.2f}"] for gamma, ms in sorted(run.trials)]
        yield Section("Co-located draft model: pre-pass", ["γ", "ms per token"], trials)
    if run.paced:
        servers = [[name, f"{one.steps:,}", f"{one.share:.2%}"] for name, one in run.paced.items()]
        yield Section("Forwards slower than their pace", ["server", "forwards", "overruns"], servers)


def _bar_cells(bar: Bar) -> list[str]:
    text = bar.text + (" (hoped for)" if bar.stretch else "")
    digits = 3 if bar.limit else 0  # nothing but counts may be 0 at most
    return [MARKS[bar.held], text, *(number(value, digits) for value in (bar.limit, bar.value, bar.upper))]


BAR_TITLES = ("", "time per token, or what else is said", "at most", "is", "95 % up to")


def _remarks(run: BenchRun, found: Figures) -> list[str]:
    """Sentences on what the tables mean."""
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


def _warnings(run: BenchRun, found: Figures) -> list[str]:
    """Sentences on why the figures may mean nothing."""
    texts = []
    if run.ended_by is not None:
        texts.append(f"INCOMPLETE: {run.ended_by}.")
    if not found.valid:
        slow = [f"{one.share:.1%} of {name}" for name, one in run.paced.items() if one.share > MAX_OVERRUN_SHARE]
        known = ", ".join(slow) or "it is unknown how many"
        texts.append(
            f"INVALID: more forwards than {MAX_OVERRUN_SHARE:.0%} took longer than their pace ({known}): this machine "
            "is too slow or too busy for these figures."
        )
    texts += [f"DIFFERENT OUTPUT in {line}" for line in found.wrong[:SHOWN_DIFFERENCES]]
    if len(found.wrong) > SHOWN_DIFFERENCES:
        texts.append(f"… and {len(found.wrong) - SHOWN_DIFFERENCES} more.")
    idle = [row for row in found.rows if row.cell.arm.startswith("wanspec") and row.drafted == 0]
    if idle:
        texts.append(f"Nothing was drafted in {', '.join(dict.fromkeys(row.cell.arm for row in idle))}.")
    return texts


def _conditions(run: BenchRun, found: Figures) -> str:
    options = run.options
    times = "once" if options.repeats == 1 else f"{options.repeats} times"
    ties = sum(row.ties for row in found.rows)
    paced = "nothing is paced"
    if options.target_pace is not None:
        paced = f"{_pacing(run)}, ms + ms per token, by sleeping in the model forward; everything else is real"
    if options.time_scale != 1.0:
        paced += f". Times are as measured: R = 30 ms took {options.emulated_ms(30.0):g} ms"
    return (
        f"{len(run.references)} prompts, the same in all arms, up to {options.max_tokens} tokens each, cut where the "
        f"text begins to repeat 16 tokens; {times} through each arm, arms in changing order; round trips emulated by a "
        f"proxy, changed without a restart; up to {options.speculative_tokens} drafts verified per step; greedy "
        f"decoding through the OpenAI endpoint; {paced}. Outputs are compared with the target's own: "
        f"{len(found.wrong)} differ, {ties} floating-point ties. Ratios: sums over prompts, paired by prompt; "
        "intervals: 95 %, bootstrap over prompts (of throughput: over repeats)."
    )


def _provenance(run: BenchRun) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    return f"{machine.describe()}; {packages}; commit {git_commit() or 'unknown'}; {run.seconds:,.0f} s."


def print_report(run: BenchRun, console: Console) -> None:
    """Print tables, bars, remarks and warnings."""
    found = figures(run)
    for section in _sections(run, found):
        for table in _rich_tables(section, _pacing(run), console.width):
            console.print(table)
    console.print(_bar_table(found, f"What was asked for; {_pacing(run)}"))
    console.print(escape(_conditions(run, found)), highlight=False)
    for text in _remarks(run, found):
        console.print(escape(text), style="bold", highlight=False)
    console.print(escape(_provenance(run)), style="dim", highlight=False)
    for text in _warnings(run, found):
        console.print(escape(text), style="bold red", highlight=False)


def _rich_tables(section: Section, pacing: str, width: int) -> Iterator[Table]:
    """The table; where it is too wide, in parts that all begin with the key columns."""
    columns = list(zip(section.titles, *section.rows, strict=True))
    if sum(max(map(len, column)) + COLUMN_MARGIN for column in columns) < width:
        yield _rich_table(f"{section.title}; {pacing}", columns, {}, section.wrong)
        return
    # Titles may be broken between words, figures never.
    widths = {name: max(map(len, (*name.split(), *cells))) for name, *cells in columns}
    keys, rest, title = columns[: section.keys], columns[section.keys :], section.title
    room = width - 1 - sum(widths[key[0]] + COLUMN_MARGIN for key in keys)
    while rest:
        count, used = 0, 0
        while count < len(rest) and (used := used + widths[rest[count][0]] + COLUMN_MARGIN) <= room:
            count += 1
        part, rest = rest[: max(1, count)], rest[max(1, count) :]
        yield _rich_table(f"{title}; {pacing}", [*keys, *part], widths, section.wrong)
        title = f"{section.title}, continued"


def _rich_table(
    title: str, columns: Sequence[Sequence[str]], widths: Mapping[str, int], wrong: Collection[int]
) -> Table:
    table = Table(title=title, title_justify="left")
    for name, *_ in columns:
        table.add_column(name, justify="right" if table.columns else "left", width=widths.get(name))
    for place, row in enumerate(zip(*(cells for _, *cells in columns), strict=True)):
        table.add_row(*map(escape, row), style="red" if place in wrong else None)
    return table


def _bar_table(found: Figures, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(BAR_TITLES):
        table.add_column(name, justify="right" if place > 1 else "left", no_wrap=place != 1)
    for bar in found.bars:
        mark, *cells = map(escape, _bar_cells(bar))
        table.add_row(f"[{STYLES[bar.held]}]{mark}[/]", *cells)
    return table


def _markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], keys: int = 1) -> str:
    rules = ["---"] * keys + ["---:"] * (len(titles) - keys)
    lines = [titles, rules, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(run: BenchRun, plot: str | None) -> str:
    """Return the Markdown page.

    Args:
        run: What was found.
        plot: File name of the plots beside the page; None has none.
    """
    found = figures(run)
    parts = ["# Remote drafting beside the alternatives", *(f"**{text}**" for text in _warnings(run, found))]
    parts += _remarks(run, found)
    parts += [f"![time per token, local draft passes, throughput]({plot})"] if plot else []
    parts += [f"## What was asked for ({_pacing(run)})", _markdown_table(BAR_TITLES, map(_bar_cells, found.bars), 2)]
    parts.append(f"The upper end of the interval is judged. {UNKNOWN}: this run cannot tell.")
    for section in _sections(run, found):
        parts += [f"## {section.title} ({_pacing(run)})", _markdown_table(section.titles, section.rows)]
        parts += [section.note] if section.note else []
    measured = dict.fromkeys(row.cell.arm for row in found.rows)
    parts += ["## How it was measured", "\n".join(f"- `{arm}`: {ARMS[arm]}" for arm in measured)]
    parts += [_conditions(run, found), f"`{command_line()}`; {_provenance(run)}"]
    return "\n\n".join(parts) + "\n"


def write_markdown(run: BenchRun, path: Path) -> None:
    """Write the Markdown page, and the plots beside it where matplotlib is installed.

    Raises:
        WanspecError: A file cannot be written.
    """
    plot = path.with_suffix(".png")
    write_output("--markdown", path, markdown(run, plot.name if write_plot(run, plot, _pacing(run)) else None))
