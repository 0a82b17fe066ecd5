"""Blocks of the comparison under further conditions: ``docs/results/more/NAME.json``, one study each.

Each has a table and says in sentences what its intervals allow, whatever the figures are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pages.comparison import ARMS
from pages.results import (
    INVALID,
    NO_LOOKUP,
    SIDES,
    Results,
    Row,
    Side,
    counts,
    not_yet,
    number,
    prompts,
    ratio,
    row_of,
    scaled,
    table,
)
from pages.sentences import beside, by_place, capital, compared, enumerated, speed, than
from vllm_wanspec.lab.compare.studies import BASE, RTT_MS, STUDIES

COMMAND = "bench-more"
ONE_STREAM = (BASE, "t07", "t10", "jitter", "loss", "cut8")
ORDER = ", in this order"
WITH = ("with {} stream", "with {} streams")
AT_RATE = ("at {} request per second", "at {} requests per second")
AT_TRIP = "at R = {} ms"
PAGE, PICTURE = "more.md", "Time per token, throughput and goodput under further conditions, and against the ideal"


def one_stream(results: Results) -> str:
    """One stream at one round trip, with one thing changed."""
    names = [name for name in ONE_STREAM if _measured(results, name)]
    if not names:
        return not_yet(COMMAND, f"more/{BASE}.json")
    lines, said = [], []
    unchanged = _read(results, BASE)
    for name in ONE_STREAM:
        title, data = STUDIES[name].title, _read(results, name)
        rows = [(side, _remote(data, side)) for side in SIDES]
        times = [(number(row.get("tpot_ms"), 2), ratio(row, side.ratio, side.interval)) for side, row in rows]
        lines.append([title, *(cell for pair in times for cell in pair)])
        if name in names:
            said.append(f"{title}: {_changed(rows, {} if name == BASE else unchanged)}")
    titles = (
        "",
        "remote without lookup: ms per token",
        "÷ co-located without lookup (95 %)",
        "remote with lookup: ms per token",
        "÷ co-located with lookup (95 %)",
    )
    told = "\n".join(f"- {sentence}" for sentence in said)
    ending = f"One stream, R = {RTT_MS:g} ms. {_conditions(results, names)}"
    return f"{table(titles, lines)}\n\n{told}\n\n{ending}{results.whole(PAGE, PICTURE)}"


def streams(results: Results) -> str:
    """Several streams at a time."""
    if not _measured(results, "streams"):
        return not_yet(COMMAND, "more/streams.json")
    data = results[_file("streams")]
    loads = sorted({row["concurrency"] for row in data["rows"]})
    lines = []
    for load in loads:
        cells = [number(row_of(data, "none", concurrency=load).get("throughput_tok_s"), 1)]
        for side in SIDES:
            ours, theirs = _pair(data, side, concurrency=load)
            cells += [number(row.get("throughput_tok_s"), 1) for row in (theirs, ours)]
            cells.append(ratio(ours, side.ratio, side.interval))
        lines.append([str(load), *cells])
    titles = (
        "streams",
        "plain vLLM, tokens/s",
        "no lookup: co-located, tokens/s",
        "remote, tokens/s",
        "time per token, remote ÷ co-located (95 %)",
        "with lookup: co-located, tokens/s",
        "remote, tokens/s",
        "time per token, remote ÷ co-located (95 %)",
    )
    said = []
    for side in SIDES:
        pairs = [(load, *_pair(data, side, concurrency=load)) for load in loads]
        times = [(speed(ours.get(side.interval)), load) for load, ours, _ in pairs]
        speeds = [(_against(ours, theirs, "throughput_tok_s", 1), load) for load, ours, theirs in pairs]
        said.append(
            f"{capital(side.text)} a token of remote drafting is, beside a co-located one, {by_place(times, *WITH)}. "
            f"Tokens per second, which have no interval, are {by_place(speeds, *WITH)}."
        )
    return _block(titles, lines, said, results, "streams", f"R = {RTT_MS:g} ms.")


def rates(results: Results) -> str:
    """Requests at random times."""
    if not _measured(results, "rates"):
        return not_yet(COMMAND, "more/rates.json")
    data = results[_file("rates")]
    loads = sorted({row["rate"] for row in data["rows"]})
    lines, said = [], []
    for rate in loads:
        rows = [row for side in SIDES for row in reversed(_pair(data, side, rate=rate))]
        lines.append([f"{rate:g}", *(number(row.get("goodput"), 2) for row in rows)])
    for side in SIDES:
        pairs = [(_pair(data, side, rate=rate), rate) for rate in loads]
        goods = [(_against(ours, theirs, "goodput", 2), rate) for (ours, theirs), rate in pairs]
        said.append(
            f"{capital(side.text)} the goodput of remote drafting is, beside that of co-located drafting, "
            f"{by_place(goods, *AT_RATE)}."
        )
    first_ms, gap_ms = (limit * data["time_scale"] for limit in data["options"]["slo_ms"])
    titles = (
        "requests per second",
        "no lookup: co-located",
        "remote",
        "with lookup: co-located",
        "remote",
    )
    note = (
        f"Goodput: requests per second whose first token came within {first_ms:g} ms and 95 % of the others within "
        f"{gap_ms:g} ms of the one before; it has no interval. R = {RTT_MS:g} ms."
    )
    return _block(titles, lines, said, results, "rates", note)


def scale(results: Results) -> str:
    """Long paces and round trips, where fixed costs weigh little: how far from the ideal."""
    if not _measured(results, "scale5"):
        return not_yet(COMMAND, "more/scale5.json")
    data = results[_file("scale5")]
    rows = [row for row in data["rows"] if row["arm"] == NO_LOOKUP]
    lines = [
        [
            f"{row['rtt_ms']:g}",
            number(row.get("tpot_ms"), 1),
            ratio(row, "ratio_to_draft_model", "ratio_ci"),
            number(row.get("ideal_tpot_ms"), 1),
            ratio(row, "ratio_to_ideal", "ideal_ci"),
            ratio(row, "ratio_to_ideal_width", "ideal_width_ci"),
        ]
        for row in rows
    ]
    titles = (
        "R ms",
        "remote without lookup: ms per token",
        "÷ co-located without lookup (95 %)",
        "ideal, ms per token",
        "÷ ideal (95 %)",
        "÷ ideal as wide (95 %)",
    )
    times = [(speed(row.get("ratio_ci")), row["rtt_ms"]) for row in rows]
    said = []
    if rows:
        said.append(
            "Without lookup on either side a token of remote drafting is, beside a co-located one, "
            f"{by_place(times, AT_TRIP, AT_TRIP)}."
        )
    here, usual = row_of(data, NO_LOOKUP, RTT_MS), _remote(_read(results, BASE), SIDES[0])
    if here.get("ideal_ci") and usual.get("ideal_ci"):
        said.append(
            f"At R = {RTT_MS:g} ms it takes {here['ratio_to_ideal']:.2f} times the ideal's, "
            f"{than(beside(here['ideal_ci'], usual['ideal_ci']))} the {usual['ratio_to_ideal']:.2f} times at the time "
            "scale of the other conditions."
        )
    return _block(titles, lines, said, results, "scale5", f"One stream. {scaled(data)}.")


def useless(results: Results) -> str:
    """Drafters that are dead, or send random tokens."""
    if not _measured(results, "useless"):
        return not_yet(COMMAND, "more/useless.json")
    data = results[_file("useless")]
    lines, said = [], []
    for arm in ("none", "wanspec_dead", "wanspec_random"):
        rows = [row for row in data["rows"] if row["arm"] == arm]
        name = ARMS[arm][0]
        lines += [
            [name, str(row["concurrency"]), number(row.get("tpot_ms"), 2), ratio(row, "ratio_to_none", "none_ci")]
            for row in rows
        ]
        if rows and arm != "none":
            times = [(speed(row.get("none_ci")), row["concurrency"]) for row in rows]
            said.append(f"{capital(name)}: beside plain vLLM a token is {by_place(times, *WITH)}.")
    return _block(("", "streams", "ms per token", "÷ plain (95 %)"), lines, said, results, "useless", "No lookup.")


# Rows


def _file(name: str) -> str:
    return f"more/{name}"


def _measured(results: Results, name: str) -> bool:
    return results.has(f"{_file(name)}.json")


def _read(results: Results, name: str) -> dict[str, Any]:
    """A study's file; one without rows where it is missing."""
    return results[_file(name)] if _measured(results, name) else {"rows": []}


