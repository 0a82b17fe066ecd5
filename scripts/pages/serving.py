"""Blocks on how many clients a target serves, ``capacity.json``, and on texts at other dtypes, ``dtype.json``."""

from __future__ import annotations

from typing import Any

from pages.results import INVALID, Results, Row, not_yet, number, pace, percent, table
from pages.sentences import by_place

NONE = "–"
IDENTITY, BATCHED = "1 + γ·t_d/t_v", "batched form"
PICTURE = "Tokens per second and client against the number of clients"
PLAIN, CO_LOCATED, REMOTE, OTHER_DTYPE = "plain", "draft_model", "remote", "plain_float32"
TOGETHER = ("with {} request at a time", "with {} requests at a time")


def capacity(results: Results) -> str:
    """How many clients get a rate, drafts remote or co-located, beside what theory says of the quotient."""
    if not results.has("capacity.json"):
        return not_yet("bench-capacity", "capacity.json")
    data = results["capacity"]
    parts = [part for load in data["loads"] for part in _load(data, load)]
    left_out = sum(not row["valid"] for row in data["rows"])
    said = [] if data["held"] or left_out else [INVALID]
    said.append(
        f"Closed loops of greedy requests, {data['max_tokens']} tokens each; no prompt lookup in any arm; both sides "
        "at the same γ. Numbers of clients are interpolated between those that were tried; ≥: more were not tried. "
        f"{IDENTITY} is what a step with co-located drafts takes ÷ one without drafting, at the paces and "
        "the co-located number of clients; the batched form knows the constant part of a forward too. No intervals: "
        "each row was measured once."
    )
    if left_out:
        said.append(f"{left_out} of {len(data['rows'])} measured rows are invalid (pace, R or output) and left out.")
    scale = f", paces and R × {data['time_scale']:g}" if data["time_scale"] != 1 else ""
    said.append(f"Paced, emulated WAN{scale}; {data['machine']}. Source: {results.source('capacity')}.")
    return "\n\n".join([*parts, " ".join(said)]) + results.whole("capacity.md", PICTURE)


def _load(data: dict[str, Any], load: dict[str, Any]) -> list[str]:
    """The table of a load, and what it says."""
    trips = data["rtt_ms"]
    found = [one for one in data["capacities"] if one["load"] == load["name"]]
    lines = []
    for place in [one for one in found if one["rtt_ms"] == trips[0]]:
        here = [_at(found, place, rtt_ms) for rtt_ms in trips]
        cells = [cell for one in here for cell in (_clients(one.get("remote"), load), _ratio(one))]
        lines.append(
            [
                f"{place['gamma']}",
                number(place["rate"], 1),
                _clients(place["colocated"], load),
                *cells,
                number(place["identity"], 2),
                NONE if place["batched"] is None else number(place["batched"], 2),
            ]
        )
    titles = [
        "γ",
        "tokens/s for each",
        "co-located: clients",
        *(title for rtt_ms in trips for title in (f"remote, R = {rtt_ms:g} ms: clients", "÷ co-located")),
        IDENTITY,
        BATCHED,
    ]
    name = f"Load *{load['name']}*: target {pace(load['target_pace'])}, co-located draft {pace(load['draft_pace'])}."
    said = [sentence for rtt_ms in trips if (sentence := _said(found, rtt_ms))]
    if reason := _reason(data, load["name"]):
        said.append(reason)
    return [name, table(titles, lines), *(["\n".join(f"- {sentence}" for sentence in said)] if said else [])]


def _at(found: list[Row], place: Row, rtt_ms: float) -> Row:
    """The comparison at another round trip; an empty one if there is none."""
    wanted = {"gamma": place["gamma"], "rate": place["rate"], "rtt_ms": rtt_ms}
    return next((one for one in found if wanted.items() <= one.items()), {})


def _clients(capacity: Row | None, load: dict[str, Any]) -> str:
    """A cell with a number of clients; fewer than were tried where none gets the rate."""
    if capacity is None:
        return f"< {load['clients'][0]}"
    return f"{'≥ ' * capacity['at_least']}{capacity['clients']:.1f}"


def _ratio(one: Row) -> str:
    remote, ratio = one.get("remote"), one.get("ratio")
    return NONE if remote is None or ratio is None else f"{'≥ ' * remote['at_least']}{ratio:.2f}"


