"""Statistics of measured times, against what theory says."""

from __future__ import annotations

import random

import pytest

from vllm_wanspec.lab.stats import Interval, Timed, paired_ratio


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


def test_an_interval_is_three_numbers_in_json() -> None:
    assert Interval(0.91234567, 0.9, 0.92).as_json() == [0.9123, 0.9, 0.92]
