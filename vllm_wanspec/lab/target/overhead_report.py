"""The overhead bench's result: ratios with their spread, judged, and what people are told of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from vllm_wanspec.lab.drafter.loads import CONTEXT_TOKENS, STEADY_LOOKAHEAD, SteadyLoad
from vllm_wanspec.lab.drafter.width_figures import MAX_OTHERS, NEAR
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.cells import MARKS, spread
from vllm_wanspec.lab.report.document import Document, Table, table_of
from vllm_wanspec.lab.stats import Interval, median_interval, rounded

TARGET, DRAFTER = "target", "drafter"
MIN_ROUNDS = 5
MIN_PROMPTS = 12


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


@dataclass(frozen=True, slots=True)
class OverheadOptions:
    """The overhead bench's settings, as its command explains them; ``load`` is what the drafter's sessions ask for."""

    parts: tuple[str, ...] = (TARGET, DRAFTER)
    prompts: int = MIN_PROMPTS
    max_tokens: int = 96
    widths: tuple[int, ...] = (1, 8, 32)
    load: SteadyLoad = field(default_factory=SteadyLoad)
    rounds: int = MIN_ROUNDS
    instances: int = 3
    window_s: float = 3.0
    seed: int = 0
    models: Path | None = None


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
    def ratios(self) -> tuple[float, ...]:
        """Round by round."""
        return tuple(a / b for a, b in zip(self.ours, self.base, strict=True))

    @functools.cached_property
    def ratio(self) -> Interval:
        """The median of the rounds' ratios, with a bootstrap interval over rounds."""
        return median_interval(self.ratios)

    @property
    def held(self) -> bool | None:
        """Whether it keeps its bar; None after too few rounds."""
        return BARS[self.part].holds(self.ratio) if len(self.ours) >= MIN_ROUNDS else None

    def as_json(self) -> dict[str, Any]:
        """Return figures, medians and rounds."""
        ratio, low, high = self.ratio.as_json()
        return {
            "part": self.part,
            "case": self.case,
            "ours": rounded(median(self.ours)),
            "base": rounded(median(self.base)),
            "ratio": ratio,
            "ratio_ci": [low, high],
            "ratio_range": [rounded(min(self.ratios)), rounded(max(self.ratios))],
            "held": self.held,
            "rounds": {"ours": [*map(rounded, self.ours)], "base": [*map(rounded, self.base)]},
            "details": {name: rounded(value) for name, value in self.details.items()},
        }


@dataclass(frozen=True, slots=True)
class OverheadResult:
    """Everything that a run found: all comparisons, and the target's outputs that differ, one line each."""

    options: OverheadOptions
    rows: Sequence[Comparison]
    differences: Sequence[str] = ()

    def holds(self, row: Comparison) -> bool | None:
        """Whether a bar is kept; None where this run cannot tell."""
        too_few = row.part == TARGET and (self.options.prompts < MIN_PROMPTS or self.differences)
        return None if too_few else row.held

    @property
    def held(self) -> bool:
        """Whether all bars are known to be kept."""
        return bool(self.rows) and all(self.holds(row) for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Return what the result file has beside where it comes from."""
        options = self.options
        return {
            "held": self.held,
            "bars": {part: str(bar) for part, bar in BARS.items()},
            "pacing": None,
            "rows": [row.as_json() | {"held": self.holds(row)} for row in self.rows],
            "prompts": options.prompts,
            "max_tokens": options.max_tokens,
            "rounds": options.rounds,
            "instances": options.instances,
            "window_s": options.window_s,
            "context_tokens": CONTEXT_TOKENS,
            "differences": list(self.differences),
        }


def overhead_document(result: OverheadResult, provenance: Provenance) -> Document:
    """What a run found, for people."""
    parts = list(dict.fromkeys(row.part for row in result.rows))
    return Document(
        title="What remote drafting costs where nothing is paced",
        tables=[_table(result, part) for part in parts],
        warnings=_warnings(result),
        remarks=[],
        method=_method(result.options, parts),
        provenance=str(provenance),
        conditions="Prompt lookup: none in any arm. Async scheduling: in none (custom proposers). Not paced.",
    )


def _table(result: OverheadResult, part: str) -> Table:
    bar = BARS[part]
    columns = [
        ("case", lambda row: row.case),
        (bar.ours, lambda row: _figure(median(row.ours))),
        (bar.base, lambda row: _figure(median(row.base))),
        ("ratio", lambda row: f"{row.ratio.value:.3f}"),
        ("95 % interval", lambda row: spread([row.ratio.low, row.ratio.high], 3)),
        ("lowest–highest", lambda row: spread(row.ratios, 3)),
        ("bar", lambda row: f"{bar} {MARKS[result.holds(row)]}"),
    ]
    return table_of(bar.title, columns, [row for row in result.rows if row.part == part])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100.0 else f"{value:.2f}"


def _warnings(result: OverheadResult) -> list[str]:
    texts = [f"Different output: {line}" for line in result.differences]
    sides = ("others_cpu", "others_cpu_base")
    busy = max((row.details.get(name, 0.0) for row in result.rows for name in sides), default=0.0)
    if busy > MAX_OTHERS:
        texts.append(f"DISTURBED: other programs took up to {busy:.0%} of the drafter's core: measure again.")
    if result.options.rounds < MIN_ROUNDS or result.options.prompts < MIN_PROMPTS:
        texts.append(f"Not judged with fewer than {MIN_ROUNDS} rounds, the target's part or {MIN_PROMPTS} prompts.")
    return texts


def _method(options: OverheadOptions, parts: Sequence[str]) -> list[str]:
    texts = [
        f"Medians of {options.rounds} rounds; in each round everything that is compared is measured by turns, in "
        "changing order. The ratio is the median of the rounds' ratios; its interval is a bootstrap over rounds, and a "
        "bar (✓, ✗) is kept when all of the interval is.",
    ]
    if TARGET in parts:
        texts.append(
            f"Target: time per token after the first of {options.prompts} prompts × {options.max_tokens} tokens, "
            "greedy, one at a time, through the OpenAI endpoint; `wanspec serve` divided by the same vLLM whose custom "
            "proposer returns empty lists. `silent drafter`: it welcomes, takes sessions and commits, never drafts. "
            f"`dead drafter`: nobody listens at its port. Means over {options.instances} processes of each kind."
        )
    if DRAFTER in parts:
        texts.append(
            "Drafter: one session that branches everywhere through `/wanspec/v1` (nothing committed, side branches of "
            f"{options.load.branch_depth} tokens, a main line of {STEADY_LOOKAHEAD}), divided by a program that starts "
            "as many requests of the same length at the same engine by itself (flags, processes, core, eight flat "
            f"log-probabilities per token: all alike), each on {CONTEXT_TOKENS} tokens of held-out text. Both count "
            f"only while at least {NEAR:.0%} of the branches run. {options.window_s:g} s per window."
        )
    return texts
