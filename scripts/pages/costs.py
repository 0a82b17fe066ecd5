"""Blocks on what trees buy and what drafting costs: ``trees.json``, ``overhead.json`` and ``width.json``."""

from __future__ import annotations

from pages.results import NOT_MEASURED, Results, not_yet, number, quotient, ratio, table

BELOW_ONE_NAT = ("0-0.25", "0.25-0.5", "0.5-1")


def sizing_trees(results: Results) -> str:
    """What width costs: main line alone beside the default tree."""
    data = results["trees"]
    lines = []
    for arm in data["arms"]:
        if arm["name"] in {"main-line", "theta-2", "theta-1"}:
            counters = arm["counters"]
            accepted = counters["committed_tokens"] - counters["steps"]
            lines.append(
                [
                    _tree_name(arm["name"]),
                    number(arm["bytes_per_accepted_token"]),
                    number(quotient(counters["drafted_tokens"], accepted), 1),
                    number(arm["mean_running_branches"], 1),
                    number(arm["tokens_per_step"], 2),
                ]
            )
    titles = ("", "bytes per accepted token", "drafted ÷ used tokens", "running branches", "tokens per step")
    return f"{table(titles, lines)}\n\n{_trees_conditions(results)}"


def tree_bytes(results: Results) -> str:
    """What a tree sends, in a sentence."""
    data = results["trees"]
    sent = {arm["name"]: number(arm["bytes_per_accepted_token"]) for arm in data["arms"]}
    return (
        f"trees took {sent['theta-1']} bytes per accepted token, the main line alone (`max_branches: 1`) "
        f"{sent['main-line']} (R = {data['rtt_ms']:g} ms, paced, emulated WAN, no lookup; {results.source('trees')})."
    )


# Trees


def _tree_name(name: str) -> str:
    kinds = {"main-line": "main line alone", "theta-1": "**θ = 1 (default)**"}
    return kinds.get(name) or name.replace("theta-inf", "θ = ∞").replace("theta-", "θ = ")


def _trees_conditions(results: Results) -> str:
    data = results["trees"]
    return (
        f"R = {data['rtt_ms']:g} ms, one stream, {data['prompts']['measured']} prompts, paced, emulated WAN, no prompt "
        f"lookup in any arm; intervals: 95 %, over prompts. Source: {results.source('trees')}."
    )


def trees(results: Results) -> str:
    """What branches buy, by the entropy from which on a position branches."""
    lines = []
    for arm in results["trees"]["arms"]:
        if arm["name"] in {"adaptive", "default"}:
            continue
        value, low, high = arm["ratio_to_baseline"]
        lines.append(
            [
                _tree_name(arm["name"]),
                number(arm["time_per_token_ms"], 2),
                f"{value:.3f} ({low:.3f}–{high:.3f})",
                number(arm["tokens_per_step"], 2),
                number(arm["counters"]["drafted_tokens"]),
                number(arm["counters"]["branch_hits"]),
                number(arm["counters"]["misses"]),
                number(arm["bytes_per_accepted_token"]),
            ]
        )
    titles = (
        "",
        "ms per token",
        "÷ main line alone (95 %)",
        "tokens per step",
        "nodes drafted",
        "branch hits",
        "misses",
        "bytes per accepted token",
    )
    return f"{table(titles, lines)}\n\n{_trees_conditions(results)}"


def trees_caught(results: Results) -> str:
    """Which share of misses a running branch caught, by entropy, at the default threshold."""
    [arm] = [arm for arm in results["trees"]["arms"] if arm["name"] == "theta-1"]
    positions = arm["counters"]["positions"]
    spans = [span for span in positions if span not in BELOW_ONE_NAT]
    shares = [_caught(positions, [span]) for span in spans]
    titles = ["nats", *[span.replace("-", "–") for span in spans]]
    line = [
        "misses caught",
        *[NOT_MEASURED if share is None else f"{share:.0%}".replace("%", " %") for share in shares],
    ]
    return f"{table(titles, [line])}\n\nθ = 1. {_trees_conditions(results)}"


