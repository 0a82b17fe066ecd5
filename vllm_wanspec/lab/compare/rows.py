"""What an arm did at one round trip and concurrency, and against the other arms: one row.

Plain values and sums: no servers, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm_wanspec.lab.compare.arms import Arm
from vllm_wanspec.lab.compare.ideals import ideals
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.result import SOURCES, Result
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.records import Batch, Cell, Request, Setting
from vllm_wanspec.lab.stats import (
    Interval,
    Timed,
    divided,
    median,
    paired_ratio,
    percentile,
    rounded,
    sum_by_prompt,
    total,
)

#: Ratios of a `Row`, and the result file's names of value and interval.
RATIOS = (
    ("to_draft_model", "ratio_to_draft_model", "ratio_ci"),
    ("to_draft_model_lookup", "ratio_to_draft_model_lookup", "lookup_ci"),
    ("to_constrained", "ratio_to_constrained", "constrained_ci"),
    ("to_none", "ratio_to_none", "none_ci"),
    ("to_ideal", "ratio_to_ideal", "ideal_ci"),
    ("to_ideal_width", "ratio_to_ideal_width", "ideal_width_ci"),
    ("throughput_cost", "throughput_cost", "throughput_ci"),
)
#: Fewer repeats have no interval over repeats.
MIN_RUNS = 2
NO_NUMBERS = {
    "cell",
    "setting",
    "throughput_runs",
    "by_prompt",
    "gaps_ms",
    "busy_s",
    "counters",
    *(name for name, *_ in RATIOS),
}

Times = Mapping[tuple[int, int], Timed]
"""Time and tokens by prompt and repeat."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one arm did at one round trip and concurrency; None for what is unknown or makes no sense there."""

    cell: Cell  # arm, round trip and load
    setting: Setting | None  # what the pre-pass chose for it
    gamma: int | None  # draft tokens per step of the co-located draft model
    measured_rtt_ms: float | None  # the round trip as the link measured it, with the time scale in it
    requests: int
    tokens: int  # after the first ones
    tpot_ms: float | None  # time per token after the first, over all requests
    median_tpot_ms: float | None  # the same per prompt, the median
    ttft_ms: float | None  # time to the first token, the median over requests
    p50_ms: float | None  # between a token and the next, over all requests; 0 for two that came together
    p95_ms: float | None
    p99_ms: float | None
    goodput: float | None  # a rate × the share of its requests that were fast enough
    seconds: float  # duration of all batches
    throughput_tok_s: float | None  # tokens, first ones included, per second
    tokens_per_step: float | None  # tokens after the first per verification step
    verified: float | None  # draft tokens that the target verified
    acceptance: float | None  # share of them that were right
    accepted_main_line: float | None  # draft tokens that the target took: of the draft model's most probable path …
    accepted_branch: float | None  # … of a side branch …
    accepted_lookup: float | None  # … of prompt lookup, ours or vLLM's
    local_draft_passes: float | None  # forwards of a draft model in the target's process, counted there
    drafted: float | None  # tokens that a draft model computed
    wasted: float | None  # those of them that the target did not take
    bytes_up_per_token: float | None  # bytes to the drafter per token
    bytes_down_per_token: float | None  # bytes from it
    waits: float | None  # steps that waited for drafts
    wait_s: float | None  # how long, together
    cpu_target: float | None  # processor time of the target's server per second
    cpu_drafter: float | None  # of the drafter's
    target_overruns: float | None  # share of the target's forwards that took longer than their pace
    drafter_overruns: float | None  # of the drafter's
    local_draft_overruns: float | None  # of those of a draft model in the target's process
    ideal_tpot_ms: float | None  # time per token at best: this round trip, lookup and γ, any width of tree
    ideal_width_tpot_ms: float | None  # the same with the width of tree, and the pace at it, that were used
    ties: int  # outputs that part from the target's own at a floating-point tie
    wrong: int  # outputs that differ otherwise
    throughput_runs: tuple[float, ...]  # as throughput_tok_s, per repeat
    by_prompt: Mapping[int, Timed]  # time and tokens, over the repeats
    gaps_ms: Sequence[float]  # between a token and the next, of all requests, rising
    busy_s: float  # duration of all requests, summed
    counters: Counters  # what they added; what only some batches know counts from those
    to_draft_model: Interval | None  # time per token ÷ draft_model's, paired by prompt
    to_draft_model_lookup: Interval | None  # ÷ draft_model_lookup's
    to_constrained: Interval | None  # ÷ none_constrained's, or none's where that has no async scheduling either
    to_none: Interval | None  # ÷ none's
    to_ideal: Interval | None  # ÷ the ideal's
    to_ideal_width: Interval | None  # ÷ the ideal's with the width that was used
    throughput_cost: Interval | None  # time per token of all streams together ÷ draft_model's, paired by repeat

    @property
    def passes_per_token(self) -> float | None:
        """Draft passes on the target's side per token after the first."""
        return divided(self.local_draft_passes, self.tokens)

    @property
    def name(self) -> str:
        """Arm and round trip."""
        return self.cell.arm if self.cell.rtt_ms is None else f"{self.cell.arm}, R = {self.cell.rtt_ms:g} ms"

    @property
    def committed_per_step(self) -> float | None:
        """Committed tokens per verification step, as the controller counts them."""
        return divided(self.counters.get("committed_tokens"), self.counters.get("steps"))

    @property
    def running_branches(self) -> float | None:
        """Branches that ran on the drafter at a time, on average over the requests' duration.

        What still runs when the last token is out counts in the numerator, until word of the end has crossed the WAN.
        """
        return divided(self.counters.get("branch_seconds"), self.busy_s)

    @property
    def bytes_per_accepted_token(self) -> float | None:
        """Bytes on the link, both ways, per accepted draft token."""
        names = ("received_bytes", "sent_bytes", "committed_tokens", "steps")
        found = [value for name in names if (value := self.counters.get(name)) is not None]
        if len(found) < len(names):
            return None
        received, sent, committed, steps = found
        return divided(received + sent, committed - steps)

    def as_json(self) -> dict[str, Any]:
        """Return the row of the result file."""
        found: dict[str, Any] = self.cell._asdict()
        numbers = [field.name for field in fields(self) if field.name not in NO_NUMBERS]
        found |= {name: rounded(getattr(self, name)) for name in numbers}
        found["setting"] = self.setting and str(self.setting)
        found["throughput_runs"] = [rounded(speed) for speed in self.throughput_runs]
        for name, value_name, interval_name in RATIOS:
            ratio: Interval | None = getattr(self, name)
            found[value_name] = ratio and rounded(ratio.value)
            found[interval_name] = ratio and [rounded(ratio.low), rounded(ratio.high)]
        if len(self.throughput_runs) < MIN_RUNS:
            found["throughput_ci"] = None
        return found


