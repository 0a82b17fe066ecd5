"""The overhead bench's result: ratios with their spread, judged; as JSON, on the console, and as a Markdown page."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_wanspec.lab.drafter.width_measure import CONTEXT_TOKENS, NEAR
from vllm_wanspec.lab.drafter.width_steady import LOOKAHEAD, SteadyLoad
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.provenance import git_commit
from vllm_wanspec.lab.harness.running import write_output
from vllm_wanspec.lab.stats import CONFIDENCE, RESAMPLES, Interval, rounded

__all__ = [
    "BARS",
    "DRAFTER",
    "MAX_OTHERS",
    "MIN_PROMPTS",
    "MIN_ROUNDS",
    "TARGET",
    "Bar",
    "Comparison",
    "OverheadResult",
    "markdown",
    "print_report",
    "write_json",
    "write_markdown",
]

TARGET, DRAFTER = "target", "drafter"
MIN_ROUNDS = 5
MIN_PROMPTS = 12
#: Above this share of the drafter's core other programs disturbed the measurement.
MAX_OTHERS = 0.10


class Bar(NamedTuple):
    """What is asked for of a ratio, and what it divides."""

    limit: float
    at_most: bool
    ours: str
    base: str
    title: str

    def holds(self, ratio: Interval) -> bool:
        """Whether all of the interval is on the right side."""
        return ratio.high <= self.limit if self.at_most else ratio.low >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"


BARS: Mapping[str, Bar] = {
    TARGET: Bar(1.05, True, "WANSpec ms per token", "empty proposer", "Target: a step without drafts"),
    DRAFTER: Bar(0.9, False, "route tokens/s", "AsyncLLM itself", "Drafter: tokens per second"),
}


@dataclass(frozen=True)
class Comparison:
    """One thing measured with and without us, in the same rounds.

    Args:
        part: "target" or "drafter".
        case: Which of its cases.
        ours: With us, one figure per round: milliseconds per token, or tokens per second.
        base: Without, in the same rounds.
        details: What else was seen, by name.
    """

    part: str
    case: str
    ours: tuple[float, ...]
    base: tuple[float, ...]
    details: Mapping[str, float]

    @property
    def bar(self) -> Bar:
        """What is asked for."""
        return BARS[self.part]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Round by round."""
        return tuple(a / b for a, b in zip(self.ours, self.base, strict=True))

    @functools.cached_property
    def ratio(self) -> Interval:
        """The median of the rounds' ratios, with a bootstrap interval over rounds."""
        ratios = np.array(self.ratios)
        draws = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
        tail = (1.0 - CONFIDENCE) / 2.0
        low, high = np.quantile(np.median(ratios[draws], axis=1), (tail, 1.0 - tail))
        return Interval(float(np.median(ratios)), float(low), float(high))

    @property
    def held(self) -> bool | None:
        """Whether it keeps its bar; None after too few rounds."""
        return self.bar.holds(self.ratio) if len(self.ours) >= MIN_ROUNDS else None

    def as_json(self) -> dict[str, Any]:
        """Return figures, medians and rounds."""
        return {
            "part": self.part,
            "case": self.case,
            "ours": rounded(float(np.median(self.ours))),
            "base": rounded(float(np.median(self.base))),
            "ratio": rounded(self.ratio.value),
            "ratio_ci": [rounded(self.ratio.low), rounded(self.ratio.high)],
            "ratio_range": [rounded(min(self.ratios)), rounded(max(self.ratios))],
            "held": self.held,
            "rounds": {"ours": [*map(rounded, self.ours)], "base": [*map(rounded, self.base)]},
            "details": {name: rounded(value) for name, value in self.details.items()},
        }


