"""The GPU check's result: times per token and step, what our constraints and we cost, and what people are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.cells import MARKS, UNKNOWN, interval, number
from vllm_wanspec.lab.report.document import Document, Table, table_of
from vllm_wanspec.lab.stats import Interval, Timed, divided, median_interval, rounded, total
from vllm_wanspec.lab.target.gpu_plan import (
    AS_VLLM_HAS_IT,
    BACKENDS,
    COLOCATED_GIVEN,
    DEAD,
    GIVEN,
    REMOTE_GIVEN,
    SHIPPED,
    GpuOptions,
)
from vllm_wanspec.lab.target.kinds import COLOCATED, PLAIN, REMOTE

MIN_ROUNDS = 5
#: Promise 3: with a drafter that gives nothing, at most so much slower than plain vLLM under the same constraints.
MAX_DEAD = 1.02
FLOAT32 = "float32"
TITLES: Mapping[str, str] = {
    SHIPPED: "plain vLLM as shipped",
    PLAIN: "plain vLLM under our constraints",
    COLOCATED: "co-located draft model, as vLLM has it",
    DEAD: "remote drafting, drafter dead",
    REMOTE: "remote drafting",
    COLOCATED_GIVEN: "co-located draft model, acceptance given",
    REMOTE_GIVEN: "remote drafting, acceptance given",
}


@dataclass(frozen=True)
class GpuRow:
    """One target of a comparison, under one number of requests at a time.

    Attributes:
        backend: Of the comparison.
        tensor_parallel: GPUs of a target.
        given: Whether it is a comparison at a given acceptance.
        kind: What drafts, and under what constraints.
        at_a_time: Requests at a time.
        rounds: Times of each round, over all its requests.
        steps: Engine steps after each request's first token; None where requests share steps, or nobody counts them.
        drafted: Draft tokens that were verified.
        accepted: Those of them that were accepted.
        v2: Whether the server said that it runs Model Runner V2.
        ties: Texts that part from plain vLLM's at a floating-point tie, one line each.
        wrong: Those that differ without one, likewise.
    """

    backend: str
    tensor_parallel: int
    given: bool
    kind: str
    at_a_time: int
    rounds: tuple[Timed, ...]
    steps: float | None
    drafted: float
    accepted: float
    v2: bool
    ties: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{TITLES[self.kind]}: {number(self.per_token_ms, 3)} ms per token"

    @property
    def case(self) -> tuple[str, int, bool, int]:
        """What rows that are compared have in common."""
        return self.backend, self.tensor_parallel, self.given, self.at_a_time

    @property
    def per_token_ms(self) -> float | None:
        """Milliseconds per token of a request, the median of the rounds."""
        known = [one.per_token_ms for one in self.rounds if one.per_token_ms is not None]
        return median(known) if known else None

    @property
    def step_ms(self) -> float | None:
        """Milliseconds per engine step, over all rounds."""
        return divided(total(self.rounds).time_ms, self.steps)

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens that an engine step brings a request."""
        return divided(float(total(self.rounds).tokens), self.steps)

    @property
    def runs_as_asked(self) -> bool:
        """Whether the server runs on the model runner that it was started for."""
        asked = None if self.kind in AS_VLLM_HAS_IT else BACKENDS[self.backend].v2
        return asked is None or asked == self.v2

    def ratio_to(self, base: GpuRow) -> Interval | None:
        """Time per token divided by that of another row, the median of the rounds with its interval."""
        pairs = zip(self.rounds, base.rounds, strict=True)
        ratios = [divided(ours.per_token_ms, other.per_token_ms) for ours, other in pairs]
        known = [one for one in ratios if one is not None]
        return median_interval(known) if known and len(known) == len(ratios) else None

    def as_json(self) -> dict[str, Any]:
        """Return what was measured."""
        return {
            "backend": self.backend,
            "tensor_parallel": self.tensor_parallel,
            "given": self.given,
            "arm": self.kind,
            "at_a_time": self.at_a_time,
            "model_runner": "v2" if self.v2 else "v1",
            "per_token_ms": rounded(self.per_token_ms),
            "step_ms": rounded(self.step_ms),
            "tokens_per_step": rounded(self.tokens_per_step),
            "drafted": rounded(self.drafted),
            "accepted": rounded(self.accepted),
            "rounds": [rounded(one.per_token_ms) for one in self.rounds],
            "ties": list(self.ties),
            "wrong": list(self.wrong),
        }