def make_row(result: Result, cell: Cell, batches: Mapping[Cell, Sequence[Batch]]) -> Row:
    """Gather a cell's figures.

    Args:
        result: What the run found.
        cell: Which cell.
        batches: Those of all cells, this one's not empty.
    """
    own, arm, seed = batches[cell], result.options.arm(cell.arm), result.options.seed
    requests = [request for batch in own for request in batch.requests]
    tokens = sum(request.tokens for request in requests)
    seconds = sum(batch.seconds for batch in own)
    timed, gained = times(own), Counters.total(batch.counters for batch in own)
    by_prompt = sum_by_prompt(timed)
    gaps_ms = sorted(gap_ms for request in requests for gap_ms in request.gaps_ms)
    setting = result.setting(arm, cell.load)
    best = ideals(result, cell, setting, {request.prompt for request in requests})
    accepted, verified = (_counted(own, f"num_{name}_tokens") for name in ("accepted", "draft"))
    sources = dict(zip(SOURCES, _sources(arm, own, accepted), strict=True))
    drafted = _drafted(arm, own, verified)
    useful = sources["accepted_main_line"]
    repeats = {batch.repeat: [other for other in own if other.repeat == batch.repeat] for batch in own}

    def against(name: str) -> list[Batch]:
        return list(batches.get(Cell(name, None, *cell.load), ()))

    def to_ideal(one: Mapping[int, Timed]) -> Interval | None:
        return paired(timed, {key: one[key[0]] for key in timed if key[0] in one}, seed)

    def overruns(side: str, forwards: str = "forwards") -> float | None:
        return divided(gained.get(f"{side}_overruns"), gained.get(f"{side}_{forwards}"))

    return Row(
        cell=cell,
        setting=setting,
        gamma=setting.draft_tokens if setting is not None and arm.is_colocated else None,
        measured_rtt_ms=median(batch.rtt_ms for batch in own),
        requests=len(requests),
        tokens=tokens,
        tpot_ms=divided(sum(request.time_ms for request in requests), tokens),
        median_tpot_ms=median(one.per_token_ms for one in by_prompt.values()),
        ttft_ms=median(request.ttft_ms for request in requests),
        **{f"p{share}_ms": percentile(gaps_ms, share / 100) if gaps_ms else None for share in (50, 95, 99)},
        goodput=_goodput(result.options, cell, requests),
        seconds=seconds,
        throughput_tok_s=_throughput(own),
        tokens_per_step=divided(tokens, sum(request.steps for request in requests)),
        verified=verified,
        acceptance=divided(accepted, verified),
        **sources,
        local_draft_passes=_counted(own, "local_draft_passes"),
        drafted=drafted,
        wasted=None if drafted is None or useful is None else drafted - useful - (sources["accepted_branch"] or 0.0),
        bytes_up_per_token=divided(_counted(own, "sent_bytes"), _served(requests)),
        bytes_down_per_token=divided(_counted(own, "received_bytes"), _served(requests)),
        waits=_counted(own, "waits"),
        wait_s=_counted(own, "wait_seconds"),
        cpu_target=divided(_sum(batch.cpu_s.get("target") for batch in own), seconds),
        cpu_drafter=divided(_sum(batch.cpu_s.get("drafter") for batch in own), seconds),
        target_overruns=overruns("target"),
        drafter_overruns=overruns("drafter"),
        local_draft_overruns=overruns("local_draft", "passes"),
        ideal_tpot_ms=total(best.unlimited.values()).per_token_ms,
        ideal_width_tpot_ms=total(best.as_wide.values()).per_token_ms,
        ties=sum(len(batch.ties) for batch in own),
        wrong=sum(len(batch.wrong) for batch in own),
        throughput_runs=tuple(speed for _, one in sorted(repeats.items()) if (speed := _throughput(one)) is not None),
        by_prompt=by_prompt,
        gaps_ms=gaps_ms,
        busy_s=sum(request.ttft_ms + request.time_ms for request in requests) / 1000.0,
        counters=gained,
        to_draft_model=paired(timed, times(against("draft_model")), seed),
        to_draft_model_lookup=paired(timed, times(against("draft_model_lookup")), seed),
        to_constrained=paired(timed, times(against("none_constrained") or _unscheduled(result, against("none"))), seed),
        to_none=paired(timed, times(against("none")), seed),
        to_ideal=to_ideal(best.unlimited),
        to_ideal_width=to_ideal(best.as_wide),
        throughput_cost=paired(_by_repeat(own), _by_repeat(against("draft_model")), seed),
    )


