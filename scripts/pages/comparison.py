"""Blocks of the comparison with what a user would run otherwise: ``docs/results/bench.json``."""

from __future__ import annotations

from collections.abc import Callable

from pages.results import (
    CO_LOCATED,
    CO_LOCATED_LOOKUP,
    NO_LOOKUP,
    NOT_MEASURED,
    SIDES,
    WITH_LOOKUP,
    Results,
    Row,
    Side,
    number,
    quotient,
    ratio,
    table,
    used,
)
from pages.sentences import enumerated

NOBODY = "–"
"""For who has no part in an arm, or was not counted."""
README_RTTS_MS = (0.0, 30.0, 70.0)
WHO = ("main_line", "branch", "lookup")
ARMS = {
    "none": ("plain vLLM", "no"),
    "none_constrained": ("plain vLLM as remote drafts need it", "no"),
    "ngram": ("vLLM's prompt lookup", "vLLM's"),
    "lookup": ("our prompt lookup, no drafter", "ours"),
    CO_LOCATED: ("co-located draft model", "no"),
    CO_LOCATED_LOOKUP: ("co-located draft model", "ours"),
    NO_LOOKUP: ("**remote**", "no"),
    WITH_LOOKUP: ("**remote**", "ours"),
    "oracle": ("the target's own text as drafts", "no"),
    "wanspec_dead": ("remote, nobody answers", "no"),
    "wanspec_random": ("remote, random drafts", "no"),
}
"""The arms that are shown: what each is, and which prompt lookup it has."""


def five_rows(results: Results) -> str:
    """README's table: everything without prompt lookup at the left, with it at the right."""

    def line(name: str, plain: Row, helped: Row) -> list[str]:
        return [
            name,
            number(plain.get("tpot_ms"), 2),
            ratio(plain, "ratio_to_draft_model", "ratio_ci"),
            number(helped.get("tpot_ms"), 2),
            ratio(helped, "ratio_to_draft_model_lookup", "lookup_ci"),
            passes(plain, helped),
        ]

    row = results.bench_row
    lines = [
        line("plain vLLM", row("none"), row("lookup")),
        line("co-located draft model", row(CO_LOCATED), row(CO_LOCATED_LOOKUP)),
    ]
    lines += [line(f"**remote, R = {rtt:g} ms**", row(NO_LOOKUP, rtt), row(WITH_LOOKUP, rtt)) for rtt in README_RTTS_MS]
    titles = (
        "",
        "no lookup: ms per token",
        "÷ co-located without lookup (95 %)",
        "with lookup: ms per token",
        "÷ co-located with lookup (95 %)",
        "draft passes on the target's side per token, both halves",
    )
    return (
        f"{table(titles, lines)}\n\nOne stream. In the left half no arm has prompt lookup, in the right half every "
        f"arm has ours, plain and co-located too. {results.conditions()} Source: {results.source('bench')}."
    )


def passes(*rows: Row) -> str:
    """Return how often a draft model ran on the target's side for each token, over all rows that were measured."""
    known = [row for row in rows if row.get("local_draft_passes") is not None and row.get("tokens")]
    ran, tokens = (sum(row[key] for row in known) for key in ("local_draft_passes", "tokens"))
    return number(ran / tokens, 2) if known else NOT_MEASURED


def crossover(results: Results) -> str:
    """Say at which round trips remote drafting is faster than a co-located model, for each side of `SIDES`."""
    pacing = results["bench"]["pacing"]["target"].split("+")
    steps = 100.0 / sum(map(float, pacing))
    found = "; ".join(f"{side.text} {_faster_at(results, side)}" for side in SIDES)
    return (
        "For the demo pair, remote drafting is faster than a co-located model by all of the 95 % interval: "
        f"{found}. R = 100 ms is {steps:.2f} target steps ({results.source('bench')})."
    )


def _faster_at(results: Results, side: Side) -> str:
    """Name the round trips at which the interval of remote ÷ co-located lies below 1, and the others."""
    rows = [(rtt, results.bench_row(side.remote, rtt)) for rtt in results.rtts(side.remote)]
    known = [(f"{rtt:g}", row[side.interval][1] < 1.0) for rtt, row in rows if row.get(side.interval)]
    faster, others = ([rtt for rtt, is_faster in known if is_faster is wanted] for wanted in (True, False))
    if not known:
        return "this has not been measured"
    if not faster:
        return f"at no R that was measured ({enumerated(others)} ms)"
    return f"at R = {enumerated(faster)} ms" + (f", not at {enumerated(others)} ms" if others else "")


def useless_drafter(results: Results) -> str:
    """Say what a drafter that is dead, or sends random tokens, costs; with lookup on it would not show."""
    if not results.has_lookup_apart():
        return f"what it costs has not been measured without lookup ({results.source('bench')})."
    dead, random = (
        ratio(results.bench_row(arm), "ratio_to_none", "none_ci") for arm in ("wanspec_dead", "wanspec_random")
    )
    return (
        f"time per token ÷ plain vLLM (95 %), paced, no lookup: drafter dead {dead}, drafter sending random "
        f"tokens {random} ({results.source('bench')})."
    )


def bench_main(results: Results) -> str:
    """Time per token of every arm and round trip of the single stream."""
    lines = _every_arm(results, _times, 4)
    titles = (
        "",
        "lookup",
        "R ms",
        "ms per token",
        "÷ co-located without lookup (95 %)",
        "÷ co-located with lookup (95 %)",
        "÷ plain (95 %)",
    )
    return f"{table(titles, lines, 2)}\n\n{results.conditions()} Source: {results.source('bench')}."