@dataclass(frozen=True, slots=True)
class GpuResult:
    """Everything that a run found, and, in sentences, what it could not measure here and what failed."""

    options: GpuOptions
    rows: Sequence[GpuRow]
    left_out: Sequence[str] = ()
    failures: Sequence[str] = ()

    def row(self, of: GpuRow, kind: str) -> GpuRow | None:
        """The row of another kind that a row may be compared with."""
        return next((one for one in self.rows if one.case == of.case and one.kind == kind), None)

    def ratio(self, row: GpuRow, kind: str) -> Interval | None:
        """A row's time per token divided by that of another kind; None of itself, and where there is none."""
        base = self.row(row, kind)
        return None if base is None or base is row else row.ratio_to(base)

    def holds(self, row: GpuRow) -> bool | None:
        """Whether promise 3 holds for a row; None where it does not speak of it, or too little was measured."""
        ratio = self.ratio(row, PLAIN) if row.kind == DEAD and len(row.rounds) >= MIN_ROUNDS else None
        return None if ratio is None else ratio.high <= MAX_DEAD and not self.faults(row)

    def faults(self, row: GpuRow) -> list[str]:
        """Why a row means nothing, or something bad."""
        found = []
        if not row.runs_as_asked:
            found.append(f"it runs Model Runner {'V2' if row.v2 else 'V1'}, and {row.backend} was asked for")
        if row.wrong and self.options.dtype == FLOAT32:
            found.append(f"{len(row.wrong)} texts differ from plain vLLM's, the first at {row.wrong[0]}")
        if row.kind in (COLOCATED, REMOTE, *GIVEN) and not row.drafted:
            found.append("no draft was verified")
        return found

    @property
    def held(self) -> bool:
        """Whether all that was asked for was measured, is right, and keeps promise 3."""
        dead = [self.holds(row) for row in self.rows if row.kind == DEAD]
        return bool(dead) and all(dead) and not self.failures and not any(self.faults(row) for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Return what the result file has beside where it comes from."""
        options = self.options
        return {
            "held": self.held,
            "bar": f"{DEAD} ÷ {PLAIN} ≤ {MAX_DEAD}",
            "rows": [
                row.as_json()
                | {
                    "to_plain": _json(self.ratio(row, PLAIN)),
                    "to_shipped": _json(self.ratio(row, SHIPPED)),
                    "held": self.holds(row),
                    "faults": self.faults(row),
                }
                for row in self.rows
            ],
            "left_out": list(self.left_out),
            "failures": list(self.failures),
            "dtype": options.dtype,
            "prompts": options.prompts,
            "max_tokens": options.max_tokens,
            "gamma": options.gamma,
            "rounds": options.rounds,
            "acceptance_rates": options.acceptance_rates,
        }


def _json(ratio: Interval | None) -> list[float | None] | None:
    return None if ratio is None else ratio.as_json()


def gpu_document(result: GpuResult, provenance: Provenance) -> Document:
    """What a run found, for people."""
    return Document(
        title="On a GPU: what our constraints cost, and what remote drafting does",
        tables=[*_tables(result)],
        warnings=[
            *(f"FAILED: {failure}" for failure in result.failures),
            *(
                f"{row.backend}, TP {row.tensor_parallel}, {row.at_a_time} at a time, {TITLES[row.kind]}: {fault}."
                for row in result.rows
                for fault in result.faults(row)
            ),
        ],
        remarks=list(result.left_out),
        method=_method(result.options),
        provenance=str(provenance),
        conditions="Prompt lookup: none in any arm. Not paced, no WAN. "
        f"{result.options.dtype}, γ ≤ {result.options.gamma}.",
    )


def _tables(result: GpuResult) -> Iterator[Table]:
    columns = [
        ("case", lambda row: f"{row.backend}, {row.at_a_time} at a time"),
        ("arm", lambda row: TITLES[row.kind]),
        ("runner", lambda row: "V2" if row.v2 else "V1"),
        ("ms per token", lambda row: number(row.per_token_ms, 3)),
        ("ms per step", lambda row: number(row.step_ms, 3)),
        ("tokens per step", lambda row: number(row.tokens_per_step, 2)),
        ("÷ same constraints", lambda row: interval(result.ratio(row, PLAIN))),
        ("÷ as shipped", lambda row: interval(result.ratio(row, SHIPPED))),
        ("bar", lambda row: f"≤ {MAX_DEAD} {MARKS[result.holds(row)]}" if row.kind == DEAD else UNKNOWN),
    ]
    for size in dict.fromkeys(row.tensor_parallel for row in result.rows):
        rows = [row for row in result.rows if row.tensor_parallel == size]
        yield table_of(f"Tensor parallel: {size}", columns, rows, keys=2, wrong=lambda row: bool(result.faults(row)))


def _method(options: GpuOptions) -> list[str]:
    rates = ", ".join(f"{rate:.2f}" for rate in options.acceptance_rates)
    return [
        f"{options.prompts} prompts × {options.max_tokens} tokens, greedy, through the OpenAI endpoint; "
        f"{options.rounds} rounds after one that does not count. In each round every request goes through all targets "
        "of a comparison, one target at a time, in changing order. Ratios are medians of the rounds' ratios of time "
        "per token after the first, with a bootstrap interval over rounds; a bar is kept when all of the interval is. "
        "Steps are counted by vLLM, and told where one request runs at a time.",
        "`v1`, `v2-sync`, `v2-async`: the model runner and the scheduling of plain vLLM under our constraints and of "
        "remote drafting. Plain vLLM as shipped and co-located draft models run as vLLM decides.",
        f"Acceptance given: vLLM accepts drafts up to position 1, 2, … with probability {rates}, whatever they say "
        "(`rejection_sample_method: synthetic`). It tells what a step with drafts costs, not how good drafts are.",
    ]
