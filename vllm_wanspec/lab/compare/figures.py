"""The figures of `wanspec bench`: one row per arm, round trip and concurrency, and the bars that they have to hold.

Plain values and sums: no servers, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_wanspec.lab.compare.arms import ARMS
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.rows import Row, make_row, paired, times
from vllm_wanspec.lab.records import Cell, Load
from vllm_wanspec.lab.stats import Interval, Timed, rounded, total

#: Time per token of arms whose drafter is of no use, without lookup, ÷ plain vLLM's under the same constraints.
NEVER_ABOVE = 1.02
USELESS = {"wanspec_dead": "drafter dead", "wanspec_random": "drafter sends random tokens"}
FARTHEST_RTT_MS = 500.0
#: What remote drafting is held against, without and with lookup.
PEERS = ("draft_model", "draft_model_lookup")
REMOTE = frozenset(arm.name for arm in ARMS.values() if arm.uses_wan)
SINGLE = Load()
#: Fewer prompts cannot tell.
MIN_PROMPTS = 24


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that was asked for.

    Attributes:
        text: What.
        limit: The most it may be.
        value: What it is; None if it was not measured.
        upper: The upper end of its 95 % interval, which is what is judged.
        held: Whether it holds; None where this run cannot tell.
    """

    text: str
    limit: float
    value: float | None
    upper: float | None
    held: bool | None

    def as_json(self) -> dict[str, Any]:
        """Return the entry of the result file."""
        numbers = {name: rounded(getattr(self, name)) for name in ("limit", "value", "upper")}
        return {"text": self.text, **numbers, "held": self.held}


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
        """Whether all bars hold; None where the run cannot tell."""
        verdicts = [bar.held for bar in self.bars]
        if False in verdicts:
            return False
        return None if None in verdicts else True

    def row(self, arm: str, rtt_ms: float | None = None, load: Load = SINGLE) -> Row | None:
        """Return the row of a cell, if it was measured."""
        return next((row for row in self.rows if row.cell == (arm, rtt_ms, *load)), None)


@dataclass(frozen=True, slots=True)
class KindRow:
    """What an arm did with the prompts of one kind, one request at a time.

    Attributes:
        row: Of all kinds.
        kind: Of prompts.
        prompts: How many there are.
        tpot_ms: Time per token.
        to_draft_model: ÷ draft_model's, paired by prompt.
        to_draft_model_lookup: ÷ draft_model_lookup's.
    """

    row: Row
    kind: str
    prompts: int
    tpot_ms: float | None
    to_draft_model: Interval | None
    to_draft_model_lookup: Interval | None

    def as_json(self) -> dict[str, Any]:
        """Return the entry of the result file."""
        numbers = {"prompts": self.prompts, "tpot_ms": rounded(self.tpot_ms)}
        ratios = {"to_draft_model": self.to_draft_model, "to_draft_model_lookup": self.to_draft_model_lookup}
        made = {f"ratio_{name}": ratio and ratio.as_json() for name, ratio in ratios.items()}
        return {"arm": self.row.cell.arm, "rtt_ms": self.row.cell.rtt_ms, "kind": self.kind, **numbers, **made}


def figures(run: Result) -> Figures:
    """Gather a run's figures."""
    batches = run.by_cell
    rows = tuple(make_row(run, cell, batches) for cell in batches)
    doubts = tuple(_doubts(run))
    return Figures(rows, tuple(_bars(Figures(rows, (), doubts))), doubts)


def kind_rows(run: Result, found: Figures) -> list[KindRow]:
    """Return the figures of single streams by kind of prompt; nothing where all are of one kind."""
    kinds: dict[str, set[int]] = {}
    for one in run.references:
        kinds.setdefault(one.kind, set()).add(one.index)
    if len(kinds) < 2:
        return []
    timed = {cell: times(own) for cell, own in run.by_cell.items()}

    def of_kind(cell: Cell, kind: str) -> dict[tuple[int, int], Timed]:
        return {key: one for key, one in timed.get(cell, {}).items() if key[0] in kinds[kind]}

    made = []
    for row in found.rows:
        for kind in kinds if row.cell.single else ():
            own, peers = of_kind(row.cell, kind), [of_kind(Cell(arm, None), kind) for arm in PEERS]
            ratios = [paired(own, below, run.options.seed) for below in peers]
            made.append(KindRow(row, kind, len({key[0] for key in own}), total(own.values()).per_token_ms, *ratios))
    return made


def _doubts(run: Result) -> Iterable[str]:
    if run.ended_by is not None:
        yield "the run did not come to its end"
    if run.options.target_pace is None:
        yield "it was not paced"
    yield from run.faults()
    if run.wrong:
        yield "there are wrong outputs"
    if len(run.references) < MIN_PROMPTS:
        yield f"there are fewer than {MIN_PROMPTS} prompts"


def _bars(found: Figures) -> Iterable[Bar]:
    """The bars, on rows alone: ``found`` has none yet."""

    def bar(text: str, limit: float, interval: Interval | None) -> Bar:
        if interval is None:
            return Bar(text, limit, None, None, None)
        held = interval.high <= limit if not found.doubts else None
        return Bar(text, limit, interval.value, interval.high, held)

    useless = {what: found.row(arm) for arm, what in USELESS.items()}
    useless[f"R = {FARTHEST_RTT_MS:g} ms"] = found.row("wanspec_no_lookup", FARTHEST_RTT_MS)
    for what, row in useless.items():
        yield bar(f"without lookup ÷ plain, {what}", NEVER_ABOVE, None if row is None else row.to_constrained)
    passes = [row.local_draft_passes for row in found.rows if row.cell.arm in REMOTE]
    known = [count for count in passes if count is not None]
    most = max(known) if known and len(known) == len(passes) else None
    yield bar(
        "draft passes on the target's side, remote drafts", 0.0, None if most is None else Interval(most, most, most)
    )
