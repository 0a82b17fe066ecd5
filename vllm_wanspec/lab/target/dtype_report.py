"""The dtype bench's result: how many greedy texts part from plain vLLM's, and what people are told of it."""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_wanspec.lab.harness.client import TIE_NATS
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.cells import AHEAD, UNKNOWN, number
from vllm_wanspec.lab.report.document import Column, Document, table_of
from vllm_wanspec.lab.stats import Interval, is_more_often, rounded, wilson
from vllm_wanspec.lab.target.kinds import COLOCATED, PLAIN, REMOTE

FLOAT32, BFLOAT16 = "float32", "bfloat16"
DTYPES = (FLOAT32, BFLOAT16)
#: Plain vLLM's own texts in float32 beside those at another dtype: what the dtype itself changes.
OTHER_DTYPE = "plain_float32"
TITLES: Mapping[str, str] = {
    PLAIN: "plain vLLM again",
    COLOCATED: "vLLM's co-located speculation",
    REMOTE: "remote drafting",
    OTHER_DTYPE: "plain vLLM in float32",
}


@dataclass(frozen=True, slots=True)
class DtypeOptions:
    """The bench's settings, as its command explains them."""

    dtypes: tuple[str, ...] = DTYPES
    prompts: int = 64
    max_tokens: int = 128
    gamma: int = 4
    at_a_time: tuple[int, ...] = (1, 8)
    models: Path | None = None


@dataclass(frozen=True, slots=True)
class Divergence:
    """A text that parts from plain vLLM's.

    Attributes:
        name: Of its prompt.
        position: Number of the first token that differs, from 0.
        gap_nats: Between the two tokens' log-probabilities there, asked of plain vLLM at the same dtype; None where
            one of them is none of the 20 most probable, or one text ends.
    """

    name: str
    position: int
    gap_nats: float | None

    @property
    def is_tie(self) -> bool:
        """Whether the tokens are a floating-point tie."""
        return self.gap_nats is not None and self.gap_nats <= TIE_NATS


@dataclass(frozen=True)
class DtypeRow:
    """One kind of target at one dtype.

    Attributes:
        dtype: Of the target's weights and activations.
        kind: What drafts.
        at_a_time: Requests at a time.
        requests: How many texts were compared.
        divergences: Those that differ.
    """

    dtype: str
    kind: str
    at_a_time: int
    requests: int
    divergences: tuple[Divergence, ...] = ()

    def __str__(self) -> str:
        count = len(self.divergences)
        return f"{self.dtype}, {TITLES[self.kind]}, {self.at_a_time} at a time: {count} of {self.requests} differ"

    @property
    def ties(self) -> int:
        """How many part at a tie."""
        return sum(one.is_tie for one in self.divergences)

    @property
    def gaps_nats(self) -> list[float]:
        """The gaps that are known."""
        return [one.gap_nats for one in self.divergences if one.gap_nats is not None]

    @functools.cached_property
    def share(self) -> Interval | None:
        """The share of texts that differ, ties included, with Wilson's interval; None without any text."""
        return wilson(len(self.divergences), self.requests)

    @functools.cached_property
    def share_without_ties(self) -> Interval | None:
        """The share of those that differ elsewhere than at a tie."""
        return wilson(len(self.divergences) - self.ties, self.requests)

    def as_json(self) -> dict[str, Any]:
        """Return counts, shares and where the texts part."""
        gaps = self.gaps_nats
        return {
            "dtype": self.dtype,
            "arm": self.kind,
            "at_a_time": self.at_a_time,
            "requests": self.requests,
            "diverged": len(self.divergences),
            "ties": self.ties,
            "share": _json(self.share),
            "share_without_ties": _json(self.share_without_ties),
            "median_gap_nats": rounded(statistics.median(gaps)) if gaps else None,
            "max_gap_nats": rounded(max(gaps)) if gaps else None,
            "divergences": [[one.name, one.position, rounded(one.gap_nats)] for one in self.divergences],
        }


def _json(share: Interval | None) -> list[float | None] | None:
    return None if share is None else share.as_json()


