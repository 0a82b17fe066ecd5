"""What blocks say of small result files whose figures can be worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from pages.results import Results, pace, quotient, used
from pages.writers import writers


def row(arm: str, rtt_ms: float | None = None, tpot_ms: float = 40.0, **more: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "rtt_ms": rtt_ms,
        "concurrency": 1,
        "tpot_ms": tpot_ms,
        "gamma": None,
        "tokens_per_step": 1.5,
        "tokens": 100,
        "local_draft_passes": 0,
        **more,
    }


ROWS = [
    row("none", ratio_to_draft_model=2.0, ratio_ci=[1.9, 2.1], ratio_to_none=1.0, none_ci=[1.0, 1.0]),
    row("lookup", tpot_ms=30.0, ratio_to_draft_model_lookup=1.2, lookup_ci=[1.1, 1.3]),
    row("draft_model", tpot_ms=20.0, gamma=4, ratio_to_draft_model=1.0, ratio_ci=[1.0, 1.0], local_draft_passes=300),
    row("draft_model_lookup", tpot_ms=25.0, local_draft_passes=41),
    row("wanspec_no_lookup", 0.0, ratio_to_draft_model=0.75, ratio_ci=[0.7, 0.8], bytes_down_per_token=512.4),
    row("wanspec_no_lookup", 70.0, ratio_to_draft_model=0.98, ratio_ci=[0.95, 1.01]),
    row("wanspec_no_lookup", 100.0, ratio_to_draft_model=1.2, ratio_ci=[1.1, 1.3]),
    row(
        "wanspec",
        0.0,
        ratio_to_draft_model=0.5,
        ratio_ci=[0.4, 0.6],
        ratio_to_draft_model_lookup=0.8,
        lookup_ci=[0.79, 0.81],
        drafted=300,
        accepted_main_line=40,
        accepted_branch=10,
        accepted_lookup=25,
        p50_ms=1.0,
        p95_ms=90.04,
        p99_ms=100.0,
    ),
    row("wanspec_dead", ratio_to_none=1.01, none_ci=[1.0, 1.02]),
]
BENCH = {
    "rows": ROWS,
    "commit": "abcdef1",
    "machine": "A machine",
    "pacing": {"target": "35.0+0.1", "draft": "5.0+0.02"},
    "time_scale": 1.5,
    "options": {"count": 72, "repeats": 1, "max_tokens": 128},
    "versions": {"vllm": "0.32.0+cpu"},
}


def block(folder: Path, name: str, file: str, data: dict[str, Any]) -> str:
    (folder / f"{file}.json").write_text(json.dumps(data), encoding="utf-8")
    return writers(Results(folder))[name]()


def bench(folder: Path, name: str, **changes: Any) -> str:
    return block(folder, name, "bench", BENCH | changes)


def line(text: str, start: str) -> list[str]:
    """The cells of the only line that starts so."""
    [found] = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_each_half_of_readme_s_table_is_divided_by_a_co_located_model_with_the_same_helpers(tmp_path: Path) -> None:
    text = bench(tmp_path, "five rows")
    assert len([row for row in text.splitlines() if row.startswith("|")]) == 2 + 5
    assert line(text, "**remote, R = 0 ms**")[1:] == [
        "40.00",
        "0.750 (0.700–0.800)",
        "40.00",
        "0.800 (0.790–0.810)",
        "0.00",
    ]
    assert line(text, "plain vLLM")[1:] == ["40.00", "2.000 (1.900–2.100)", "30.00", "1.200 (1.100–1.300)", "0.00"]
    assert line(text, "co-located draft model")[-1] == "1.71"  # 341 of 200 tokens
    assert "72 prompts once" in text
    assert "best γ, 4" in text
    assert "R = 30 ms took 45 ms" in text
    assert text.endswith("Source: [bench.json](results:bench.json), commit abcdef1.")


def test_what_was_not_measured_is_said_so(tmp_path: Path) -> None:
    text = bench(tmp_path, "five rows")
    assert line(text, "**remote, R = 30 ms**")[1:] == ["not measured"] * 5
    assert line(text, "**remote, R = 70 ms**")[3:5] == ["not measured"] * 2


def test_a_run_that_does_not_count_says_so_first(tmp_path: Path) -> None:
    for changes, why in (
        ({"valid": False}, "**This run is incomplete or invalid.**"),
        ({"valid": False, "faults": ["R is off", "slow"]}, "**This run counts as invalid: R is off; slow.**"),
        ({"complete": False}, "**This run counts as invalid: it did not come to its end.**"),
        ({"differences": ["wanspec: token 3"]}, "**This run counts as invalid: there are wrong outputs.**"),
    ):
        assert why in bench(tmp_path, "bench main", **changes)
        for name in ("bench main", "bench streams", "bench kinds", "crossover", "useless drafter", "sizing"):
            assert "commit abcdef1, **incomplete or invalid**" in bench(tmp_path, name, **changes)
    assert "invalid" not in bench(tmp_path, "bench main", valid=True, complete=True)


def test_a_row_whose_forwards_were_too_slow_is_named(tmp_path: Path) -> None:
    slow = [row("draft_model", local_draft_overruns=0.011), row("wanspec", 30.0, concurrency=8, drafter_overruns=0.02)]
    kept = [row("none", target_overruns=0.01), row("lookup", drafter_overruns=None)]
    text = bench(tmp_path, "five rows", rows=[*slow, *kept])
    assert "too slow: `draft_model`, 1 at a time, `wanspec` at R = 30 ms, 8 at a time.**" in text
    assert "too slow" not in bench(tmp_path, "five rows", rows=kept)


@pytest.mark.parametrize(("version", "said"), [("0.32.0+cpu", True), ("0.32.0", False)])
def test_async_scheduling_is_absent_from_the_cpu_build_alone(tmp_path: Path, version: str, said: bool) -> None:
    text = bench(tmp_path, "five rows", versions={"vllm": version}, time_scale=1)
    assert ("async scheduling" in text) is said
    assert "× 1" not in text


def test_at_which_round_trips_all_of_the_interval_is_below_the_co_located_model(tmp_path: Path) -> None:
    text = bench(tmp_path, "crossover")
    assert (
        "without lookup on either side at R = 0 ms, not at 70 and 100 ms; with our lookup on both sides at R = 0 ms."
        in text
    )
    assert "R = 100 ms is 2.85 target steps" in text
    far = [row for row in ROWS if row["rtt_ms"] in (None, 70.0)]
    assert "on either side at no R that was measured (70 ms); with our lookup on both sides this has not been" in bench(
        tmp_path, "crossover", rows=far
    )


def test_a_useless_drafter_is_told_of_only_where_lookup_does_not_hide_it(tmp_path: Path) -> None:
    assert "drafter dead 1.010 (1.000–1.020), drafter sending random tokens not measured" in bench(
        tmp_path, "useless drafter"
    )
    mixed = [row for row in ROWS if row["arm"] != "wanspec_no_lookup"]
    assert "1.010" not in bench(tmp_path, "useless drafter", rows=mixed)


def test_tokens_of_prompt_lookup_are_not_the_drafter_s(tmp_path: Path) -> None:
    [found] = [line for line in bench(tmp_path, "sizing").splitlines() if line.startswith("| ours |")]
    assert found == "| ours | 0 | not measured | not measured | 6.0 |"  # 300 ÷ (40 + 10)
    assert "| no | 0 | not measured | 512 | not measured |" in bench(tmp_path, "sizing")


def test_the_main_table_has_every_arm(tmp_path: Path) -> None:
    text = bench(tmp_path, "bench main")
    assert "| **remote** | ours | 0 | 40.00 |" in text
    assert "| vLLM's prompt lookup | vLLM's |  | not measured |" in text
    assert "| co-located draft model | no |  | 20.00 | 1.000 (1.000–1.000) |" in text


def test_where_tokens_came_from(tmp_path: Path) -> None:
    text = bench(tmp_path, "bench sources")
    assert "| **remote** | ours | 0 | 1.50 | 40, 10, 25 | 1.0, 90.0, 100.0 | 0.00 |" in text
    assert "| plain vLLM | no |  | 1.50 | –, –, – | not measured | 0.00 |" in text


def test_kinds_of_prompts(tmp_path: Path) -> None:
    def kind(arm: str, tpot_ms: float, **ratios: list[float]) -> dict[str, Any]:
        return {"arm": arm, "rtt_ms": 30.0, "kind": "prose", "prompts": 16, "tpot_ms": tpot_ms, **ratios}

    found = [
        kind("none", 47.0),
        kind("wanspec_no_lookup", 25.454, ratio_to_draft_model=[1.1, 1.0, 1.2]),
        kind("wanspec", 22.0, ratio_to_draft_model_lookup=[1.2, 1.1, 1.3]),
    ]
    lines = [line for line in bench(tmp_path, "bench kinds", kinds=found).splitlines() if line.startswith("| prose")]
    assert lines == ["| prose | 16 | 30 | 25.45 | 1.100 (1.000–1.200) | 22.00 | 1.200 (1.100–1.300) |"]
    assert bench(tmp_path, "bench kinds").startswith("Kinds of prompts have not been told apart")


def test_where_the_time_of_a_token_goes(tmp_path: Path) -> None:
    timed = {"tokens": 300, "requests": 20, "tokens_per_step": 3.0, "acceptance": 0.5}
    rows = [
        row("draft_model", tpot_ms=30.0, local_draft_passes=360, accepted_main_line=150, **timed),
        row("oracle", tpot_ms=20.0, **timed | {"acceptance": 0.4}),
        row("none", tpot_ms=60.01, tokens=300, requests=20, tokens_per_step=1.0),
    ]
    text = bench(tmp_path, "attribution", rows=rows)
    # Pace × 1.5: 52.5 + 0.15 · (1 + 300/100) and 360 passes in 120 rounds, 3 · (7.5 + 0.03).
    assert "| co-located draft model | no |  | 30.00 | 3.00 | 90.0 | 53.1 | 22.6 | 14.3 |" in text
    # Nobody counted: 300 - 100 tokens were drafts, of 500 that were verified.
    assert "| the target's own text as drafts | no |  | 20.00 | 3.00 | 60.0 | 53.4 | 0.0 | 6.6 |" in text
    assert "| plain vLLM | no |  | 60.01 | 1.00 | 60.0 | 52.6 | 0.0 | 7.4 |" in text


def test_streams_and_ideal(tmp_path: Path) -> None:
    eight = row("wanspec", 30.0, concurrency=8, throughput_tok_s=193.64, ttft_ms=176.8)
    text = bench(tmp_path, "bench streams", rows=[*ROWS, eight])
    assert [line for line in text.splitlines() if line.startswith("| **remote**")] == [
        "| **remote** | ours | 30 | 8 | 193.6 | 40.00 | not measured | not measured | 176.8 |"
    ]
    near = row("wanspec", 0.0, ideal_tpot_ms=20.0, ratio_to_ideal=2.0, ideal_ci=[1.5, 2.5])
    text = bench(tmp_path, "bench ideal", rows=[near])
    assert "| ours | 0 | 40.00 | 20.00 | 2.000 (1.500–2.500) |" in text


def arm(name: str, **spans: list[int]) -> dict[str, Any]:
    kinds = ("agreed", "branch", "leaf", "outside")
    return {
        "name": name,
        "time_per_token_ms": 20.0,
        "ratio_to_baseline": [0.8, 0.7, 0.9],
        "tokens_per_step": 2.0,
        "bytes_per_accepted_token": 1496.4,
        "mean_running_branches": 7.6,
        "counters": {
            "committed_tokens": 30,
            "steps": 20,
            "drafted_tokens": 245,
            "branch_hits": 3,
            "misses": 4,
            "positions": {
                "0-0.25": dict.fromkeys(kinds, 0),
                **{span: dict(zip(kinds, counts, strict=True)) for span, counts in spans.items()},
            },
        },
    }


def test_trees(tmp_path: Path) -> None:
    few = {"0.25-0.5": [90, 0, 0, 0], "0.5-1": [2, 5, 2, 1], "1-1.5": [1, 6, 0, 4]}
    data = {
        "arms": [arm("main-line", **few), arm("theta-1", **few), arm("theta-0", **few), arm("default", **few)],
        "rtt_ms": 30.0,
        "prompts": {"measured": 36},
        "commit": "f3f045a-dirty",
    }
    assert "at 8 of 100 positions" in block(tmp_path, "below one nat", "trees", data)
    assert "they caught 62 % of these" in block(tmp_path, "below one nat", "trees", data)  # 5 of 8
    assert "| misses caught | 60 % |" in block(tmp_path, "trees caught", "trees", data)  # 6 of 6 + 0 + 4
    sizes = block(tmp_path, "sizing trees", "trees", data)
    assert "| **θ = 1 (default)** | 1,496 | 24.5 | 7.6 | 2.00 |" in sizes  # 245 ÷ (30 - 20)
    table = block(tmp_path, "trees", "trees", data)
    assert "| θ = 0 | 20.00 | 0.800 (0.700–0.900) | 2.00 | 245 | 3 | 4 | 1,496 |" in table
    assert table.endswith("commit f3f045a-dirty.")
    assert "1,496 bytes per accepted token" in block(tmp_path, "tree bytes", "trees", data)


def test_overhead_and_width(tmp_path: Path) -> None:
    cases = [("silent drafter", 1.0254, False), ("dead drafter", 0.9979, True)]
    data = {
        "rows": [
            {
                "part": "target",
                "case": case,
                "ours": 5.1,
                "base": 5.03,
                "ratio": ratio,
                "ratio_ci": [0.9, 1.1],
                "held": held,
            }
            for case, ratio, held in cases
        ],
        "bars": {"target": "≤ 1.05"},
        "rounds": 5,
        "commit": "1234567",
    }
    said = block(tmp_path, "overhead step", "overhead", data)
    assert "costs 2.5 % of a 5.0 ms step, a dead one −0.2 % ([overhead.json]" in said
    assert "| target, dead drafter: ms per token | 5.10 | 5.03 | 0.998 (0.900–1.100) | ≤ 1.05 | yes |" in block(
        tmp_path, "overhead", "overhead", data
    )
    one = {"width": 32, "step_ms": 10.43, "ratio": 1.47, "events_per_s": 3062.5}
    wide = {"steady": [{"pace": "5.0+0.02", "widths": [one]}], "machine": "A machine", "commit": "1234567"}
    assert "| paced | 32 | 10.43 | 1.47 | 3,062 |" in block(tmp_path, "width", "width", wide)


def test_small_things() -> None:
    assert pace("35.0+0.1") == "35 ms + 0.1 ms per token"
    assert quotient(3.0, 2.0) == 1.5
    assert quotient(3.0, 0.0) is quotient(None, 2.0) is None
    assert used({"accepted_main_line": 2, "accepted_branch": 1}) == 3
    assert used({"accepted_main_line": 2}) is None