def below_one_nat(results: Results) -> str:
    """What branches would catch below the default threshold, and how few misses there are."""
    [arm] = [arm for arm in results["trees"]["arms"] if arm["name"] == "theta-0"]
    positions = {span: arm["counters"]["positions"][span] for span in BELOW_ONE_NAT}
    missed = sum(_missed(span) for span in positions.values())
    total = missed + sum(span["agreed"] for span in positions.values())
    share = _caught(positions, list(positions))
    caught = NOT_MEASURED if share is None else f"{share:.0%}".replace("%", " %")
    return (
        f"Below 1 nat the target took another token than the draft model's best at {missed:.0f} of {total:.0f} "
        "positions; "
        f"where branches are allowed there (θ = 0), they caught {caught} of these ({results.source('trees')})."
    )


def _missed(span: dict[str, float]) -> float:
    return span["branch"] + span["leaf"] + span["outside"]


def _caught(positions: dict[str, dict[str, float]], spans: list[str]) -> float | None:
    return quotient(sum(positions[span]["branch"] for span in spans), sum(_missed(positions[span]) for span in spans))


# What it costs


def overhead_step(results: Results) -> str:
    """What a drafter of no use costs where steps are short, in a sentence."""
    rows = {row["case"]: row for row in results["overhead"]["rows"]}
    silent, dead = rows["silent drafter"], rows["dead drafter"]
    useless, unreachable = (f"{100 * (row['ratio'] - 1):.1f} %".replace("-", "−") for row in (silent, dead))
    return (
        f"a drafter that is connected and never drafts costs {useless} of a {silent['base']:.1f} ms step, a dead one "
        f"{unreachable} ({results.source('overhead')}, nothing paced, no lookup)."
    )


def overhead(results: Results) -> str:
    """What remote drafting costs target and drafter where nothing is paced."""
    data = results["overhead"]
    lines = [
        [
            f"target, {row['case']}: ms per token" if row["part"] == "target" else f"{row['case']}: tokens per second",
            number(row["ours"], 2 if row["part"] == "target" else 0),
            number(row["base"], 2 if row["part"] == "target" else 0),
            ratio(row, "ratio", "ratio_ci"),
            data["bars"][row["part"]],
            "yes" if row["held"] else "no",
        ]
        for row in data["rows"]
    ]
    titles = ("", "ours", "compared with", "ratio (95 %)", "asked for", "held by all of the interval")
    return (
        f"{table(titles, lines)}\n\nNothing paced, no lookup. Compared with: the same vLLM whose custom proposer "
        "returns "
        f"empty lists (target); a program that calls AsyncLLM itself (drafter). Medians of {data['rounds']} rounds. "
        "Source: "
        f"{results.source('overhead')}."
    )


def width(results: Results) -> str:
    """What running branches cost the drafter's step."""
    data = results["width"]
    lines: list[list[str]] = []
    for load in data["steady"]:
        how = "as fast as it is" if load["pace"] is None else "paced"
        lines += [
            [how, str(one["width"]), number(one["step_ms"], 2), number(one["ratio"], 2), number(one["events_per_s"])]
            for one in load["widths"]
        ]
    titles = ("drafter", "running branches", "ms per step", "÷ one branch", "tokens per second")
    return (
        f"{table(titles, lines)}\n\nOne session whose branches all run, API server and engine on one core of "
        f"{data['machine']}. Source: {results.source('width')}."
    )


def hotpath(results: Results) -> str:
    """What our calls of a step take on each model runner."""
    if not results.has("hotpath.json"):
        return not_yet("bench-hotpath", "hotpath.json")
    data = results["hotpath"]
    lines = [
        [
            runner,
            *(number(found[name][key], 2) for name in ("path_ms", "cpu_ms") for key in ("p50", "p99")),
            f"{found['nodes_per_s']:,}",
            number(found["loop_us"], 0),
            "yes" if found["held"] else "no",
        ]
        for runner, found in data["runners"].items()
    ]
    titles = (
        "model runner", "all our calls of a step, ms: p50", "p99", "processor time, ms: p50", "p99",
        "nodes/s arriving", "calibration loop, µs", "held",
    )  # fmt: skip
    bars = data["bars"]["path_ms"]
    return (
        f"{table(titles, lines)}\n\n{data['sessions']} requests, the drafter has room for {data['drafted']}. Asked "
        f"for: p50 {bars['p50']} ms, p99 {bars['p99']} ms. Source: {results.source('hotpath')}."
    )
