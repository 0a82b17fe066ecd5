"""The side-by-side bench's rows: what an arm did at one round trip and concurrency, and against the other arms.

Plain values and sums: no servers, no files, no clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_wanspec.lab.compare.ideal import ideal_tpot_ms
from vllm_wanspec.lab.compare.measure import BenchRun
from vllm_wanspec.lab.compare.plan import is_remote, uses_wan
from vllm_wanspec.lab.records import Batch, Cell, Reference, Request
from vllm_wanspec.lab.stats import Interval, Timed, paired_ratio, rounded

__all__ = ["Row", "make_row"]

#: Plain numbers of a `Row`, in the order of the result file.
NUMBERS = (
    "gamma",
    "requests",
    "tokens",
    "tpot_ms",
    "median_tpot_ms",
    "ttft_ms",
    "seconds",
    "throughput_tok_s",
    "tokens_per_step",
    "acceptance",
    "local_draft_passes",
    "drafted",
    "wasted",
    "bytes_up_per_token",
    "bytes_down_per_token",
    "waits",
    "wait_s",
    "cpu_target",
    "cpu_drafter",
    "ideal_tpot_ms",
    "ties",
    "wrong",
)

_Times = Mapping[tuple[int, int], Timed]


@dataclass(frozen=True, slots=True)
class Row:
    """What one arm did at one round trip and concurrency; None for what is unknown or makes no sense there.

    Attributes:
        cell: Arm, round trip and concurrency.
        gamma: Draft tokens per step of the co-located draft model.
        requests: How many.
        tokens: Tokens after the first ones.
        tpot_ms: Time per token after the first, over all requests.
        median_tpot_ms: The same per prompt, the median.
        ttft_ms: Time to the first token, the median over requests.
        seconds: Duration of all batches.
        throughput_tok_s: Tokens, first ones included, per second.
        throughput_runs: The same, per repeat.
        tokens_per_step: Tokens after the first per verification step.
        acceptance: Share of the verified drafts that were right.
        local_draft_passes: Forward passes of a draft model on the target's side.
        passes_estimated: Whether these were inferred from how many requests ran at a time.
        drafted: Tokens that a draft model computed.
        wasted: Those of them that the target did not take.
        bytes_up_per_token: Bytes to the drafter per token.
        bytes_down_per_token: Bytes from it.
        waits: Steps that waited for drafts.
        wait_s: How long, together.
        cpu_target: Processor time of the target's server per second.
        cpu_drafter: Of the drafter's.
        to_draft_model: Time per token ÷ draft_model's, paired by prompt.
        to_constrained: ÷ none_constrained's; above concurrency 1 ÷ none's where that is not measured.
        to_none: ÷ none's.
        to_ideal: ÷ the ideal's.
        throughput_cost: Time per token of all streams together ÷ draft_model's, paired by repeat.
        ideal_tpot_ms: Time per token of the ideal drafter at this round trip.
        ties: Outputs that part from the target's own at a floating-point tie.
        wrong: Outputs that differ otherwise.
    """

    cell: Cell
    gamma: int | None
    requests: int
    tokens: int
    tpot_ms: float | None
    median_tpot_ms: float | None
    ttft_ms: float | None
    seconds: float
    throughput_tok_s: float | None
    throughput_runs: tuple[float, ...]
    tokens_per_step: float | None
    acceptance: float | None
    local_draft_passes: float | None
    passes_estimated: bool
    drafted: float | None
    wasted: float | None
    bytes_up_per_token: float | None
    bytes_down_per_token: float | None
    waits: float | None
    wait_s: float | None
    cpu_target: float | None
    cpu_drafter: float | None
    to_draft_model: Interval | None
    to_constrained: Interval | None
    to_none: Interval | None
    to_ideal: Interval | None
    throughput_cost: Interval | None
    ideal_tpot_ms: float | None
    ties: int
    wrong: int

    @property
    def passes_per_token(self) -> float | None:
        """Draft passes on the target's side per token after the first."""
        return _divided(self.local_draft_passes, self.tokens)

    def as_json(self) -> dict[str, Any]:
        """Return the row of the result file."""
        arm, rtt_ms, concurrency = self.cell
        found: dict[str, Any] = {"arm": arm, "rtt_ms": rtt_ms, "concurrency": concurrency}
        found |= {name: rounded(getattr(self, name)) for name in NUMBERS}
        found["throughput_runs"] = [rounded(speed) for speed in self.throughput_runs]
        found["passes_estimated"] = self.passes_estimated
        for name, interval, ratio in (
            ("ratio_to_draft_model", "ratio_ci", self.to_draft_model),
            ("ratio_to_constrained", "constrained_ci", self.to_constrained),
            ("ratio_to_none", "none_ci", self.to_none),
            ("ratio_to_ideal", "ideal_ci", self.to_ideal),
            ("throughput_cost", "throughput_ci", self.throughput_cost),
        ):
            found[name] = ratio and rounded(ratio.value)
            found[interval] = ratio and [rounded(ratio.low), rounded(ratio.high)]
        return found


