"""Estimates: the smoothed one, the fading line, and what verification steps cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_wanspec.core.learned.estimates import Line, Smoothed, StepTimes


def test_it_starts_at_its_first_sample() -> None:
    estimate = Smoothed()
    assert estimate.get(7.0) == 7.0
    estimate.add(3.0)
    assert estimate.get(7.0) == 3.0


def test_weight_of_a_sample() -> None:
    estimate = Smoothed(0.25)
    for sample in (4.0, 8.0):
        estimate.add(sample)
    assert estimate.get(0.0) == 5.0


def test_zero_is_a_sample() -> None:
    estimate = Smoothed()
    estimate.add(0.0)
    assert estimate.get(7.0) == 0.0


@given(st.lists(st.floats(0.0, 10.0), min_size=1), st.floats(0.01, 1.0))
def test_it_stays_within_its_samples(samples: list[float], weight: float) -> None:
    estimate = Smoothed(weight)
    for sample in samples:
        estimate.add(sample)
    assert min(samples) - 1e-9 <= estimate.get(-1.0) <= max(samples) + 1e-9


def test_it_follows_a_change() -> None:
    estimate = Smoothed()
    for sample in [1.0] * 50 + [2.0] * 50:
        estimate.add(sample)
    assert estimate.get(0.0) == pytest.approx(2.0, abs=0.01)


# A line through samples that fade


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=50, unique=True),
    st.floats(0.0, 0.1),
    st.floats(0.0, 0.01),
)
def test_a_line_is_found_again(tokens: list[int], start_s: float, per_token_s: float) -> None:
    line = Line()
    for count in tokens:
        line.add(count, start_s + per_token_s * count)
    assert line.slope == pytest.approx(per_token_s, abs=1e-6) or max(tokens) - min(tokens) < 2
    assert line.at(20.0) == pytest.approx(start_s + 20.0 * per_token_s, abs=1e-4) or max(tokens) - min(tokens) < 2


def test_a_line_without_samples() -> None:
    assert (Line().samples, Line().slope, Line().at(5.0)) == (0.0, 0.0, 0.0)


def test_samples_of_one_size_tell_no_slope() -> None:
    line = Line()
    for seconds in (0.1, 0.2, 0.3):
        line.add(4, seconds)
    assert line.slope == 0.0
    assert line.at(4) == line.at(40) == pytest.approx(0.2, abs=0.005)


def test_a_slope_is_never_negative() -> None:
    line = Line()
    for tokens, seconds in ((1, 0.3), (5, 0.2), (9, 0.1)):
        line.add(tokens, seconds)
    assert line.slope == 0.0
    assert line.at(9) == line.at(1) > 0.0


def test_old_samples_fade() -> None:
    line, keeps = Line(0.9), Line(1.0)
    for each in (line, keeps):
        for index in range(100):
            each.add(1 + index % 5, 0.1 + 0.05 * (index % 5))
        for index in range(100):
            each.add(1 + index % 5, 0.1 + 0.01 * (index % 5))
    assert line.slope == pytest.approx(0.01, rel=0.01)
    assert keeps.slope == pytest.approx(0.03, rel=0.01)
    assert line.samples == pytest.approx(10.0, rel=0.01)
    assert keeps.samples == 200.0


# What steps cost


def times(*, plain_s: float = 0.0, drafted_s: float = 0.0, full_s: float = 0.0, token_s: float = 0.001) -> StepTimes:
    """Steps of one request, some of each kind that has a time."""
    result = StepTimes()
    for index in range(8):
        drafts = 1 + index % 4
        if plain_s:
            result.add(1, drafts=0, full=False, seconds=plain_s)
        if drafted_s:
            result.add(1 + drafts, drafts=drafts, full=False, seconds=drafted_s + token_s * (1 + drafts))
        if full_s:
            result.add(5, drafts=4, full=True, seconds=full_s)
    return result


def test_steps_of_each_kind_are_kept_apart() -> None:
    all_kinds = times(plain_s=0.02, drafted_s=0.03, full_s=0.024)
    assert all_kinds.plain.at(1) == pytest.approx(0.02)
    assert all_kinds.drafted.at(5) == pytest.approx(0.035)
    assert all_kinds.full.at(5) == pytest.approx(0.024)
    assert all_kinds.overhead(1, 5, full=False) == pytest.approx(0.035 / 0.02 - 1.0)
    assert all_kinds.overhead(1, 5, full=True) == pytest.approx(0.024 / 0.02 - 1.0)
    assert all_kinds.token_s == pytest.approx(0.001)


def test_full_steps_cost_as_others_while_none_was_seen() -> None:
    some = times(plain_s=0.02, drafted_s=0.03)
    assert some.overhead(1, 5, full=True) == some.overhead(1, 5, full=False) > 0.0


@pytest.mark.parametrize("known", [{}, {"plain_s": 0.02}, {"drafted_s": 0.03}, {"full_s": 0.03}])
def test_nothing_costs_more_while_it_is_unknown(known: dict[str, float]) -> None:
    assert times(**known).overhead(1, 5, full=False) == 0.0
    assert times(**known).overhead(1, 5, full=True) == 0.0


def test_a_few_samples_are_not_enough() -> None:
    few = StepTimes()
    for index in range(3):
        few.add(1, drafts=0, full=False, seconds=0.02)
        few.add(2 + index, drafts=1 + index, full=False, seconds=0.03 + 0.01 * index)
    assert few.overhead(1, 3, full=False) == 0.0
    assert few.token_s == 0.0


def test_the_cost_of_a_token_comes_from_full_steps_where_there_are_no_others() -> None:
    batches = StepTimes()
    for rows in (1, 2, 3, 4, 1, 2, 3, 4):
        batches.add(5 * rows, drafts=4 * rows, full=True, seconds=0.02 + 0.0005 * 5 * rows)
    assert batches.token_s == pytest.approx(0.0005)
