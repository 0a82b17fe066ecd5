"""Counters: their increase, and positions by entropy range."""

from __future__ import annotations

import pytest

from vllm_wanspec.lab.harness.counters import Counters


def samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    """Samples from lines of name, value and labels."""
    found = []
    for line in text.split(";"):
        name, value, *labels = line.split()
        found.append((f"wanspec_{name}_total", dict(label.split("=") for label in labels), float(value)))
    return found


def test_increases_of_counters_and_positions() -> None:
    names = ("steps", "hits", "misses", "waits")
    before = Counters.of(samples("steps 5; hits 3; other 9; waits 8; positions 2 entropy=0-1 outcome=agreed"), names)
    after = Counters.of(
        samples(
            "steps 9; hits 3; waits 1; positions 6 entropy=0-1 outcome=agreed;"
            "positions 1 entropy=1-inf outcome=leaf; positions 4 entropy=0.5-1"
        ),
        names,
    )
    gained = after.since(before)
    assert gained.values == {"steps": 4.0, "hits": 0.0}  # waits fell: the server was started again
    assert gained.get("misses") is None
    assert gained.positions == {("0-1", "agreed"): 4.0, ("1-inf", "leaf"): 1.0}
    assert gained.as_json()["positions"]["1-inf"] == {"agreed": 0.0, "branch": 0.0, "leaf": 1.0, "outside": 0.0}


def test_a_counter_that_appears_later_began_at_zero() -> None:
    assert Counters({"hits": 3.0}).since(Counters()).values == {"hits": 3.0}
    total = Counters.total([Counters({"hits": 3.0}), Counters({"steps": 1.0}), Counters({"hits": 1.0})])
    assert total.values == {"hits": 4.0, "steps": 1.0}


def test_counters_are_summed_over_labels() -> None:
    assert Counters.of(samples("hits 1 link=a; hits 2 link=b"), ["hits"]).values == {"hits": 3.0}


def test_entropy_ranges_are_in_the_order_of_numbers() -> None:
    names = ["10-inf", "0.5-2", "odd", "2-10", "empty"]
    counters = Counters(positions={(name, "leaf"): float(name != "empty") for name in names})
    assert counters.ranges() == ["0.5-2", "2-10", "10-inf", "odd"]


def test_shares_of_positions_and_of_misses() -> None:
    counts = {("0-1", "agreed"): 30, ("1-inf", "agreed"): 10, ("1-inf", "branch"): 3, ("1-inf", "leaf"): 5}
    counters = Counters(positions={key: float(count) for key, count in counts.items()})
    assert counters.share("1-inf", "agreed") == pytest.approx(10 / 18)
    assert counters.share_of_misses("1-inf", "branch") == counters.share_of_misses(None, "branch") == 3 / 8
    assert counters.share_of_misses("0-1", "branch") is None
    assert counters.share("9-inf", "agreed") is None