def _remote(data: dict[str, Any], side: Side) -> Row:
    """The row of remote drafting as one stream."""
    return row_of(data, side.remote, RTT_MS, concurrency=1)


def _pair(data: dict[str, Any], side: Side, **load: float) -> tuple[Row, Row]:
    """The rows of remote drafting and of the co-located model under a load."""
    return row_of(data, side.remote, RTT_MS, **load), row_of(data, side.co_located, **load)


# Text


def _changed(rows: Sequence[tuple[Side, Row]], base: dict[str, Any]) -> str:
    """Say how remote drafting stands to the co-located model, and whether that is otherwise with nothing changed."""
    ends = [(side, row.get(side.interval)) for side, row in rows]
    peers = ("co-located drafting", *["it"] * (len(ends) - 1))
    parts = [f"{than(speed(found))} {peer} {side.text}" for peer, (side, found) in zip(peers, ends, strict=True)]
    said = f"remote drafting is {enumerated(parts)}."
    others = [_remote(base, side).get(side.interval) for side, _ in ends] if base else []
    pairs = [(found, other) for (_, found), other in zip(ends, others, strict=bool(base)) if found and other]
    if not pairs:
        return said
    verdicts = dict.fromkeys(than(beside(found, other)) for found, other in pairs)
    which = "The ratio is" if len(pairs) == 1 else "Both ratios are" if len(verdicts) == 1 else "The ratios are"
    what = "that" if len(pairs) == 1 else "those"
    return f"{said} {which} {enumerated([*verdicts])} {what} with nothing changed{ORDER * (len(verdicts) > 1)}."


def _against(ours: Row, theirs: Row, key: str, digits: int) -> str:
    return compared(ours.get(key), theirs.get(key), digits)


def _block(
    titles: Sequence[str], lines: list[list[str]], said: list[str], results: Results, name: str, note: str
) -> str:
    told = "\n".join(f"- {sentence}" for sentence in said)
    return f"{table(titles, lines)}\n\n{told}\n\n{note} {_conditions(results, [name])}"


def _conditions(results: Results, names: Iterable[str]) -> str:
    """Return what is the same in some studies, and their files."""
    files = {name: results[_file(name)] for name in names}
    bad = [name for name, data in files.items() if not counts(data)]
    said = [f"{INVALID} ({enumerated(bad)})"] if bad else []
    measured = dict.fromkeys(f"{prompts(data)}, time scale {data['time_scale']:g}" for data in files.values())
    machines = dict.fromkeys(data["machine"] for data in files.values())
    sources = "; ".join(results.source(_file(name)) for name in files)
    said.append(f"{enumerated([*measured])}; {enumerated([*machines])}; all else as above. Source: {sources}.")
    return " ".join(said)