def _said(found: list[Row], rtt_ms: float) -> str:
    """Hold the quotients at a round trip against theory; nothing where there is none."""
    rows = [one for one in found if one["rtt_ms"] == rtt_ms]
    known = [one for one in rows if one["ratio"] is not None]
    if not known:
        return ""
    ratios = sorted(one["ratio"] for one in known)
    exact = [one for one in known if not one["remote"]["at_least"]]
    below = sum(one["ratio"] < one["identity"] for one in exact)
    batched = [one for one in exact if one["batched"] is not None]
    under = sum(one["ratio"] < one["batched"] for one in batched)
    times = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (ratios[0], ratios[-1])))
    notes = ["lower bounds included"] if len(exact) < len(known) else []
    if few := len(rows) - len(known):
        notes.append(f"in {few} of {len(rows)} rows fewer than were tried")
    said = f" ({'; '.join(notes)})" if notes else ""
    return (
        f"At R = {rtt_ms:g} ms {times} times as many clients get a rate as with co-located drafts{said}. Rows in which "
        f"that is below {IDENTITY}: {below} of {len(exact)}; below the {BATCHED}: {under} of {len(batched)} (without "
        "bounds)."
    )


def _reason(data: dict[str, Any], load: str) -> str:
    """What makes the rates differ at the most clients, the highest γ and the longest round trip."""
    gamma, rtt_ms = max(data["gammas"]), max(data["rtt_ms"])
    found = [one for one in data["factors"] if (one["load"], one["gamma"], one["rtt_ms"]) == (load, gamma, rtt_ms)]
    if not found:
        return ""
    most = max(found, key=lambda one: one["clients"])
    return (
        f"With {most['clients']} clients, γ = {gamma}, R = {rtt_ms:g} ms each gets {most['rate']:.2f} times the rate: "
        f"a step verifies {most['drafted']:.1f} drafts per client, brings {most['tokens']:.2f} times the tokens and "
        f"takes {1.0 / most['time']:.2f} of the time."
    )


def dtype(results: Results) -> str:
    """How many greedy texts part from plain vLLM's, ours beside those of vLLM's own speculation."""
    if not results.has("dtype.json"):
        return not_yet("bench-dtype", "dtype.json")
    data = results["dtype"]
    loads = list(dict.fromkeys((row["dtype"], row["at_a_time"]) for row in data["rows"]))
    lines = []
    for kind, at_a_time in loads:
        ours = _texts(data, kind, REMOTE, at_a_time)
        shares = [_texts(data, kind, arm, at_a_time).get("share") for arm in (PLAIN, CO_LOCATED, REMOTE)]
        lines.append([kind, str(at_a_time), *map(_share, (*shares, ours.get("share_without_ties")))])
    titles = (
        "dtype",
        "requests at a time",
        "plain vLLM again (95 %)",
        "vLLM's co-located draft model (95 %)",
        "remote (95 %)",
        "remote, elsewhere than at ties (95 %)",
    )
    said = []
    for kind in dict.fromkeys(kind for kind, _ in loads):
        verdicts = [
            (_often(_texts(data, kind, REMOTE, count), _texts(data, kind, CO_LOCATED, count)), count)
            for name, count in loads
            if name == kind
        ]
        said.append(
            f"In {kind} texts of remote drafting part from plain vLLM's, beside those of vLLM's co-located draft "
            f"model, {by_place(verdicts, *TOGETHER)}."
        )
    said += [
        f"Of plain vLLM's own texts {_share(row['share'])} differ between {row['dtype']} and float32."
        for row in data["rows"]
        if row["arm"] == OTHER_DTYPE
    ]
    told = "\n".join(f"- {sentence}" for sentence in said)
    return (
        f"{table(titles, lines, 2)}\n\n{told}\n\nShare of {data['prompts']} greedy texts of up to {data['max_tokens']} "
        "tokens that differ from those of plain vLLM at the same dtype, one request at a time; a tie: the two tokens' "
        f"log-probabilities differ by at most {data['tie_nats']:g} nats. Nothing paced, no WAN, our lookup in the "
        f"remote arm, γ = {data['gamma']}; {data['machine']}. Source: {results.source('dtype')}."
    ) + results.whole("dtype.md")


def _texts(data: dict[str, Any], kind: str, arm: str, at_a_time: int) -> Row:
    wanted = {"dtype": kind, "arm": arm, "at_a_time": at_a_time}
    return next((row for row in data["rows"] if wanted.items() <= row.items()), {})


def _share(found: list[float] | None) -> str:
    """A cell with a share and its interval."""
    if found is None:
        return NONE
    value, low, high = (percent(part, 1) for part in found)
    return f"{value} ({low.removesuffix(' %')}–{high})"


def _often(ours: Row, theirs: Row) -> str:
    """How often the one's texts part, beside the other's."""
    mine, other = ours.get("share"), theirs.get("share")
    if mine is None or other is None:
        return "not measured"
    if mine[1] > other[2]:
        return "more often"
    return "less often" if mine[2] < other[1] else "indistinguishably often"
