"""Statistics of measured times."""

import random

import pytest

from vllm_wanspec.lab.stats import (
    Interval,
    Timed,
    divided,
    is_more_often,
    median,
    median_interval,
    paired_ratio,
    percentile,
    rounded,
    sum_by_prompt,
    total,
    wilson,
)


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([5.0], 0.99) == 5.0
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile(list(range(1, 101)), 0.5) == 50


def test_times_are_added_up_by_prompt() -> None:
    times = {(0, 0): Timed(10.0, 2), (0, 1): Timed(20.0, 3), (1, 0): Timed(5.0, 0)}
    assert sum_by_prompt(times) == {0: Timed(30.0, 5), 1: Timed(5.0, 0)}
    assert total(times.values()) == Timed(35.0, 5)
    assert Timed(30.0, 5).per_token_ms == 6.0
    assert Timed(5.0, 0).per_token_ms is None


def test_a_median_has_the_interval_of_its_values() -> None:
    assert median_interval([3.0]) == Interval(3.0, 3.0, 3.0)
    found = median_interval([1.0, 2.0, 3.0, 4.0, 90.0])
    assert (found.value, found.low, found.high) == (3.0, 1.0, 90.0)
    assert found == median_interval([1.0, 2.0, 3.0, 4.0, 90.0])  # the draws are the same each time
    assert Interval(1.23456, 1.0, 2.0).as_json() == [1.2346, 1, 2]


def test_a_ratio_is_that_of_the_sums() -> None:
    pairs = [(Timed(20.0, 2), Timed(10.0, 2)), (Timed(400.0, 10), Timed(100.0, 10))]
    found = paired_ratio(pairs)
    assert found is not None
    assert found.value == pytest.approx(420.0 / 110.0)
    assert (found.low, found.high) == pytest.approx((2.0, 4.0))
    assert paired_ratio([]) is None
    assert paired_ratio([(Timed(1.0, 1), Timed(0.0, 0))]) is None


def test_what_is_unknown_stays_unknown() -> None:
    assert median([None, 1.0, 3.0]) == 2.0
    assert median([None]) is None
    assert divided(1.0, 4.0) == 0.25
    assert divided(1.0, 0.0) is divided(None, 1.0) is divided(1.0, None) is None
    assert (rounded(None), rounded(1.00001), rounded(0.123456)) == (None, 1, 0.1235)


def test_a_ratio_of_constant_times_has_no_width() -> None:
    pairs = [(Timed(90.0 * n, n), Timed(100.0 * n, n)) for n in (10, 20, 30)]
    ratio = paired_ratio(pairs)
    assert ratio is not None
    assert ratio == pytest.approx((0.9, 0.9, 0.9))


def test_the_interval_of_a_known_ratio_is_as_wide_as_theory_says() -> None:
    rng = random.Random(1)
    count, spread = 100, 0.1
    pairs = [(Timed(rng.gauss(0.9, spread) * 1000.0, 10), Timed(1000.0, 10)) for _ in range(count)]
    ratio = paired_ratio(pairs)
    assert ratio is not None
    assert ratio.low < 0.9 < ratio.high
    assert ratio.high - ratio.low == pytest.approx(2 * 1.96 * spread / count**0.5, rel=0.25)
    assert paired_ratio(pairs) == ratio
    assert paired_ratio(pairs, seed=1) != ratio


def test_pairing_removes_what_prompts_differ_in() -> None:
    rng = random.Random(2)
    paces = [rng.uniform(10.0, 40.0) for _ in range(40)]
    below = [Timed(pace * 50, 50) for pace in paces]
    above = [Timed(pace * 50 * rng.uniform(0.89, 0.91), 50) for pace in paces]
    paired = paired_ratio(list(zip(above, below, strict=True)))
    rng.shuffle(below)
    mixed = paired_ratio(list(zip(above, below, strict=True)))
    assert paired is not None and mixed is not None
    assert paired.high - paired.low < 0.1 * (mixed.high - mixed.low)


@pytest.mark.parametrize("pairs", [[], [(Timed(1.0, 1), Timed(0.0, 0))], [(Timed(1.0, 1), Timed(0.0, 5))]])
def test_nothing_to_divide_by_is_no_ratio(pairs: list[tuple[Timed, Timed]]) -> None:
    assert paired_ratio(pairs) is None


def test_a_share_has_wilson_s_interval() -> None:
    # z² = 3.8415: nothing of 64 is up to z²/(64 + z²); 5 of 10 is 0.5 ± z·√(0.025 + z²/400)/(1 + z²/10).
    assert wilson(0, 64) == pytest.approx((0.0, 0.0, 0.05662), abs=1e-5)
    assert wilson(64, 64) == pytest.approx((1.0, 0.94338, 1.0), abs=1e-5)
    assert wilson(5, 10) == pytest.approx((0.5, 0.23659, 0.76341), abs=1e-5)
    assert wilson(0, 0) is None


def test_more_often_by_discordant_pairs() -> None:
    # One-sided: 5 of 5 is 1/32, 4 of 4 is 1/16; 9 of 10 is 11/1024, 8 of 10 is 56/1024.
    assert is_more_often(5, 0) and not is_more_often(4, 0)
    assert is_more_often(9, 1) and not is_more_often(8, 2)
    assert not is_more_often(0, 0) and not is_more_often(0, 9)
