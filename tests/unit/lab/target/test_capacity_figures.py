"""The capacity bench's figures: loads in theory, capacities between what was measured, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.pacing_counts import Paced
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.markdown import markdown
from vllm_wanspec.lab.target.capacity_figures import Against, Capacity, CapacityResult, Row, capacity
from vllm_wanspec.lab.target.capacity_plan import ADAPTIVE, Arm, CapacityOptions, Load
from vllm_wanspec.lab.target.capacity_report import capacity_document, draw_capacity
from vllm_wanspec.lab.target.kinds import COLOCATED, PLAIN, REMOTE

HERE = Provenance("a machine", {"python": "3.11"}, "abc", "python -m capacity", 99.0)
LOAD = Load("heavy", Pacing(10.0, 2.0), Pacing(4.0, 1.0), (1, 2, 4))
OPTIONS = CapacityOptions(loads=(LOAD,), gammas=(2,), rtt_ms=(0.0, 30.0), time_scale=2.0)


def row(
    kind: str, clients: int, rate: float, rtt_ms: float | None = None, drafted: float = 2.0, **fields: object
) -> Row:
    """With two tokens per step, or with fields of its own."""
    arm = Arm(kind, 0 if kind == PLAIN else 2)
    made = Row("heavy", arm, rtt_ms, clients, (rate,) * clients, 5.0, tokens=20, steps=10, drafted=10 * drafted)
    return replace(made, **fields)  # type: ignore[arg-type]


def result(*rows: Row) -> CapacityResult:
    return CapacityResult(OPTIONS, rows)


def test_what_a_round_takes_in_theory() -> None:
    # γ = 2: three rows per client are verified; the draft model computes four and one.
    assert LOAD.verifying_ms(3, 2) == 10.0 + 2.0 * 9
    assert LOAD.drafting_ms(3, 2) == 2 * 4.0 + 1.0 * 3 * 5
    assert LOAD.identity(3, 2) == pytest.approx(1.0 + 23.0 / 28.0)
    assert LOAD.drafting_ms(3, 0) == 0.0
    assert LOAD.identity(3, 0) == 1.0
    assert LOAD.scaled(1.5).verifying_ms(3, 2) == pytest.approx(42.0)


def test_the_ratio_of_capacities_in_theory() -> None:
    # A step of 62 ms: alone 10 + 6·n, so 52/6 clients; with drafts 18 + 11·n, so 4.
    assert LOAD.capacity_ratio(62.0, 2) == pytest.approx(52.0 / 6.0 / 4.0)
    assert LOAD.capacity_ratio(18.0, 2) is None
    # Without constant parts it is 1 + γ·t_d/t_v whatever the step.
    bare = Load("bare", Pacing(0.0, 2.0), Pacing(0.0, 1.0), (1,))
    assert bare.capacity_ratio(50.0, 2) == pytest.approx(11.0 / 6.0)
    assert bare.identity(1, 2) == bare.identity(9, 2) == pytest.approx(11.0 / 6.0)


CURVE = [(1, 50.0), (2, 40.0), (4, 20.0)]


@pytest.mark.parametrize(
    ("rate", "found"),
    [
        (60.0, None),
        (50.0, Capacity(1.0)),
        (45.0, Capacity(1.0 + (1 / 45 - 1 / 50) / (1 / 40 - 1 / 50))),
        # 25 ms per token at two clients, 50 ms at four: 40 ms are three fifths of the way.
        (25.0, Capacity(3.2)),
        (20.0, Capacity(4.0, at_least=True)),
        (5.0, Capacity(4.0, at_least=True)),
    ],
)
def test_clients_that_get_a_rate(rate: float, found: Capacity | None) -> None:
    got = capacity(CURVE, rate)
    assert got == (None if found is None else (pytest.approx(found.clients), found.at_least))


def test_of_a_curve_that_rises_again_the_largest_number_counts() -> None:
    assert capacity([(1, 30.0), (2, 20.0), (4, 30.0), (8, 15.0)], 30.0) == (4.0, False)
    assert capacity([(1, 30.0), (2, 0.0)], 10.0) == (1.0, False)
    assert capacity([], 1.0) is None
    assert str(Capacity(3.25)) == "3.2"
    assert str(Capacity(4.0, True)) == "≥ 4.0"


def test_a_row_that_lost_its_pace_or_its_text_is_left_out() -> None:
    good = row(COLOCATED, 1, 10.0, paced={"t": Paced(100, 1)})
    assert good.is_valid
    assert row(COLOCATED, 1, 10.0, paced={"t": Paced(50, 1)}).is_valid  # one alone says little
    late = row(COLOCATED, 1, 10.0, paced={"t": Paced(100, 2), "d": Paced(100, 0)})
    assert late.overruns == {"t": 0.02}
    assert not late.is_valid
    assert not row(COLOCATED, 1, 10.0, wrong=("x",)).is_valid
    assert not row(COLOCATED, 1, 10.0, window_s=0.0).is_valid
    assert row(COLOCATED, 1, 10.0, ties=("x",)).is_valid
    assert result(good).held
    assert not result(good, late).held
    # One of a hundred in each of two rows is as many as may be; one of 99 is more.
    assert result(good, good).held
    edge = row(COLOCATED, 1, 10.0, paced={"t": Paced(98, 1)})
    assert edge.is_valid
    assert not result(good, edge).held
    assert result(good, edge).overruns == {"heavy, t": 2 / 198}
    assert not result().held
    assert result(late).row(LOAD, late.arm, None, 1) is None
    assert result(late, good).row(LOAD, good.arm, None, 1) is good


def test_a_client_s_rate_is_the_median() -> None:
    found = row(PLAIN, 3, 1.0, rates=(9.0, 1.0, 4.0))
    assert found.rate == 4.0
    assert found.tokens_per_step == 2.0


def full() -> CapacityResult:
    """Rates whose capacities are easily worked out."""
    colocated = [row(COLOCATED, n, rate) for n, rate in ((1, 40.0), (2, 20.0), (4, 10.0))]
    near = [row(REMOTE, n, rate, 0.0) for n, rate in ((1, 80.0), (2, 40.0), (4, 20.0))]
    far = [row(REMOTE, n, rate, 30.0, drafted=1.0, tokens=15) for n, rate in ((1, 30.0), (2, 24.0), (4, 12.0))]
    late = row(ADAPTIVE, 4, 11.0, 0.0, paced={"drafter": Paced(100, 2)})
    tied = row(PLAIN, 1, 25.0, ties=("plain: os, token 4",))
    return result(tied, *colocated, *near, *far, late)


def test_capacities_are_compared_at_the_rates_of_co_located_drafting() -> None:
    first, second = full().against(LOAD, 2, 0.0)
    # Two tokens per step at 40 per second are 50 ms, 25 before the time scale: 15/6 clients against 7/11.
    theory = (LOAD.identity(1, 2), pytest.approx((15.0 / 6.0) / (7.0 / 11.0)))
    assert first == Against("heavy", 2, 0.0, 40.0, Capacity(1.0), Capacity(2.0), *theory)
    assert (second.rate, second.colocated, second.remote) == (20.0, Capacity(2.0), Capacity(4.0, at_least=True))
    assert (first.ratio, second.ratio) == (2.0, 2.0)
    assert (first.ratio_text, second.ratio_text) == ("2.00", "≥ 2.00")
    lost, other = full().against(LOAD, 2, 30.0)
    assert (lost.remote, lost.ratio, lost.ratio_text) == (None, None, "–")
    # From 1/24 s per token at two clients to 1/12 s at four: 1/20 s is a fifth of the way.
    assert other.remote == (pytest.approx(2.4), False)


def test_why_the_rates_differ() -> None:
    one, _, four = full().factors(LOAD, 2, 30.0)
    assert (one.clients, one.rate, one.tokens, one.time, one.drafted) == (1, 0.75, 0.75, 1.0, 1.0)
    # Four clients: co-located 34 + 28 ms; remote with one draft instead of two 10 + 2·4·2.
    assert (four.clients, four.rate, four.time) == (4, 1.2, pytest.approx(1.6))
    assert four.paces == pytest.approx(62.0 / 26.0)
    assert four.identity == pytest.approx(62.0 / 34.0)
    assert result(row(COLOCATED, 1, 5.0)).factors(LOAD, 2, 0.0) == []


def test_the_best_number_of_drafts() -> None:
    options = replace(OPTIONS, gammas=(2, 3))
    three = replace(row(COLOCATED, 1, 41.0), arm=Arm(COLOCATED, 3))
    found = CapacityResult(options, [row(COLOCATED, 1, 40.0), three, row(COLOCATED, 2, 20.0)])
    assert [found.best_gamma(LOAD, clients) for clients in (1, 2, 4)] == [3, 2, None]


def test_the_report(tmp_path: Path) -> None:
    page = markdown(capacity_document(full(), HERE))
    assert "| 1 | 25.00 | 2 | 40.00 | 80.00 | 2.00 | 30.00 | 0.75 | 1.81 | – | – |" in page
    assert "| 4 | – | 2 | 10.00 | 20.00 | 2.00 | 12.00 | 1.20 | 1.82 | – | – |" in page  # `adaptive` lost its pace
    assert "| 2 | 40.00 | 1.0 | 2.0 | 2.00 | – | – | 1.81 | 3.93 |" in page
    assert "| 2 | 20.00 | 2.0 | ≥ 4.0 | ≥ 2.00 | 2.4 | 1.20 | 1.82 |" in page
    assert (
        "γ = 2, R = 30 ms: of 4 clients each gets 1.20 × co-located drafting's rate: a step verifies 1.0 drafts per "
        "client, brings 0.75 × the tokens and takes 1/1.60 of the time, where the paces give 1/2.38 for so many drafts "
        "and 1/1.82 (1 + γ·t_d/t_v) for all 2."
    ) in page
    assert "**INVALID: heavy, adaptive, R = 0 ms, γ = 2, 4 clients: 2.0% of the forwards of drafter took longer" in page
    assert "**INVALID: heavy, drafter: 2.0% of all forwards took longer than their pace.**" in page
    assert "**Floating-point tie: plain: os, token 4**" in page
    assert page.count("Prompt lookup: none in any arm.") == page.count("Paced, emulated WAN, times 2 × as long") == 2
    assert draw_capacity(full(), tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_a_run_of_which_nothing_is_left_is_reported_too(tmp_path: Path) -> None:
    late = {"t": Paced(10, 2)}
    found = result(
        *(row(kind, 1, 10.0, paced=late) for kind in (PLAIN, COLOCATED)), row(REMOTE, 1, 9.0, 0.0, paced=late)
    )
    page = markdown(capacity_document(found, HERE))
    assert "| 1 | – | – | – | – | – | – | – | – | – | – |" in page
    assert page.count("**INVALID: heavy, ") == 4  # three rows, and the server
    assert found.compared() == []
    assert json.loads(json.dumps(found.as_json()))["factors"] == []
    assert draw_capacity(found, tmp_path / "c.png")
    # Nothing but remote drafting's rows.
    assert result(row(REMOTE, 1, 9.0, 0.0)).compared() == []


def test_the_result_file() -> None:
    data = json.loads(json.dumps(full().as_json()))
    assert data["held"] is False
    assert data["loads"] == [
        {"name": "heavy", "target_pace": "10.0+2.0", "draft_pace": "4.0+1.0", "clients": [1, 2, 4]}
    ]
    assert data["capacities"][0] == {
        "load": "heavy",
        "gamma": 2,
        "rtt_ms": 0.0,
        "rate": 40,
        "colocated": {"clients": 1, "at_least": False},
        "remote": {"clients": 2, "at_least": False},
        "ratio": 2,
        "identity": 1.8125,
        "batched": 3.9286,
    }
    assert data["capacities"][2]["remote"] is None
    assert len(data["factors"]) == 6
    plain, last = data["rows"][0], data["rows"][-1]
    assert (plain["arm"], plain["gamma"], plain["rtt_ms"], plain["ties"]) == (PLAIN, None, None, ["plain: os, token 4"])
    assert (last["arm"], last["valid"], last["paced"]) == (ADAPTIVE, False, {"drafter": {"steps": 100, "overruns": 2}})
    assert (last["rate"], last["tokens_per_step"], last["drafted_per_step"]) == (11, 2, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"loads": (replace(LOAD, clients=(2, 1)),)},
        {"loads": (replace(LOAD, clients=(0, 1)),)},
        {"loads": (replace(LOAD, target=Pacing(5.0)),)},
        {"gammas": (0,)},
        {"rtt_ms": (-1.0,)},
        {"time_scale": 0.0},
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(OPTIONS, **wrong)  # type: ignore[arg-type]
