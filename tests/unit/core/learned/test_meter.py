"""What the target's steps are measured to cost and yield, and what that makes of a second of waiting."""

from math import inf

import pytest

from vllm_wanspec.core.learned.estimates import StepTimes
from vllm_wanspec.core.learned.meter import ASSUMED_STEP_S, Pace, StepMeter


def meter() -> StepMeter:
    return StepMeter(StepTimes(), speculation_length=4)


def test_a_second_of_waiting_costs_what_the_batch_yields_in_it() -> None:
    pace = Pace(6, 0.03, 3.0, 3.0, 0.8, 4)
    assert pace.yield_per_s == pytest.approx(600.0)
    assert pace.longest_wait_s(2.0) == pytest.approx(2.0 * 2.0 / 600.0)  # two requests could gain two tokens each


def test_a_batch_that_yields_nothing_loses_nothing_by_waiting() -> None:
    assert Pace(0, 0.03, 3.0, 3.0, 0.8, 4).longest_wait_s(1.0) == inf


def test_no_wait_is_worth_anything_where_steps_without_drafts_yield_as_much() -> None:
    assert Pace(1, 0.03, 1.5, 3.0, 0.8, 4, tokens_per_dry_step=2.0).longest_wait_s(1.0) == 0.0


def test_before_the_first_step_a_usual_one_is_assumed() -> None:
    assert meter().seconds == ASSUMED_STEP_S
    assert meter().pace(0.8, 4) == Pace(1, ASSUMED_STEP_S, 1.0, 1.0, 0.8, 4, 1.0)


def test_the_pace_is_that_of_the_last_step_in_which_all_rows_decoded() -> None:
    measured = meter()
    measured.begins(1.0, 6, 4)
    assert measured.ends(1.02, rows=2, yielded=5)
    measured.begins(2.0, 0, 0)  # a prefill among them
    assert not measured.ends(2.1, rows=9, yielded=8)
    pace = measured.pace(0.7, 3)
    assert (pace.rows, pace.tokens_per_step, pace.agreement, pace.limit) == (2, pytest.approx(2.5), 0.7, 3)
    assert pace.step_s == measured.seconds == pytest.approx(0.02 + 0.125 * 0.08)


def test_an_end_without_a_beginning_is_no_step() -> None:
    measured = meter()
    assert not measured.ends(1.0, rows=1, yielded=1)
    measured.begins(1.0, 1, 0)
    assert measured.ends(1.5, rows=1, yielded=1)
    assert not measured.ends(9.0, rows=1, yielded=1)
    assert measured.seconds == pytest.approx(0.5)