@dataclass(frozen=True)
class OverheadResult:
    """Everything that a run found.

    Args:
        rows: All comparisons.
        load: What the drafter's sessions asked for.
        prompts: Sent to each target in each round.
        max_tokens: Generated for each.
        window_s: Seconds of a window at the drafter.
        rounds: Of everything.
        instances: Processes of each kind of target.
        differences: Outputs of the target that differ, one line each.
        seconds: Duration of the whole run.
    """

    rows: Sequence[Comparison]
    load: SteadyLoad
    prompts: int
    max_tokens: int
    window_s: float
    rounds: int
    instances: int
    differences: Sequence[str]
    seconds: float

    def held(self, row: Comparison) -> bool | None:
        """Whether a bar is kept; None where this run cannot tell."""
        too_few = row.part == TARGET and (self.prompts < MIN_PROMPTS or self.differences)
        return None if too_few else row.held

    @property
    def all_held(self) -> bool:
        """Whether all bars are known to be kept."""
        return bool(self.rows) and all(self.held(row) for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Return the result file's content."""
        return {
            "held": self.all_held,
            "bars": {part: str(bar) for part, bar in BARS.items()},
            "pacing": None,
            "rows": [row.as_json() | {"held": self.held(row)} for row in self.rows],
            "prompts": self.prompts,
            "max_tokens": self.max_tokens,
            "rounds": self.rounds,
            "instances": self.instances,
            "window_s": self.window_s,
            "context_tokens": CONTEXT_TOKENS,
            "differences": list(self.differences),
            "seconds": round(self.seconds, 1),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "commit": git_commit(),
            "command": command_line(),
        }


def command_line() -> str:
    """Return the command that runs this bench, as given."""
    return shlex.join(["python", "-m", "vllm_wanspec.lab.target.overhead", *sys.argv[1:]])


def _grid(result: OverheadResult, part: str) -> tuple[list[str], list[list[str]]]:
    bar = BARS[part]
    lines = []
    for row in result.rows:
        if row.part == part:
            ratio, word = row.ratio, {True: "✓", False: "✗", None: "–"}[result.held(row)]
            figures = [_figure(float(np.median(values))) for values in (row.ours, row.base)]
            spread = f"{ratio.low:.3f}–{ratio.high:.3f}"
            ends = f"{min(row.ratios):.3f}–{max(row.ratios):.3f}"
            lines.append([row.case, *figures, f"{ratio.value:.3f}", spread, ends, f"{bar} {word}"])
    return ["case", bar.ours, bar.base, "ratio", "95 % interval", "lowest–highest", "bar"], lines


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100.0 else f"{value:.2f}"


def _title(part: str) -> str:
    return f"{BARS[part].title} (not paced)"


def _parts(result: OverheadResult) -> list[str]:
    return list(dict.fromkeys(row.part for row in result.rows))


def _remarks(result: OverheadResult) -> list[str]:
    """What spoils the figures."""
    texts = [f"Different output: {line}" for line in result.differences]
    sides = ("others_cpu", "others_cpu_base")
    busy = max((row.details.get(name, 0.0) for row in result.rows for name in sides), default=0.0)
    if busy > MAX_OTHERS:
        texts.append(f"DISTURBED: other programs took up to {busy:.0%} of the drafter's core: measure again.")
    if result.rounds < MIN_ROUNDS or result.prompts < MIN_PROMPTS:
        texts.append(f"Not judged with fewer than {MIN_ROUNDS} rounds, the target's part or {MIN_PROMPTS} prompts.")
    return texts


def _explanation(result: OverheadResult) -> list[str]:
    texts = [
        f"Medians of {result.rounds} rounds; in each round everything that is compared is measured by turns, in "
        "changing order. The ratio is the median of the rounds' ratios; its interval is a bootstrap over rounds, and a "
        "bar (✓, ✗) is kept when all of the interval is.",
    ]
    if TARGET in _parts(result):
        texts.append(
            f"Target: time per token after the first of {result.prompts} prompts × {result.max_tokens} tokens, greedy, "
            "one at a time, through the OpenAI endpoint; `wanspec serve` divided by the same vLLM whose custom "
            "proposer returns empty lists. `silent drafter`: it welcomes, takes sessions and commits, never drafts. "
            f"`dead drafter`: nobody listens at its port. Means over {result.instances} processes of each kind."
        )
    if DRAFTER in _parts(result):
        texts.append(
            "Drafter: one session that branches everywhere through `/wanspec/v1` (nothing committed, side branches of "
            f"{result.load.branch_depth} tokens, a main line of {LOOKAHEAD}), divided by a program that starts as many "
            "requests of the same length at the same engine by itself (flags, processes, core, eight flat "
            f"log-probabilities per token: all alike), each on {CONTEXT_TOKENS} tokens of held-out text. Both count "
            f"only while at least {NEAR:.0%} of the branches run. {result.window_s:g} s per window."
        )
    return texts


def _provenance(result: OverheadResult) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    return f"{machine.describe()}; {packages}; commit {git_commit() or 'unknown'}; {result.seconds:,.0f} s."


def print_report(result: OverheadResult, console: Console) -> None:
    """Print tables and remarks."""
    for part in _parts(result):
        titles, lines = _grid(result, part)
        table = Table(title=_title(part), title_justify="left")
        for place, name in enumerate(titles):
            table.add_column(name, justify="right" if place else "left")
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
    for text in _remarks(result):
        console.print(escape(text), style="bold yellow", highlight=False)
    for text in _explanation(result):
        console.print(escape(text), highlight=False)
    console.print(escape(_provenance(result)), style="dim", highlight=False)


def markdown(result: OverheadResult) -> str:
    """Return the Markdown page."""
    parts = ["# What remote drafting costs where nothing is paced"]
    for part in _parts(result):
        titles, lines = _grid(result, part)
        rows = [titles, ["---", *["---:"] * (len(titles) - 1)], *lines]
        parts += [f"## {_title(part)}", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    parts += [*_remarks(result), "## How it was measured", *_explanation(result)]
    return "\n\n".join([*parts, f"`{command_line()}`; {_provenance(result)}"]) + "\n"


def write_json(result: OverheadResult, path: Path) -> None:
    """Write the result file.

    Raises:
        WanspecError: It cannot be written.
    """
    write_output("--json", path, json.dumps(result.as_json(), indent=1, ensure_ascii=False) + "\n")


def write_markdown(result: OverheadResult, path: Path) -> None:
    """Write the Markdown page.

    Raises:
        WanspecError: It cannot be written.
    """
    write_output("--markdown", path, markdown(result))
