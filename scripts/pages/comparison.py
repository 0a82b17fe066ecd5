"""Blocks of the comparison with what a user would run otherwise: ``docs/results/bench.json``."""

from __future__ import annotations

from pages.results import (
    CO_LOCATED,
    CO_LOCATED_LOOKUP,
    NO_LOOKUP,
    NOT_MEASURED,
    WITH_LOOKUP,
    Results,
    Row,
    number,
    quotient,
    ratio,
    table,
    used,
)

NOBODY = "–"
"""For who has no part in an arm, or was not counted."""
README_RTTS_MS = (0.0, 30.0, 70.0)
SIDES = ("target", "draft")
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
        "draft passes on the target's side",
    )
    return (
        f"{table(titles, lines)}\n\nOne stream. In the left half no arm has prompt lookup, in the right half every "
        "arm has ours, "
        f"plain and co-located too. {results.conditions()} Source: {results.source('bench')}."
    )


def passes(*rows: Row) -> str:
    """Return how often a draft model ran on the target's side, over all rows that were measured."""
    known = [row["local_draft_passes"] for row in rows if row.get("local_draft_passes") is not None]
    return number(sum(known)) if known else NOT_MEASURED


def crossover(results: Results) -> str:
    """Say from which round trip on the co-located model is as good, lookup on neither side and on both."""
    pacing = results["bench"]["pacing"]["target"].split("+")
    steps = 100.0 / sum(map(float, pacing))
    bare = _as_good(results, NO_LOOKUP, "ratio_ci") if results.has_lookup_apart() else None
    helped = _as_good(results, WITH_LOOKUP, "lookup_ci")
    if bare is None:
        found = "from which R on a co-located model is as good was not measured without lookup"
    else:
        found = f"a co-located model is as good {bare}, without lookup on either side"
    found += f"; with ours on both sides {helped or 'that was not measured'}"
    return f"For the demo pair, {found}; R = 100 ms is {steps:.2f} target steps ({results.source('bench')})."


def _as_good(results: Results, arm: str, interval: str) -> str | None:
    """From which round trip on an arm is not known to beat its co-located peer; None where one was not compared."""
    rtts = results.rtts(arm)
    ends = {rtt: results.bench_row(arm, rtt).get(interval) for rtt in rtts}
    if not rtts or None in ends.values():
        return None
    as_good = [rtt for rtt in rtts if ends[rtt][1] >= 1.0]
    return f"from R = {as_good[0]:g} ms on" if as_good else f"at no R up to {rtts[-1]:g} ms"


def useless_drafter(results: Results) -> str:
    """Say what a drafter that is dead, or sends random tokens, costs; with lookup on it would not show."""
    if not results.has_lookup_apart():
        return f"What a dead or useless drafter costs was not measured without lookup ({results.source('bench')})."
    dead, random = (
        ratio(results.bench_row(arm), "ratio_to_none", "none_ci") for arm in ("wanspec_dead", "wanspec_random")
    )
    return (
        f"Time per token ÷ plain vLLM (95 %), paced, without lookup: drafter dead {dead}, drafter sending random "
        f"tokens {random} ({results.source('bench')})."
    )


def bench_main(results: Results) -> str:
    """Every arm and round trip of the single stream."""
    lines = []
    for arm, (name, lookup) in ARMS.items():
        rows = [row for row in results["bench"]["rows"] if row["arm"] == arm and row["concurrency"] == 1]
        lines += [[name, lookup, _rtt(row), *_main_cells(row)] for row in rows]
        if not rows and arm != "none_constrained":
            lines.append([name, lookup, "", NOT_MEASURED, *[""] * 7])
    titles = (
        "",
        "lookup",
        "R ms",
        "ms per token",
        "÷ co-located without lookup (95 %)",
        "÷ co-located with lookup (95 %)",
        "÷ plain (95 %)",
        "tokens per step",
        "accepted: main line, branch, lookup",
        "between tokens, ms: p50, p95, p99",
        "draft passes on the target's side",
    )
    return f"{table(titles, lines, 2)}\n\n{results.conditions()} Source: {results.source('bench')}."


def _rtt(row: Row) -> str:
    return "" if row["rtt_ms"] is None else f"{row['rtt_ms']:g}"


