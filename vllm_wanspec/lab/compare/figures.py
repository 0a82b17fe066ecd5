"""The figures of `wanspec bench`: one row per arm, round trip and concurrency, and the bars that they have to hold.

Plain values and sums: no servers, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.rows import Row, make_row
from vllm_wanspec.lab.stats import Interval, rounded

#: Single stream: time per token of wanspec ÷ draft_model's at its best γ, by round trip in ms …
COLOCATED_LIMITS: Mapping[float, float] = {0.0: 0.78, 10.0: 0.78, 20.0: 0.84, 30.0: 0.90, 50.0: 1.00, 70.0: 1.00}
#: … of which these are hoped for only.
STRETCH_RTT_MS = (70.0,)
#: ÷ the ideal, at each of these round trips.
IDEAL_LIMIT = 1.15
IDEAL_RTT_MS = (0.0, 10.0, 20.0, 30.0, 50.0)
#: ÷ none_constrained, by round trip in ms …
CONSTRAINED_LIMITS: Mapping[float, float] = {30.0: 0.55, 100.0: 0.80}
#: … and whatever the drafter does.
NEVER_ABOVE = 1.02
FARTHEST_RTT_MS = 500.0
#: So many streams: throughput at least draft_model's, at this round trip.
CONCURRENT = 8
CONCURRENT_RTT_MS = 30.0
THROUGHPUT_LIMIT = 1.00
#: Fewer prompts or repeats cannot tell.
MIN_PROMPTS = 24
MIN_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that was asked for.

    Attributes:
        text: What.
        limit: The most it may be.
        value: What it is; None if it was not measured.
        upper: The upper end of its 95 % interval, which is what is judged.
        held: Whether it holds; None where this run cannot tell.
        stretch: Whether it is hoped for only.
    """

    text: str
    limit: float
    value: float | None
    upper: float | None
    held: bool | None
    stretch: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the entry of the result file."""
        numbers = {name: rounded(getattr(self, name)) for name in ("limit", "value", "upper")}
        return {"text": self.text, **numbers, "held": self.held, "stretch": self.stretch}


@dataclass(frozen=True, slots=True)
class Figures:
    """All rows and bars of a run.

    Attributes:
        rows: In the order of concurrency, arms and round trips.
        bars: What was asked for.
        doubts: Why the bars cannot be judged, one sentence each; empty if they can.
    """

    rows: tuple[Row, ...]
    bars: tuple[Bar, ...]
    doubts: tuple[str, ...]

    @property
    def held(self) -> bool | None:
        """Whether all bars hold, those that are hoped for left out; None where the run cannot tell."""
        verdicts = [bar.held for bar in self.bars if not bar.stretch]
        if False in verdicts:
            return False
        return None if None in verdicts else True

    def row(self, arm: str, rtt_ms: float | None = None, concurrency: int = 1) -> Row | None:
        """Return the row of a cell, if it was measured."""
        return next((row for row in self.rows if row.cell == (arm, rtt_ms, concurrency)), None)


def figures(run: Result) -> Figures:
    """Gather a run's figures."""
    batches = run.by_cell
    rows = tuple(make_row(run, cell, batches) for cell in batches)
    doubts = tuple(_doubts(run))
    remote = {arm.name for arm in run.options.started if arm.is_remote}
    return Figures(rows, tuple(_bars(Figures(rows, (), doubts), remote)), doubts)


def _doubts(run: Result) -> Iterable[str]:
    if run.ended_by is not None:
        yield "the run did not come to its end"
    if run.options.target_pace is None:
        yield "it was not paced"
    elif not run.kept_pace():
        yield "not all servers kept their pace"
    if run.wrong:
        yield "there are wrong outputs"
    if len(run.references) < MIN_PROMPTS:
        yield f"there are fewer than {MIN_PROMPTS} prompts"
    if run.options.repeats < MIN_REPEATS:
        yield f"there are fewer than {MIN_REPEATS} repeats"


def _bars(found: Figures, remote: Collection[str]) -> Iterable[Bar]:
    """The bars, on rows alone: ``found`` has none yet."""

    def bar(text: str, limit: float, interval: Interval | None, stretch: bool = False) -> Bar:
        if interval is None:
            return Bar(text, limit, None, None, None, stretch)
        held = interval.high <= limit if not found.doubts else None
        return Bar(text, limit, interval.value, interval.high, held, stretch)

    def wanspec(rtt_ms: float, get: Callable[[Row], Interval | None], concurrency: int = 1) -> Interval | None:
        row = found.row("wanspec", rtt_ms, concurrency)
        return None if row is None else get(row)

    for rtt_ms, limit in COLOCATED_LIMITS.items():
        ratio = wanspec(rtt_ms, lambda row: row.to_draft_model)
        yield bar(f"÷ draft_model, R = {rtt_ms:g} ms", limit, ratio, rtt_ms in STRETCH_RTT_MS)
    alone = [row for row in found.rows if row.cell.arm == "wanspec" and row.cell.concurrency == 1]
    yield bar("local draft passes, single stream", 0.0, _worst(_exact(row.local_draft_passes) for row in alone))
    ideals = [wanspec(rtt_ms, lambda row: row.to_ideal) for rtt_ms in IDEAL_RTT_MS]
    yield bar(f"÷ ideal, worst R ≤ {max(IDEAL_RTT_MS):g} ms", IDEAL_LIMIT, _worst(ideals))
    for rtt_ms, limit in CONSTRAINED_LIMITS.items():
        yield bar(f"÷ none_constrained, R = {rtt_ms:g} ms", limit, wanspec(rtt_ms, lambda row: row.to_constrained))
    drafted = [row.to_constrained for row in found.rows if row.cell.arm in remote]
    yield bar("÷ plain, worst of all rows", NEVER_ABOVE, _worst(drafted))
    far = wanspec(FARTHEST_RTT_MS, lambda row: row.to_constrained)
    yield bar(f"÷ plain, R = {FARTHEST_RTT_MS:g} ms", NEVER_ABOVE, far)
    for arm, what in (("wanspec_dead", "drafter dead"), ("wanspec_random", "drafter sends random tokens")):
        row = found.row(arm)
        yield bar(f"÷ plain, {what}", NEVER_ABOVE, None if row is None else row.to_constrained)
    streams = f"{CONCURRENT} streams, R = {CONCURRENT_RTT_MS:g} ms"
    cost = wanspec(CONCURRENT_RTT_MS, lambda row: row.throughput_cost, CONCURRENT)
    yield bar(f"draft_model's throughput ÷ wanspec's, {streams}", THROUGHPUT_LIMIT, cost)
    passes = wanspec(CONCURRENT_RTT_MS, lambda row: _exact(row.local_draft_passes), CONCURRENT)
    yield bar(f"local draft passes, {streams}", 0.0, passes)


def _worst(intervals: Iterable[Interval | None]) -> Interval | None:
    """The one with the highest upper end; None if any is missing, or all are."""
    known = list(intervals)
    found = [one for one in known if one is not None]
    return max(found, key=lambda one: one.high) if found and len(found) == len(known) else None


def _exact(value: float | None) -> Interval | None:
    return None if value is None else Interval(value, value, value)