def _sources(arm: Arm, batches: Sequence[Batch], accepted: float | None) -> list[float | None]:
    """Accepted drafts by who made them, in the order of `SOURCES`."""
    if arm.is_remote or arm.target.method == "draft_model_lookup":
        return [_counted(batches, name) for name in SOURCES]
    return [accepted if arm.target.method == method else None for method in ("draft_model", "", "ngram")]


def _drafted(arm: Arm, batches: Sequence[Batch], verified: float | None) -> float | None:
    """Tokens that a draft model computed."""
    if arm.target.method == "draft_model":
        return verified
    return _counted(batches, "drafted_tokens") if arm.is_remote or arm.is_colocated else None


def _unscheduled(result: Result, batches: list[Batch]) -> list[Batch]:
    """Those of plain vLLM as shipped, if it was seen to run without async scheduling, as remote drafts need it."""
    plain = next((arm for arm in result.options.started if arm.target.method == "plain"), None)
    return batches if plain is not None and result.observed(plain, "async_scheduling") is False else []


def _goodput(options: Options, cell: Cell, requests: Sequence[Request]) -> float | None:
    """The part of the rate whose first token, and 95 of 100 later ones, came soon enough; None without a rate.

    Not what came per second of the batch: that ends with the last answer, long after the last arrival.
    """
    if cell.rate is None:
        return None
    ttft_ms, gap_ms = (options.emulated_ms(limit_ms) for limit_ms in options.slo_ms)
    good = [one for one in requests if one.ttft_ms <= ttft_ms and percentile(one.gaps_ms or [0.0], 0.95) <= gap_ms]
    return cell.rate * len(good) / len(requests) if requests else None


def times(batches: Iterable[Batch]) -> dict[tuple[int, int], Timed]:
    """Return time and tokens by prompt and repeat."""
    return {
        (request.prompt, batch.repeat): Timed(request.time_ms, request.tokens)
        for batch in batches
        for request in batch.requests
    }


def paired(above: Times, below: Times, seed: int) -> Interval | None:
    """Return the ratio of times per token over what both have been through."""
    both = sorted(above.keys() & below.keys())
    above_sums, below_sums = (sum_by_prompt({key: part[key] for key in both}) for part in (above, below))
    return paired_ratio([(above_sums[first], below_sums[first]) for first in above_sums], seed)


def _by_repeat(batches: Iterable[Batch]) -> Times:
    """Seconds and tokens of all streams together, by repeat."""
    repeats: dict[tuple[int, int], list[Timed]] = {}
    for batch in batches:
        one = Timed(1000.0 * batch.seconds, _served(batch.requests))
        repeats.setdefault((batch.repeat, 0), []).append(one)
    return {key: total(parts) for key, parts in repeats.items()}


def _counted(batches: Sequence[Batch], name: str) -> float | None:
    return _sum(batch.counters.get(name) for batch in batches)


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum; None if one part is unknown."""
    known = list(values)
    found = [value for value in known if value is not None]
    return sum(found) if found and len(found) == len(known) else None


def _served(requests: Sequence[Request]) -> int:
    """Tokens, first ones included."""
    return sum(request.tokens + 1 for request in requests)


def _throughput(batches: Sequence[Batch]) -> float | None:
    return divided(sum(_served(batch.requests) for batch in batches), sum(batch.seconds for batch in batches))