def _main_cells(row: Row) -> list[str]:
    accepted = [row.get(f"accepted_{who}") for who in WHO]
    between = [row.get(f"{name}_ms") for name in ("p50", "p95", "p99")]
    return [
        number(row["tpot_ms"], 2),
        ratio(row, "ratio_to_draft_model", "ratio_ci"),
        ratio(row, "ratio_to_draft_model_lookup", "lookup_ci"),
        ratio(row, "ratio_to_none", "none_ci"),
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
                _rtt(row),
                str(row["concurrency"]),
                number(row.get("throughput_tok_s"), 1),
                *_main_cells(row)[:3],
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
    return f"{table(titles, lines, 2)}\n\nConditions as above. Source: {results.source('bench')}."


def bench_ideal(results: Results) -> str:
    """How far each arm is from what its kind of drafting could do at best on the same texts."""
    lines = [
        [
            ARMS[row["arm"]][0],
            ARMS[row["arm"]][1],
            _rtt(row),
            number(row.get("tpot_ms"), 2),
            number(row.get("ideal_tpot_ms"), 2),
            ratio(row, "ratio_to_ideal", "ideal_ci"),
            number(row.get("ideal_width_tpot_ms"), 2),
            ratio(row, "ratio_to_ideal_width", "ideal_width_ci"),
        ]
        for row in _single_rows(results)
        if row.get("ideal_tpot_ms") is not None
    ]
    titles = (
        "",
        "lookup",
        "R ms",
        "ms per token",
        "ideal, ms per token",
        "÷ ideal (95 %)",
        "ideal as wide, ms per token",
        "÷ ideal as wide (95 %)",
    )
    return f"{table(titles, lines, 2)}\n\n{results.conditions()} Source: {results.source('bench')}."


def attribution(results: Results) -> str:
    """Where the time of a token goes: what a step takes, and for what, and how many tokens it yields."""
    data = results["bench"]
    paces = [[float(part) * data["time_scale"] for part in data["pacing"][side].split("+")] for side in SIDES]
    (target_ms, per_token_ms), (draft_ms, per_row_ms) = paces
    lines = []
    for row in _single_rows(results):
        per_step, tokens = row.get("tokens_per_step"), row.get("tokens")
        if not per_step or not tokens or row.get("local_draft_passes") is None:
            continue
        steps = tokens / per_step
        taken = sum(row.get(f"accepted_{who}") or 0 for who in WHO)
        verified = row.get("verified") or quotient(taken, row.get("acceptance")) or 0.0
        forward_ms = target_ms + per_token_ms * (1.0 + verified / steps)
        # One pass per draft token and step, its prefill's included.
        passes_ms = row["local_draft_passes"] / (steps + row["requests"]) * (draft_ms + per_row_ms)
        step_ms = row["tpot_ms"] * per_step
        lines.append(
            [
                ARMS[row["arm"]][0],
                ARMS[row["arm"]][1],
                _rtt(row),
                number(row["tpot_ms"], 2),
                number(per_step, 2),
                number(step_ms, 1),
                number(forward_ms, 1),
                number(passes_ms, 1),
                number(step_ms - forward_ms - passes_ms, 1),
            ]
        )
    titles = (
        "",
        "lookup",
        "R ms",
        "ms per token",
        "tokens per step",
        "ms per step",
        "of these the target's forward, at its pace",
        "draft passes on the target's side, at theirs",
        "everything else",
    )
    return f"{table(titles, lines, 2)}\n\nConditions as above. Source: {results.source('bench')}."


def kinds(results: Results) -> str:
    """Remote drafting by kind of prompt."""
    found = results["bench"].get("kinds", [])
    rows = [row for row in found if row["arm"] in (NO_LOOKUP, WITH_LOOKUP) and row["rtt_ms"] in README_RTTS_MS]

    def against(row: Row, key: str) -> str:
        value = row.get(key)
        return NOT_MEASURED if value is None else f"{value[0]:.3f} ({value[1]:.3f}–{value[2]:.3f})"

    lines = [
        [
            row["kind"],
            number(row["prompts"]),
            ARMS[row["arm"]][1],
            f"{row['rtt_ms']:g}",
            number(row["tpot_ms"], 2),
            against(row, "ratio_to_draft_model"),
            against(row, "ratio_to_draft_model_lookup"),
        ]
        for row in sorted(rows, key=lambda row: (row["kind"], row["arm"], row["rtt_ms"]))
    ]
    titles = (
        "kind of prompt",
        "prompts",
        "lookup of remote drafts",
        "R ms",
        "ms per token",
        "÷ co-located without lookup (95 %)",
        "÷ co-located with lookup (95 %)",
    )
    return f"{table(titles, lines)}\n\nConditions as above. Source: {results.source('bench')}."


def _single_rows(results: Results) -> list[Row]:
    """The rows of single streams, in the order of `ARMS`."""
    rows = [row for row in results["bench"]["rows"] if row["concurrency"] == 1 and row["arm"] in ARMS]
    return sorted(rows, key=lambda row: list(ARMS).index(row["arm"]))


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