def make_row(run: BenchRun, cell: Cell, batches: Mapping[Cell, Sequence[Batch]]) -> Row:
    """Gather a cell's figures.

    Args:
        run: The run.
        cell: Which cell.
        batches: Those of all cells, this one's not empty.
    """
    own = batches[cell]
    requests = [request for batch in own for request in batch.requests]
    colocated = cell.arm == "draft_model"
    gamma = run.gamma if colocated else None
    tokens = sum(request.tokens for request in requests)
    seconds = sum(batch.seconds for batch in own)
    times = _times(own)
    ideals = _ideals(run, cell, {request.prompt for request in requests})
    accepted, verified = _total(own, "num_accepted_tokens"), _total(own, "num_draft_tokens")
    drafted = verified if colocated else _total(own, "drafted_tokens") if is_remote(cell.arm) else None

    def against(arm: str) -> list[Batch]:
        return list(batches.get(Cell(arm, None, cell.concurrency), ()))

    def ratio(below: Iterable[Batch]) -> Interval | None:
        return _paired(times, _times(below), run.options.seed)

    constrained = against("none_constrained") or (against("none") if cell.concurrency > 1 else [])
    repeats = {batch.repeat: [other for other in own if other.repeat == batch.repeat] for batch in own}
    return Row(
        cell=cell,
        gamma=gamma,
        requests=len(requests),
        tokens=tokens,
        tpot_ms=_divided(sum(request.time_ms for request in requests), tokens),
        median_tpot_ms=_median(timed.per_token_ms for timed in _by_prompt(times).values()),
        ttft_ms=_median(request.ttft_ms for request in requests),
        seconds=seconds,
        throughput_tok_s=_throughput(own),
        throughput_runs=tuple(speed for _, one in sorted(repeats.items()) if (speed := _throughput(one)) is not None),
        tokens_per_step=_divided(tokens, sum(request.steps for request in requests)),
        acceptance=_divided(accepted, verified),
        local_draft_passes=_local_passes(cell, own, gamma),
        passes_estimated=colocated and cell.concurrency > 1,
        drafted=drafted,
        wasted=None if drafted is None or accepted is None else drafted - accepted,
        bytes_up_per_token=_divided(_total(own, "sent_bytes"), _served(requests)),
        bytes_down_per_token=_divided(_total(own, "received_bytes"), _served(requests)),
        waits=_total(own, "waits"),
        wait_s=_total(own, "wait_seconds"),
        cpu_target=_divided(_total(own, "target", lambda batch: batch.cpu_s), seconds),
        cpu_drafter=_divided(_total(own, "drafter", lambda batch: batch.cpu_s), seconds),
        to_draft_model=ratio(against("draft_model")),
        to_constrained=ratio(constrained),
        to_none=ratio(against("none")),
        to_ideal=_paired(times, {key: ideals[key[0]] for key in times if key[0] in ideals}, run.options.seed),
        throughput_cost=_throughput_cost(own, against("draft_model"), run.options.seed),
        ideal_tpot_ms=_sum(ideals.values()).per_token_ms,
        ties=sum(batch.ties for batch in own),
        wrong=sum(len(batch.wrong) for batch in own),
    )


