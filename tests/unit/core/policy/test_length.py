"""How many drafts to verify: the marginal rule, the adaptive window, and whether drafts pay at all."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tree_checks import chain, make_tree

from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.learned.estimates import StepTimes
from vllm_wanspec.core.policy.length import (
    AWC_MAX,
    AWC_ROUNDS,
    LEARNING_STEPS,
    LOOK_STEPS,
    PROBE_STEPS,
    Payoff,
    Plan,
    StepCost,
    Window,
    best_window,
    length_policy,
)

FREE = StepCost(0.03, 0.03, 0.0)
DEAR = StepCost(0.03, 0.03, 0.015)
"""One more token costs half a step."""

# The policies


@pytest.mark.parametrize("policy", ["fixed", "marginal", "awc"])
@pytest.mark.parametrize("limit", [0, 1, 8])
def test_no_policy_exceeds_the_limit(policy: str, limit: int) -> None:
    for window in (None, Window()):
        assert length_policy(policy).plan(limit, window, 0.5).limit <= limit


def test_fixed_takes_what_is_there() -> None:
    assert length_policy("fixed").plan(5, Window(), 0.9) == Plan(5, 0.0)


def test_marginal_ends_where_the_next_token_costs_more_than_it_yields() -> None:
    tree = make_tree(calibration=(calibration := Calibration()))
    chain(tree, [1, 2, 3, 4, 5, 6], logprob=math.log(0.65))
    p = calibration.probability[calibration.bucket(math.log(0.65), best=True)]
    for worth in (0.0, 0.1, 0.3, 0.6, 0.99):
        plan = length_policy("marginal").plan(6, None, worth)
        tokens, _, _ = tree.draft(plan.limit, plan.least)
        # The i-th is verified iff P(all of 1..i) times what a token is worth is more than it costs.
        assert len(tokens) == sum(p**i >= worth for i in range(1, 7))


def test_a_request_without_a_window_is_not_bound_by_one() -> None:
    assert length_policy("awc").plan(7, None, 0.0).limit == 7


def test_a_window_binds() -> None:
    window = Window()
    for size in (0, 1, 3, 12):
        window.size = size
        assert length_policy("awc").plan(5, window, 0.0).limit == min(5, size)


def test_there_are_no_other_policies() -> None:
    with pytest.raises(KeyError):
        length_policy("other")


# The raw window


@pytest.mark.parametrize(
    ("acceptance", "cost", "expected"),
    [
        (1.0, FREE, AWC_MAX),
        (0.0, FREE, 0),  # no window is better than none
        (0.0, DEAR, 0),
        (1.0, DEAR, AWC_MAX),
        (0.5, DEAR, 0),  # 1.5 tokens in 1.5 steps: better none
        (0.6, DEAR, 1),
        (0.8, StepCost(0.03, 0.05, 0.0), AWC_MAX),
        (0.3, StepCost(0.03, 0.05, 0.0), 0),  # at most 1.43 tokens in 1.67 steps
    ],
)
def test_the_window_with_the_most_tokens_per_second(acceptance: float, cost: StepCost, expected: int) -> None:
    assert best_window(acceptance, cost) == expected


@given(
    st.floats(0.0, 1.0), st.floats(0.001, 0.1), st.floats(0.0, 0.1), st.one_of(st.just(0.0), st.floats(0.0001, 0.05))
)
def test_no_other_window_is_better(acceptance: float, plain_s: float, extra_s: float, token_s: float) -> None:
    cost = StepCost(plain_s, plain_s + extra_s, token_s)

    def rate(window: int) -> float:
        seconds = cost.drafted_s + window * cost.token_s if window else cost.plain_s
        return sum(acceptance**i for i in range(window + 1)) / seconds

    best = best_window(acceptance, cost)
    assert all(rate(window) <= rate(best) * (1.0 + 1e-6) for window in range(AWC_MAX + 1))


def test_what_steps_cost_comes_from_measured_times() -> None:
    times = StepTimes()
    assert StepCost.of(times) == StepCost(1.0, 1.0, 0.0)
    for drafts in (1, 2, 3, 4, 1, 2, 3, 4):
        times.add(1 + drafts, drafts=drafts, full=False, seconds=0.03 + 0.002 * drafts)
    assert StepCost.of(times) == StepCost(pytest.approx(0.03), pytest.approx(0.03), pytest.approx(0.002))
    times.add(1, drafts=0, full=False, seconds=0.02)
    assert StepCost.of(times).plain_s == pytest.approx(0.02)


# The adaptive window


def rounds(window: Window, count: int, *, followed: int, missed: bool, cost: StepCost = DEAR) -> list[int]:
    sizes = []
    for _ in range(count):
        window.observe(followed, missed, cost)
        sizes.append(window.size)
    return sizes


def test_it_starts_wide_and_stays_so_while_drafts_are_right() -> None:
    window = Window()
    assert window.size == AWC_MAX
    assert rounds(window, 20, followed=12, missed=False, cost=FREE) == [AWC_MAX] * 20


def test_it_never_leaves_its_clamp() -> None:
    window = Window()
    for followed, missed in [(0, True), (12, False), (3, True), (1, False)] * 30:
        window.observe(followed, missed, DEAR)
        assert 0 <= window.size <= AWC_MAX


def test_it_moves_by_a_moving_average() -> None:
    window = Window()
    rounds(window, 30, followed=12, missed=False)
    for _ in range(40):
        window._acceptance.add(0.0)  # all at once nothing agrees: the raw window is at the floor
    sizes = rounds(window, 4, followed=0, missed=True)
    assert sizes == [8, 5, 3, 2]  # 12, then 0.6 of the distance to 1 each time: 7.6, 4.96, 3.4, 2.4


def test_two_rounds_at_the_floor_switch_it_off() -> None:
    window = Window()
    for _ in range(60):
        window._acceptance.add(0.0)
    sizes = rounds(window, 12, followed=0, missed=True)
    at_floor = sizes.index(1)
    assert sizes[at_floor : at_floor + 3] == [1, 0, 0]
    assert sizes[-1] == 0


def test_a_single_round_at_the_floor_does_not() -> None:
    window = Window()
    for _ in range(60):
        window._acceptance.add(0.0)
    while window.size > 1:
        window.observe(0, True, DEAR)
    for _ in range(100):
        window._acceptance.add(1.0)
    window.observe(1, False, DEAR)
    assert window.size > 1


def test_two_good_rounds_switch_it_on_again_and_one_does_not() -> None:
    window = Window()
    rounds(window, 60, followed=0, missed=True)
    assert window.size == 0
    for _ in range(100):
        window._acceptance.add(1.0)  # agreement is seen in the tree, offered or not
    sizes = rounds(window, 3, followed=1, missed=False)
    assert sizes[: AWC_ROUNDS - 1] == [0] * (AWC_ROUNDS - 1)
    assert sizes[AWC_ROUNDS - 1] > 0


def test_good_rounds_must_follow_each_other() -> None:
    window = Window()
    rounds(window, 60, followed=0, missed=True)
    for _ in range(6):
        for value, size in ((1.0, 0), (0.0, 0)):
            for _ in range(100):
                window._acceptance.add(value)
            window.observe(0, False, DEAR)
            assert window.size == size


def test_it_goes_with_a_workload_that_changes() -> None:
    window = Window()
    assert rounds(window, 50, followed=6, missed=False)[-1] == AWC_MAX
    assert rounds(window, 50, followed=0, missed=True)[-1] == 0
    assert rounds(window, 50, followed=1, missed=False)[-1] > 1


# Whether drafts pay


def measured(*, plain_s: float, drafted_s: float, full_s: float = 0.0) -> StepTimes:
    times = StepTimes()
    for _ in range(8):
        times.add(1, drafts=0, full=False, seconds=plain_s)
        times.add(5, drafts=4, full=False, seconds=drafted_s)
        if full_s:
            times.add(5, drafts=4, full=True, seconds=full_s)
    return times


def pays(payoff: Payoff, expected: float, *, rows: int = 1, full: bool = False) -> bool:
    return payoff.pays(rows=rows, drafts=4 * rows, expected=expected, full=full)


def test_drafts_pay_while_nothing_is_known() -> None:
    assert all(pays(Payoff(StepTimes()), 0.001) for _ in range(10))


def play(payoff: Payoff, times: StepTimes, steps: int, *, expected: float, drafted_s: float) -> list[int]:
    """Steps for all of which there are drafts, timed as they go; those that went without."""
    without = []
    for index in range(steps):
        if pays(payoff, expected):
            times.add(5, drafts=4, full=False, seconds=drafted_s)
        else:
            times.add(1, drafts=0, full=False, seconds=0.02)
            without.append(index)
    return without


def test_some_steps_go_without_good_drafts_until_it_is_known_what_those_take() -> None:
    times = StepTimes()
    payoff = Payoff(times)
    learning = play(payoff, times, 1000, expected=3.0, drafted_s=0.03)
    assert learning == [LEARNING_STEPS * count - 1 for count in range(1, len(learning) + 1)]
    assert len(learning) == 5  # four, the first of which have faded
    assert times.plain.samples >= StepTimes.MIN_SAMPLES


def test_drafts_in_every_step_that_do_not_pay_are_found_out() -> None:
    times = StepTimes()
    without = play(Payoff(times), times, 1000, expected=0.1, drafted_s=0.03)
    known = 5 * LEARNING_STEPS
    assert sum(index < known for index in without) == 5
    probes = sorted(set(range(known, 1000)) - set(without))
    assert probes == list(range(known + PROBE_STEPS - 1, 1000, PROBE_STEPS))


def test_where_plain_steps_have_been_timed_no_good_drafts_are_withheld() -> None:
    times = measured(plain_s=0.02, drafted_s=0.03)
    assert play(Payoff(times), times, 10 * LEARNING_STEPS, expected=3.0, drafted_s=0.03) == []


def test_drafts_pay_iff_they_yield_more_than_they_cost() -> None:
    times = measured(plain_s=0.02, drafted_s=0.026)  # 30 % more time
    assert pays(Payoff(times), 0.31)
    assert not pays(Payoff(times), 0.29)


def test_a_whole_batch_pays_for_the_drafts_of_some() -> None:
    times = StepTimes()
    for rows in (4, 8, 4, 8, 4, 8):
        times.add(rows, drafts=0, full=False, seconds=0.02)
        times.add(5 * rows, drafts=4 * rows, full=False, seconds=0.026)
    assert pays(Payoff(times), 2.5, rows=8)
    assert not pays(Payoff(times), 2.3, rows=8)


def test_full_drafts_have_a_price_of_their_own() -> None:
    times = measured(plain_s=0.02, drafted_s=0.03, full_s=0.021)
    assert pays(Payoff(times), 0.1, full=True)
    assert not pays(Payoff(times), 0.1, full=False)


def test_while_drafts_do_not_pay_one_step_now_and_then_measures_again() -> None:
    payoff = Payoff(measured(plain_s=0.02, drafted_s=0.03))
    answers = [pays(payoff, 0.1) for _ in range(3 * PROBE_STEPS)]
    assert [index for index, answer in enumerate(answers) if answer] == [n * PROBE_STEPS - 1 for n in (1, 2, 3)]


def test_a_step_that_pays_starts_the_count_anew() -> None:
    payoff = Payoff(measured(plain_s=0.02, drafted_s=0.03))
    assert not any(pays(payoff, 0.1) for _ in range(PROBE_STEPS - 1))
    assert pays(payoff, 2.0)
    assert not any(pays(payoff, 0.1) for _ in range(PROBE_STEPS - 1))
    assert pays(payoff, 0.1)


def test_after_many_steps_that_did_not_pay_only_some_look_whether_they_would() -> None:
    payoff = Payoff(measured(plain_s=0.02, drafted_s=0.03))
    looked = [step for step in range(1, 6 * LOOK_STEPS) if payoff.looks() and not pays(payoff, 0.1)]
    assert looked == [*range(1, LOOK_STEPS + 1), *range(LOOK_STEPS + 1, 6 * LOOK_STEPS, LOOK_STEPS)]
    while not payoff.looks():
        pass
    assert pays(payoff, 2.0)
    assert all(payoff.looks() and pays(payoff, 2.0) for _ in range(3 * LOOK_STEPS))


def test_a_few_steps_that_do_not_pay_among_others_that_do_cost_no_look() -> None:
    payoff = Payoff(measured(plain_s=0.02, drafted_s=0.03))
    for expected in [0.1] * (LOOK_STEPS - 1) + [2.0] + [0.1, 2.0] * LOOK_STEPS:
        assert payoff.looks()
        pays(payoff, expected)


def test_a_probe_that_finds_drafts_cheaper_lets_them_be() -> None:
    times = measured(plain_s=0.02, drafted_s=0.03)
    payoff = Payoff(times)
    assert not pays(payoff, 0.2)
    for _ in range(200):
        times.add(5, drafts=4, full=False, seconds=0.021)
    assert pays(payoff, 0.2)