@dataclass(frozen=True, slots=True)
class DtypeResult:
    """All rows of a run."""

    options: DtypeOptions
    rows: Sequence[DtypeRow]

    def row(self, dtype: str, kind: str, at_a_time: int) -> DtypeRow | None:
        """Return a row, if it was measured."""
        wanted = (dtype, kind, at_a_time)
        return next((row for row in self.rows if (row.dtype, row.kind, row.at_a_time) == wanted), None)

    def pairs(self) -> Iterator[tuple[DtypeRow, DtypeRow]]:
        """Yield ours and vLLM's own speculation, which are to be compared."""
        for ours in self.rows:
            theirs = self.row(ours.dtype, COLOCATED, ours.at_a_time)
            if ours.kind == REMOTE and theirs is not None:
                yield ours, theirs

    @property
    def held(self) -> bool:
        """Whether ours is nowhere known to diverge more often than vLLM's, and in float32 only at ties."""
        pairs = list(self.pairs())
        exact = all(len(ours.divergences) == ours.ties for ours, _ in pairs if ours.dtype == FLOAT32)
        return bool(pairs) and exact and not any(_is_above(ours, theirs) for ours, theirs in pairs)

    def as_json(self) -> dict[str, Any]:
        """Return what the result file has beside where it comes from."""
        options = self.options
        return {
            "held": self.held,
            "pacing": None,
            "prompts": options.prompts,
            "max_tokens": options.max_tokens,
            "gamma": options.gamma,
            "tie_nats": TIE_NATS,
            "rows": [row.as_json() for row in self.rows],
        }


def _is_above(ours: DtypeRow, theirs: DtypeRow) -> bool:
    """Whether ours differ more often, judged by the prompts of which one alone differs."""
    own, other = (Counter(one.name for one in row.divergences) for row in (ours, theirs))
    return is_more_often((own - other).total(), (other - own).total())


def dtype_document(result: DtypeResult, provenance: Provenance) -> Document:
    """What a run found, for people."""
    columns: list[Column[DtypeRow]] = [
        ("dtype", lambda row: row.dtype),
        ("target", lambda row: TITLES[row.kind]),
        ("at a time", lambda row: str(row.at_a_time)),
        ("texts", lambda row: str(row.requests)),
        ("diverged", lambda row: str(len(row.divergences))),
        ("share", lambda row: _share(row.share)),
        ("at ties", lambda row: str(row.ties)),
        ("share elsewhere", lambda row: _share(row.share_without_ties)),
        ("median gap, nats", lambda row: number(statistics.median(row.gaps_nats), 4) if row.gaps_nats else UNKNOWN),
        ("largest gap, nats", lambda row: number(max(row.gaps_nats), 4) if row.gaps_nats else UNKNOWN),
    ]
    return Document(
        title="Greedy texts that part from plain vLLM's, by dtype",
        tables=[table_of("Diverging texts", columns, result.rows, keys=3, wrong=lambda row: _is_bad(result, row))],
        warnings=[],
        remarks=[_compared(ours, theirs) for ours, theirs in result.pairs()],
        method=_method(result.options),
        provenance=str(provenance),
        conditions=f"Prompt lookup: ours in remote drafting alone. Async scheduling: {AHEAD}. Not paced, no WAN.",
    )


def _share(share: Interval | None) -> str:
    return UNKNOWN if share is None else f"{share.value:.1%} ({share.low:.1%}–{share.high:.1%})"


def _is_bad(result: DtypeResult, row: DtypeRow) -> bool:
    """Whether a row keeps the result from holding."""
    theirs = result.row(row.dtype, COLOCATED, row.at_a_time)
    if row.kind != REMOTE or theirs is None:
        return False
    return _is_above(row, theirs) or (row.dtype == FLOAT32 and len(row.divergences) > row.ties)


def _compared(ours: DtypeRow, theirs: DtypeRow) -> str:
    verdict = "more often than" if _is_above(ours, theirs) else "less often than" if _is_above(theirs, ours) else ""
    said = f"ours diverges {verdict} vLLM's own speculation" if verdict else "the intervals overlap"
    return (
        f"{ours.dtype}, {ours.at_a_time} at a time: remote drafting {_share(ours.share)}, vLLM's co-located "
        f"speculation {_share(theirs.share)}: {said}."
    )


def _method(options: DtypeOptions) -> list[str]:
    return [
        f"{options.prompts} prompts, greedy, up to {options.max_tokens} tokens, through targets of the same dtype; "
        "compared as token ids with what plain vLLM generates one request at a time. Shares with Wilson's 95 % "
        "interval over texts. No prompt comes from the prefix cache.",
        f"Both kinds of speculation verify up to {options.gamma} drafts per step; remote drafting as configured by "
        "default, prompt lookup included, its drafter in float32.",
        "A gap is the difference between the log-probabilities of the two tokens at the first position where texts "
        "part, asked of plain vLLM at the same dtype; up to "
        f"{TIE_NATS:g} nats it is a floating-point tie. In bfloat16 neighbouring logits between 8 and 16 differ by "
        "0.0625. `plain vLLM again` shows what batching alone does, `plain vLLM in float32` what the dtype does.",
    ]