def bench_sources(results: Results) -> str:
    """Where the tokens of the single stream came from, and how evenly they came."""
    lines = _every_arm(results, _tokens, 4)
    titles = (
        "",
        "lookup",
        "R ms",
        "tokens per step",
        "accepted: main line, branch, lookup",
        "ms between tokens: p50, p95, p99",
        "draft passes on the target's side per token",
    )
    return (
        f"{table(titles, lines, 2)}\n\nAccepted drafts by who made them ({NOBODY}: an arm has no such drafts, or "
        "nobody counted them). Two tokens of one step are 0 ms apart. Conditions as above. Source: "
        f"{results.source('bench')}."
    )


def _every_arm(results: Results, cells: Callable[[Row], list[str]], count: int) -> list[list[str]]:
    """Return the lines of all arms, each with ``count`` cells; those that were not measured say so."""
    lines = []
    for arm, (name, lookup) in ARMS.items():
        rows = [row for row in results["bench"]["rows"] if row["arm"] == arm and row["concurrency"] == 1]
        lines += [[name, lookup, shown_rtt(row), *cells(row)] for row in rows]
        if not rows and arm != "none_constrained":
            lines.append([name, lookup, "", NOT_MEASURED, *[""] * (count - 1)])
    return lines


def shown_rtt(row: Row) -> str:
    """Return a cell with the round trip; empty for an arm that has none."""
    return "" if row["rtt_ms"] is None else f"{row['rtt_ms']:g}"


def _times(row: Row) -> list[str]:
    return [number(row["tpot_ms"], 2), *_to_co_located(row), ratio(row, "ratio_to_none", "none_ci")]


def _to_co_located(row: Row) -> list[str]:
    return [ratio(row, side.ratio, side.interval) for side in SIDES]


def _tokens(row: Row) -> list[str]:
    accepted = [row.get(f"accepted_{who}") for who in WHO]
    between = [row.get(f"{name}_ms") for name in ("p50", "p95", "p99")]
    return [
        number(row.get("tokens_per_step"), 2),
        ", ".join(NOBODY if count is None else number(count) for count in accepted),
        NOT_MEASURED if None in between else ", ".join(number(value, 1) for value in between),
        passes(row),
    ]


def bench_streams(results: Results) -> str:
    """Several streams at a time."""
    lines: list[list[str]] = []
    for arm, (name, lookup) in ARMS.items():
        rows = [row for row in results["bench"]["rows"] if row["arm"] == arm and row["concurrency"] > 1]
        lines += [
            [
                name,
                lookup,
                shown_rtt(row),
                str(row["concurrency"]),
                number(row.get("throughput_tok_s"), 1),
                number(row["tpot_ms"], 2),
                *_to_co_located(row),
                number(row.get("ttft_ms"), 1),
            ]
            for row in rows
        ]
    titles = (
        "",
        "lookup",
        "R ms",
        "streams",
        "tokens per second",
        "ms per token",
        "÷ co-located without lookup (95 %)",
        "÷ co-located with lookup (95 %)",
        "first token, ms",
    )
    return (
        f"{table(titles, lines, 2)}\n\nCo-located at its best γ for so many streams; else conditions as above. Source: "
        f"{results.source('bench')}."
    )


def kinds(results: Results) -> str:
    """Remote drafting by kind of prompt."""
    found = results["bench"].get("kinds", [])
    rows = [row for row in found if row["arm"] in (NO_LOOKUP, WITH_LOOKUP) and row["rtt_ms"] in README_RTTS_MS]
    if not rows:
        return f"Kinds of prompts have not been told apart in a run yet ({results.source('bench')})."

    lines = []
    for kind, rtt_ms in sorted({(row["kind"], row["rtt_ms"]) for row in rows}):
        here = {row["arm"]: row for row in rows if (row["kind"], row["rtt_ms"]) == (kind, rtt_ms)}
        own = [here.get(side.remote, {}) for side in SIDES]
        cells = [
            cell
            for side, row in zip(SIDES, own, strict=True)
            for cell in (number(row.get("tpot_ms"), 2), _triple(row.get(side.ratio)))
        ]
        lines.append([kind, number(next(iter(here.values()))["prompts"]), f"{rtt_ms:g}", *cells])
    titles = (
        "kind of prompt",
        "prompts",
        "R ms",
        "remote without lookup: ms per token",
        "÷ co-located without lookup (95 %)",
        "remote with lookup: ms per token",
        "÷ co-located with lookup (95 %)",
    )
    return f"{table(titles, lines)}\n\nConditions as above. Source: {results.source('bench')}."


def _triple(found: list[float] | None) -> str:
    """A cell with a ratio that stands with its interval in a list."""
    return NOT_MEASURED if found is None else f"{found[0]:.3f} ({found[1]:.3f}–{found[2]:.3f})"


def sizing(results: Results) -> str:
    """Bytes per token each way and what is drafted per token used, from the comparison."""
    lines = []
    for arm in (NO_LOOKUP, WITH_LOOKUP):
        for rtt in results.rtts(arm):
            row = results.bench_row(arm, rtt)
            lines.append(
                [
                    ARMS[arm][1],
                    f"{rtt:g}",
                    number(row.get("bytes_up_per_token")),
                    number(row.get("bytes_down_per_token")),
                    number(quotient(row.get("drafted"), used(row)), 1),
                ]
            )
    titles = ("lookup", "R ms", "bytes per token to the drafter", "bytes per token from it", "drafted ÷ used tokens")
    return (
        f"{table(titles, lines)}\n\nDefault tree, one stream, paced, emulated WAN. Bytes are per token that the "
        "target gave "
        "out; used are the drafter's tokens that the target took, those of prompt lookup left out. Source: "
        f"{results.source('bench')}."
    )