def _local_passes(cell: Cell, batches: Sequence[Batch], gamma: int | None) -> float | None:
    if is_remote(cell.arm):
        return _total(batches, "local_draft_passes")
    if cell.arm != "draft_model":
        return 0.0
    drafts = _total(batches, "num_drafts")
    if drafts is None or gamma is None:
        return None
    if cell.concurrency == 1:
        return drafts * gamma
    # Requests that run at a time share a pass: how many, from how long each took.
    busy_ms = sum(request.ttft_ms + request.time_ms for batch in batches for request in batch.requests)
    running = _divided(busy_ms, 1000.0 * sum(batch.seconds for batch in batches)) or 1.0
    return drafts * gamma / max(1.0, running)


def _ideals(run: BenchRun, cell: Cell, prompts: Collection[int]) -> dict[int, Timed]:
    """The ideal drafter's time for each prompt; empty where there is none."""
    target, draft = run.options.target_forward, run.options.draft_forward
    if not uses_wan(cell.arm) or cell.rtt_ms is None or cell.concurrency > 1 or target is None or draft is None:
        return {}
    limit, rtt_ms = run.options.speculative_tokens, run.options.emulated_ms(cell.rtt_ms)

    def per_token_ms(one: Reference) -> float | None:
        return ideal_tpot_ms([one], rtt_ms=rtt_ms, target=target, draft=draft, limit=limit)

    return {
        one.index: Timed(pace * (len(one.expected) - 1), len(one.expected) - 1)
        for one in run.references
        if one.index in prompts and (pace := per_token_ms(one)) is not None
    }


def _throughput_cost(own: Sequence[Batch], below: Sequence[Batch], seed: int) -> Interval | None:
    """Seconds per token of all streams ÷ those of another arm, in each repeat."""

    def by_repeat(batches: Sequence[Batch]) -> dict[tuple[int, int], Timed]:
        sums: dict[tuple[int, int], Timed] = {}
        for batch in batches:
            timed = Timed(1000.0 * batch.seconds, _served(batch.requests))
            sums[batch.repeat, 0] = _sum([sums.get((batch.repeat, 0), Timed(0.0, 0)), timed])
        return sums

    return _paired(by_repeat(own), by_repeat(below), seed)


def _times(batches: Iterable[Batch]) -> dict[tuple[int, int], Timed]:
    """Time and tokens by prompt and repeat."""
    return {
        (request.prompt, batch.repeat): Timed(request.time_ms, request.tokens)
        for batch in batches
        for request in batch.requests
    }


def _paired(times: _Times, below: _Times, seed: int) -> Interval | None:
    """Ratio of times per token over what both have been through."""
    both = sorted(times.keys() & below.keys())
    above_sums, below_sums = (_by_prompt({key: part[key] for key in both}) for part in (times, below))
    return paired_ratio([(above_sums[first], below_sums[first]) for first in above_sums], seed)


def _by_prompt(times: _Times) -> dict[int, Timed]:
    sums: dict[int, Timed] = {}
    for (first, _), timed in times.items():
        sums[first] = _sum([sums.get(first, Timed(0.0, 0)), timed])
    return sums


def _sum(parts: Iterable[Timed]) -> Timed:
    both = list(parts)
    return Timed(sum(part.time_ms for part in both), sum(part.tokens for part in both))


def _total(
    batches: Sequence[Batch], name: str, side: Callable[[Batch], Mapping[str, float]] = lambda batch: batch.counters
) -> float | None:
    """A counter's increase over all batches; None if one of them does not know it."""
    values = [side(batch).get(name) for batch in batches]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _served(requests: Sequence[Request]) -> int:
    """Tokens, first ones included."""
    return sum(request.tokens + 1 for request in requests)


def _throughput(batches: Sequence[Batch]) -> float | None:
    return _divided(sum(_served(batch.requests) for batch in batches), sum(batch.seconds for batch in batches))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _divided(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
