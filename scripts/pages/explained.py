"""Blocks on where the time of a token goes, and how far that is from the best: ``docs/results/bench.json``."""

from __future__ import annotations

from pages.comparison import ARMS, WHO, shown_rtt
from pages.results import Results, Row, number, quotient, ratio, table


def bench_ideal(results: Results) -> str:
    """How far each arm is from what its kind of drafting could do at best on the same texts."""
    lines = [
        [
            ARMS[row["arm"]][0],
            ARMS[row["arm"]][1],
            shown_rtt(row),
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
    return f"{table(titles, lines, 2)}\n\nConditions as above. Source: {results.source('bench')}."


def attribution(results: Results) -> str:
    """Where the time of a token goes: what a step takes, and for what, and how many tokens it yields."""
    data = results["bench"]
    paces = [[float(part) * data["time_scale"] for part in data["pacing"][side].split("+")] for side in SERVERS]
    (target_ms, per_token_ms), (draft_ms, per_row_ms) = paces
    lines = []
    for row in _single_rows(results):
        per_step, tokens = row.get("tokens_per_step"), row.get("tokens")
        if not per_step or not tokens or row.get("local_draft_passes") is None:
            continue
        steps = tokens / per_step
        forward_ms = target_ms + per_token_ms * (1.0 + _verified(row) / steps)
        # One pass per draft token and step, its prefill's included.
        passes_ms = row["local_draft_passes"] / (steps + row["requests"]) * (draft_ms + per_row_ms)
        step_ms = row["tpot_ms"] * per_step
        lines.append(
            [
                ARMS[row["arm"]][0],
                ARMS[row["arm"]][1],
                shown_rtt(row),
                number(row["tpot_ms"], 2),
                number(per_step, 2),
                number(step_ms, 1),
                number(forward_ms, 1),
                number(passes_ms, 1),
                number(step_ms - forward_ms - passes_ms, 1),
                number((forward_ms + passes_ms) / per_step, 2),
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
        "ms per token at the paces alone",
    )
    return f"{table(titles, lines, 2)}\n\n{results.conditions()} Source: {results.source('bench')}."


SERVERS = ("target", "draft")


def _verified(row: Row) -> float:
    """How many drafts the target verified; 0 where none was, or nobody counted them."""
    if row.get("verified") is not None:
        return float(row["verified"])
    taken = [row[f"accepted_{who}"] for who in WHO if row.get(f"accepted_{who}") is not None]
    steps = row["tokens"] / row["tokens_per_step"]
    return quotient(sum(taken) if taken else row["tokens"] - steps, row.get("acceptance")) or 0.0


def _single_rows(results: Results) -> list[Row]:
    """The rows of single streams, in the order of `ARMS`."""
    rows = [row for row in results["bench"]["rows"] if row["concurrency"] == 1 and row["arm"] in ARMS]
    return sorted(rows, key=lambda row: list(ARMS).index(row["arm"]))
