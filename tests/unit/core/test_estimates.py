"""The smoothed estimate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_wanspec.core.estimates import Smoothed


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
