"""What people are told of the capacity bench: rates, capacities, theory beside them, and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.cells import AHEAD, UNKNOWN, number
from vllm_wanspec.lab.report.document import Column, Document, Table, table_of
from vllm_wanspec.lab.report.plotting import draw_panels
from vllm_wanspec.lab.stats import divided
from vllm_wanspec.lab.target.capacity_figures import Against, CapacityResult, Row, title
from vllm_wanspec.lab.target.capacity_plan import ADAPTIVE, Arm, CapacityOptions, Load
from vllm_wanspec.lab.target.kinds import COLOCATED, PLAIN, REMOTE

COLOURS = {PLAIN: "0.35", COLOCATED: "C1", REMOTE: "C0", ADAPTIVE: "C9"}
DASHES = ("-", "--", ":", "-.")


def capacity_document(result: CapacityResult, provenance: Provenance) -> Document:
    """What a run found, for people."""
    options = result.options
    tables = [table for load in options.loads for table in (_rates(result, load), _capacities(result, load))]
    scale = "" if options.time_scale == 1.0 else f", times {options.time_scale:g} × as long"
    return Document(
        title="How many clients a target serves when it does not draft",
        tables=tables,
        warnings=list(_warnings(result)),
        remarks=[],
        method=_method(options),
        provenance=str(provenance),
        plots="Tokens per second and client against the number of clients",
        conditions=(
            f"Prompt lookup: none in any arm. Async scheduling: {AHEAD}. Paced, emulated WAN{scale}; the remote "
            "drafter has a core of its own and hardly slows down with clients, as if it had no bound."
        ),
    )


def _rates(result: CapacityResult, load: Load) -> Table:
    """Rates by number of clients, at co-located drafting's best γ there."""

    def row(clients: int, kind: str, rtt_ms: float | None = None) -> Row | None:
        gamma = result.best_gamma(load, clients)
        if kind == PLAIN:
            return result.row(load, Arm(PLAIN), None, clients)
        if kind == ADAPTIVE:
            return result.row(load, Arm(ADAPTIVE, max(result.options.gammas)), rtt_ms, clients)
        return None if gamma is None else result.row(load, Arm(kind, gamma), rtt_ms, clients)

    def rate(kind: str, rtt_ms: float | None = None) -> Column[int]:
        return title(Arm(kind), rtt_ms), lambda clients: _rate(row(clients, kind, rtt_ms))

    def ratio(rtt_ms: float) -> Column[int]:
        def text(clients: int) -> str:
            ours, theirs = row(clients, REMOTE, rtt_ms), row(clients, COLOCATED)
            return UNKNOWN if ours is None or theirs is None else number(divided(ours.rate, theirs.rate), 2)

        return "÷ co-located", text

    def identity(clients: int) -> str:
        gamma = result.best_gamma(load, clients)
        return UNKNOWN if gamma is None else f"{load.identity(clients, gamma):.2f}"

    columns: list[Column[int]] = [
        ("clients", str),
        rate(PLAIN),
        ("γ", lambda clients: str(result.best_gamma(load, clients) or UNKNOWN)),
        rate(COLOCATED),
        *(column for rtt_ms in result.options.rtt_ms for column in (rate(REMOTE, rtt_ms), ratio(rtt_ms))),
        ("1 + γ·t_d/t_v", identity),
        *(rate(ADAPTIVE, rtt_ms) for rtt_ms in result.options.rtt_ms),
    ]
    note = (
        "The median client's rate. γ is the number of draft tokens per step at which co-located drafting is fastest "
        "for so many clients; remote drafting verifies at most as many, and always as many as there are. `adaptive` "
        f"chooses how many to verify, up to {max(result.options.gammas)}, as users have it. No arm has prompt lookup."
    )
    return table_of(f"{load.name}: tokens per second and client", columns, load.clients, note=note)


def _rate(row: Row | None) -> str:
    return UNKNOWN if row is None else f"{row.rate:.2f}"


def _capacities(result: CapacityResult, load: Load) -> Table:
    """How many clients get a rate, at each γ."""
    items: list[Sequence[Against]] = []
    remarks = []
    for gamma in result.options.gammas:
        by_trip = [result.against(load, gamma, rtt_ms) for rtt_ms in result.options.rtt_ms]
        items += list(zip(*by_trip, strict=True))
        remarks += [text for rtt_ms in result.options.rtt_ms if (text := _reason(result, load, gamma, rtt_ms))]

    def remote(place: int, rtt_ms: float) -> list[Column[Sequence[Against]]]:
        return [
            (title(Arm(REMOTE), rtt_ms), lambda row: str(row[place].remote or UNKNOWN)),
            ("÷ co-located", lambda row: row[place].ratio_text),
        ]

    columns: list[Column[Sequence[Against]]] = [
        ("γ", lambda row: str(row[0].gamma)),
        ("tokens/s each", lambda row: f"{row[0].rate:.2f}"),
        (title(Arm(COLOCATED), None), lambda row: str(row[0].colocated)),
        *(column for place, rtt_ms in enumerate(result.options.rtt_ms) for column in remote(place, rtt_ms)),
        ("1 + γ·t_d/t_v", lambda row: f"{row[0].identity:.2f}"),
        ("batched", lambda row: number(row[0].batched, 2)),
    ]
    table = table_of(f"{load.name}: clients that get a rate", columns, items, keys=2, note=_THEORY)
    return Table(table.title, table.titles, table.rows, table.keys, table.note, remarks, level=3)


