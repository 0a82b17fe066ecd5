"""What an arm did at one round trip and concurrency, and against the other arms: one row.

Plain values and sums: no servers, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm_wanspec.core.analysis.ideal import ideal_decode_ms
from vllm_wanspec.lab.compare.arms import Arm
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.records import Batch, Cell, Reference, Request
from vllm_wanspec.lab.stats import Interval, Timed, divided, median, paired_ratio, rounded, sum_by_prompt, total

#: Ratios of a `Row`, and the result file's names of value and interval.
RATIOS = (
    ("to_draft_model", "ratio_to_draft_model", "ratio_ci"),
    ("to_constrained", "ratio_to_constrained", "constrained_ci"),
    ("to_none", "ratio_to_none", "none_ci"),
    ("to_ideal", "ratio_to_ideal", "ideal_ci"),
    ("throughput_cost", "throughput_cost", "throughput_ci"),
)
NO_NUMBERS = {
    "cell",
    "throughput_runs",
    "passes_estimated",
    "by_prompt",
    "busy_s",
    "counters",
    *(name for name, *_ in RATIOS),
}

Times = Mapping[tuple[int, int], Timed]
"""Time and tokens by prompt and repeat."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one arm did at one round trip and concurrency; None for what is unknown or makes no sense there."""

    cell: Cell  # arm, round trip and concurrency
    gamma: int | None  # draft tokens per step of the co-located draft model
    requests: int
    tokens: int  # after the first ones
    tpot_ms: float | None  # time per token after the first, over all requests
    median_tpot_ms: float | None  # the same per prompt, the median
    ttft_ms: float | None  # time to the first token, the median over requests
    seconds: float  # duration of all batches
    throughput_tok_s: float | None  # tokens, first ones included, per second
    tokens_per_step: float | None  # tokens after the first per verification step
    acceptance: float | None  # share of the verified drafts that were right
    local_draft_passes: float | None  # forward passes of a draft model on the target's side
    drafted: float | None  # tokens that a draft model computed
    wasted: float | None  # those of them that the target did not take
    bytes_up_per_token: float | None  # bytes to the drafter per token
    bytes_down_per_token: float | None  # bytes from it
    waits: float | None  # steps that waited for drafts
    wait_s: float | None  # how long, together
    cpu_target: float | None  # processor time of the target's server per second
    cpu_drafter: float | None  # of the drafter's
    ideal_tpot_ms: float | None  # time per token of the ideal drafter at this round trip
    ties: int  # outputs that part from the target's own at a floating-point tie
    wrong: int  # outputs that differ otherwise
    throughput_runs: tuple[float, ...]  # as throughput_tok_s, per repeat
    passes_estimated: bool  # whether draft passes were inferred from how many requests ran at a time
    by_prompt: Mapping[int, Timed]  # time and tokens, over the repeats
    busy_s: float  # duration of all requests, summed
    counters: Counters  # what they added; what only some batches know counts from those
    to_draft_model: Interval | None  # time per token ÷ draft_model's, paired by prompt
    to_constrained: Interval | None  # ÷ none_constrained's; above concurrency 1 ÷ none's where that is not measured
    to_none: Interval | None  # ÷ none's
    to_ideal: Interval | None  # ÷ the ideal's
    throughput_cost: Interval | None  # time per token of all streams together ÷ draft_model's, paired by repeat

    @property
    def passes_per_token(self) -> float | None:
        """Draft passes on the target's side per token after the first."""
        return divided(self.local_draft_passes, self.tokens)

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
        found["throughput_runs"] = [rounded(speed) for speed in self.throughput_runs]
        found["passes_estimated"] = self.passes_estimated
        for name, value_name, interval_name in RATIOS:
            ratio: Interval | None = getattr(self, name)
            found[value_name] = ratio and rounded(ratio.value)
            found[interval_name] = ratio and [rounded(ratio.low), rounded(ratio.high)]
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
    colocated = arm.target.method == "draft_model"
    gamma = result.gamma if colocated else None
    tokens = sum(request.tokens for request in requests)
    seconds = sum(batch.seconds for batch in own)
    timed = times(own)
    by_prompt = sum_by_prompt(timed)
    busy_s = sum(request.ttft_ms + request.time_ms for request in requests) / 1000.0
    running = divided(busy_s, seconds) or 1.0
    ideals = _ideals(result, cell, {request.prompt for request in requests})
    accepted, verified = _counted(own, "num_accepted_tokens"), _counted(own, "num_draft_tokens")
    drafted = verified if colocated else _counted(own, "drafted_tokens") if arm.is_remote else None

    def against(name: str) -> list[Batch]:
        return list(batches.get(Cell(name, None, cell.concurrency), ()))

    constrained = against("none_constrained") or (against("none") if cell.concurrency > 1 else [])
    repeats = {batch.repeat: [other for other in own if other.repeat == batch.repeat] for batch in own}
    return Row(
        cell=cell,
        gamma=gamma,
        requests=len(requests),
        tokens=tokens,
        tpot_ms=divided(sum(request.time_ms for request in requests), tokens),
        median_tpot_ms=median(one.per_token_ms for one in by_prompt.values()),
        ttft_ms=median(request.ttft_ms for request in requests),
        seconds=seconds,
        throughput_tok_s=_throughput(own),
        tokens_per_step=divided(tokens, sum(request.steps for request in requests)),
        acceptance=divided(accepted, verified),
        local_draft_passes=_local_passes(arm, own, gamma, running if cell.concurrency > 1 else 1.0),
        drafted=drafted,
        wasted=None if drafted is None or accepted is None else drafted - accepted,
        bytes_up_per_token=divided(_counted(own, "sent_bytes"), _served(requests)),
        bytes_down_per_token=divided(_counted(own, "received_bytes"), _served(requests)),
        waits=_counted(own, "waits"),
        wait_s=_counted(own, "wait_seconds"),
        cpu_target=divided(_sum(batch.cpu_s.get("target") for batch in own), seconds),
        cpu_drafter=divided(_sum(batch.cpu_s.get("drafter") for batch in own), seconds),
        ideal_tpot_ms=total(ideals.values()).per_token_ms,
        ties=sum(len(batch.ties) for batch in own),
        wrong=sum(len(batch.wrong) for batch in own),
        throughput_runs=tuple(speed for _, one in sorted(repeats.items()) if (speed := _throughput(one)) is not None),
        passes_estimated=colocated and cell.concurrency > 1,
        by_prompt=by_prompt,
        busy_s=busy_s,
        counters=Counters.total(batch.counters for batch in own),
        to_draft_model=paired(timed, times(against("draft_model")), seed),
        to_constrained=paired(timed, times(constrained), seed),
        to_none=paired(timed, times(against("none")), seed),
        to_ideal=paired(timed, {key: ideals[key[0]] for key in timed if key[0] in ideals}, seed),
        throughput_cost=paired(_by_repeat(own), _by_repeat(against("draft_model")), seed),
    )


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


