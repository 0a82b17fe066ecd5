"""What the demo found: the figures, their JSON form, and the table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.rows import Row, make_row
from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE
from vllm_wanspec.lab.report.cells import number
from vllm_wanspec.lab.report.document import Document, Table
from vllm_wanspec.lab.stats import divided, rounded


@dataclass(frozen=True, slots=True)
class DemoFigures:
    """What the demo found.

    Attributes:
        result: The run.
        plain: The plain target's pass.
        wanspec: That of the target with remote drafts.
    """

    result: Result
    plain: Row
    wanspec: Row

    @property
    def identical(self) -> bool:
        """Whether all outputs are the same, up to ties."""
        return not self.result.wrong

    @property
    def ratio(self) -> float | None:
        """WANSpec's time per token divided by plain vLLM's (of the medians)."""
        return divided(self.wanspec.median_tpot_ms, self.plain.median_tpot_ms)

    @property
    def plain_overhead_ms(self) -> float | None:
        """Milliseconds that a plain step takes on top of its pace: vLLM's own work, and a busy machine's delays."""
        plain_ms, pace = self.plain.median_tpot_ms, self.result.options.target_pace
        return None if plain_ms is None or pace is None else plain_ms - pace.step_ms(1)

    def count(self, name: str) -> int:
        """Return the increase of a counter; 0 for one without a sample."""
        return int(self.wanspec.counters.get(name) or 0)


def demo_figures(result: Result) -> DemoFigures:
    """Gather the demo's figures."""
    batches = result.by_cell
    plain, remote = (make_row(result, cell, batches) for cell in batches)
    return DemoFigures(result, plain, remote)


def as_json(found: DemoFigures) -> dict[str, Any]:
    """Return the result file's content."""
    result, options = found.result, found.result.options
    target, draft = options.target_pace, options.draft_pace
    both = zip(_paces_ms(found.plain), _paces_ms(found.wanspec), strict=True)
    return {
        "rtt_ms": options.rtt_ms[0],
        "pacing": {
            "target_ms": target and target.base_ms,
            "draft_ms": draft and draft.base_ms,
            "target_ms_per_token": target and target.per_token_ms,
            "draft_ms_per_token": draft and draft.per_token_ms,
        },
        "arms": _arms_json(found),
        "identical": found.identical,
        "ratio": rounded(found.ratio),
        "plain_overhead_ms": rounded(found.plain_overhead_ms),
        "ties": len(result.ties),
        "divergences": [*result.wrong, *result.ties],
        "overruns": result.overruns_json()["overruns"],
        "per_prompt": [{"none_tpot_ms": rounded(plain), "wanspec_tpot_ms": rounded(other)} for plain, other in both],
        "prompts": options.count,
        "max_tokens": options.max_tokens,
        "speculative_tokens": options.speculative_tokens,
        **result.provenance.as_json(),
    }


def _arms_json(found: DemoFigures) -> dict[str, Any]:
    def times(row: Row) -> dict[str, Any]:
        return {"tpot_ms": rounded(row.median_tpot_ms), "ttft_ms": rounded(row.ttft_ms)}

    counts = {"hits": "hits", "misses": "misses", "late": "late_drafts"}
    return {
        "none": times(found.plain),
        "wanspec": {
            **times(found.wanspec),
            "tokens_per_step": rounded(found.wanspec.committed_per_step),
            **{name: found.count(counter) for name, counter in counts.items()},
            "local_draft_passes": rounded(found.wanspec.local_draft_passes),
        },
    }


def document(found: DemoFigures) -> Document:
    """Return the result for people."""
    result, options = found.result, found.result.options
    shares = ", ".join(f"{name} {paced.share:.2%} of {paced.steps:,}" for name, paced in result.paced.items())
    overhead = f"A plain step takes {_ms(found.plain_overhead_ms)} on top of its pace"
    return Document(
        title="Remote drafting beside plain vLLM",
        tables=[_table(found)],
        warnings=_warnings(found),
        remarks=[f"floating-point tie in {line}" for line in result.ties],
        method=[
            f"Emulated round trip between target and drafter: {options.rtt_ms[0]:g} ms. Paced by sleeping in the model "
            f"forward: target {options.target_pace}, draft {options.draft_pace}. Everything else is real.",
            f"{overhead}; forwards slower than their pace: {shares}.",
        ],
        provenance=str(result.provenance),
        conditions=result.haves,
    )


def _table(found: DemoFigures) -> Table:
    plain, wanspec, options = found.plain, found.wanspec, found.result.options
    ratio = "" if found.ratio is None else f" ({found.ratio:.2f} of plain)"
    per_step = "?" if found.wanspec.committed_per_step is None else f"{found.wanspec.committed_per_step:.2f}"
    ties = f", {len(found.result.ties)} floating-point ties" if found.result.ties else ""
    rows = [
        ("time per token, median", _ms(plain.median_tpot_ms), _ms(wanspec.median_tpot_ms) + ratio),
        ("time per token, mean", _ms(_mean(plain)), _ms(_mean(wanspec))),
        ("time to first token, median", _ms(plain.ttft_ms), _ms(wanspec.ttft_ms)),
        ("tokens per step", "1", per_step),
        ("hits (commits that stay in the draft)", "", str(found.count("hits"))),
        ("misses", "", str(found.count("misses"))),
        ("late draft tokens", "", str(found.count("late_drafts"))),
        ("draft passes on the target's side", "", number(found.wanspec.local_draft_passes)),
        ("identical output", "", ("yes" if found.identical else "NO") + ties),
    ]
    title = f"{options.count} prompts, up to {options.max_tokens} tokens each"
    wrong = () if found.identical else (len(rows) - 1,)
    return Table(title, ("", "plain vLLM", "WANSpec"), rows, wrong=wrong)


def _warnings(found: DemoFigures) -> list[str]:
    texts = []
    for name, paced in found.result.paced.items():
        if paced.share > MAX_OVERRUN_SHARE:
            problem = f"{paced.share:.1%} of the {name} server's forwards took longer than their pace"
            texts.append(f"warning: {problem}: this machine is too slow or too busy for these figures.")
    if not found.count("hits"):
        texts.append("warning: no draft was ever used; see the servers' logs (--logs DIR).")
    return texts + [f"error: different output in {line}" for line in found.result.wrong]


def _paces_ms(row: Row) -> list[float | None]:
    """Time per token of each prompt; None for one with fewer than two tokens."""
    return [timed.per_token_ms for timed in row.by_prompt.values()]


def _mean(row: Row) -> float | None:
    known = [pace for pace in _paces_ms(row) if pace is not None]
    return statistics.fmean(known) if known else None


def _ms(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} ms"