_THEORY = (
    "The rates are those that co-located drafting gives each of the numbers of clients that were tried; between them "
    "the time per token is interpolated; ≥: the rate was still reached at the largest number. `1 + γ·t_d/t_v`: what a "
    "step with co-located drafts takes ÷ what it takes without drafting, at the paces and at that number of clients: "
    "the ratio of capacities where a step's time is proportional to its clients. `batched`: the ratio that the paces "
    "give with their constant parts, (T − t0)/(c·(γ+1)) ÷ (T − t0 − γ·d0)/(c·(γ+1) + d1·(2γ+1)), where a step may take "
    "T, co-located drafting's tokens per step ÷ the rate; target t0 + c per token, draft d0 + d1 per token, of which "
    "vLLM's draft model computes 2γ + 1 per client and round."
)


def _reason(result: CapacityResult, load: Load, gamma: int, rtt_ms: float) -> str:
    """What makes remote drafting's rate another than co-located drafting's, in a sentence; nothing if unknown.

    Said of the largest number of clients, where the target is nearest to saturation.
    """
    every = result.factors(load, gamma, rtt_ms)
    if not every:
        return ""
    found = every[-1]
    return (
        f"γ = {gamma}, R = {rtt_ms:g} ms: of {found.clients} clients each gets {found.rate:.2f} × co-located "
        f"drafting's rate: a step verifies {found.drafted:.1f} drafts per client, brings {found.tokens:.2f} × the "
        f"tokens and takes 1/{found.time:.2f} of the time, where the paces give 1/{found.paces:.2f} for so many drafts "
        f"and 1/{found.identity:.2f} (1 + γ·t_d/t_v) for all {gamma}."
    )


def _warnings(result: CapacityResult) -> Iterator[str]:
    for name, share in result.overruns.items():
        yield f"INVALID: {name}: {share:.1%} of all forwards took longer than their pace."
    for row in result.rows:
        where = f"{row.load}, {title(row.arm, row.rtt_ms)}, γ = {row.arm.gamma}, {row.clients} clients"
        for name, share in row.overruns.items():
            yield f"INVALID: {where}: {share:.1%} of the forwards of {name} took longer than their pace; left out."
        if row.trip_is_off:
            measured, emulated = row.measured_rtt_ms, row.emulated_rtt_ms
            yield f"INVALID: {where}: the link measured {measured:.1f} ms of {emulated:.1f} ms; left out."
        if not row.window_s > 0.0:
            yield f"INVALID: {where}: at no time were all clients served; left out."
    for texts, label in ((_lines(result, "wrong"), "Different output"), (_lines(result, "ties"), "Floating-point tie")):
        yield from (f"{label}: {line}" for line in texts)


def _lines(result: CapacityResult, name: str) -> list[str]:
    return list(dict.fromkeys(line for row in result.rows for line in getattr(row, name)))


def _method(options: CapacityOptions) -> list[str]:
    paces = "; ".join(f"{load.name}: target {load.target}, co-located draft {load.draft}" for load in options.loads)
    scale = f", all × {options.time_scale:g}" if options.time_scale != 1.0 else ""
    return [
        f"Clients in closed loops, each one greedy request of {options.max_tokens} tokens after the other, the same "
        f"{options.prompts} prompts equally often whatever the number of clients; all but a prompt's last token comes "
        "from the prefix cache. A client's rate is its tokens per second while all clients are served, with the time "
        "between its requests.",
        f"Paces: {paces}; remote draft {options.remote_draft_pace}, of a drafter on a core of its own that serves all "
        f"clients{scale}. Remote drafting has no prompt lookup and a fixed number of drafts per step, never shut off.",
        "Plain vLLM and co-located drafting run as shipped (the CPU build has no async scheduling).",
        "vLLM serves all clients in every step: one whose drafts were just refused takes part without any, unless the "
        "drafter had drafted that case ahead. The paper's server has others to serve until new drafts are there, so "
        "its clients always verify γ.",
        f"A row with more than one and {MAX_OVERRUN_SHARE:.0%} overruns of a pace, or with an output that differs from "
        "plain vLLM's other than at a floating-point tie, is left out.",
    ]


def draw_capacity(result: CapacityResult, path: Path) -> bool:
    """Draw one panel per load; whether there is a picture.

    Raises:
        WanspecError: The file cannot be written.
    """
    options = result.options

    def draw(*panels: Any) -> None:
        for axes, load in zip(panels, options.loads, strict=True):
            _draw_load(axes, result, load)

    count = len(options.loads)
    return draw_panels(path, draw, size=(6.5 * count, 4.8), widths=(1.0,) * count)


def _draw_load(axes: Any, result: CapacityResult, load: Load) -> None:
    lines: list[tuple[Arm, float | None]] = [(arm, None) for arm in result.options.arms if not arm.is_remote]
    lines += [(arm, rtt_ms) for arm in result.options.arms if arm.is_remote for rtt_ms in result.options.rtt_ms]
    for kind, alike in groupby(lines, key=lambda line: line[0].kind):
        for place, (arm, rtt_ms) in enumerate(alike):
            if curve := result.curve(load, arm, rtt_ms):
                label = title(arm, rtt_ms) + (f", γ = {arm.gamma}" if arm.gamma else "")
                style = {"color": COLOURS[kind], "linestyle": DASHES[place % len(DASHES)], "marker": "o"}
                axes.plot(*zip(*curve, strict=True), label=label, markersize=4, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xticks(load.clients, labels=[str(clients) for clients in load.clients])
    axes.set_xlabel("clients")
    axes.set_ylabel("tokens per second and client")
    axes.set_title(f"{load.name}: target {load.target}, co-located draft {load.draft}", fontsize=9)
    axes.grid(True, alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)