def _local_passes(arm: Arm, batches: Sequence[Batch], gamma: int | None, running: float) -> float | None:
    """Draft passes on the target's side; requests that run at a time share one, so many as are ``running``."""
    if arm.is_remote:
        return _counted(batches, "local_draft_passes")
    if arm.target.method != "draft_model":
        return 0.0
    drafts = _counted(batches, "num_drafts")
    return None if drafts is None or gamma is None else drafts * gamma / max(1.0, running)


def _ideals(result: Result, cell: Cell, prompts: Collection[int]) -> dict[int, Timed]:
    """The ideal drafter's time for each prompt; empty where there is none."""
    options = result.options
    target, draft = options.target_forward, options.draft_forward
    rtt_ms = cell.rtt_ms
    if rtt_ms is None or cell.concurrency > 1 or target is None or draft is None or not options.ranked:
        return {}
    own = [one for one in result.references if one.index in prompts and len(one.expected) > 1]

    def decode_ms(one: Reference) -> float:
        return ideal_decode_ms(
            one.ranks,
            len(one.prompt_ids),
            rtt_ms=options.emulated_ms(rtt_ms),
            target_ms=target.step_ms,
            draft_ms=draft.step_ms,
            limit=options.speculative_tokens,
        )

    return {one.index: Timed(decode_ms(one), len(one.expected) - 1) for one in own}


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
