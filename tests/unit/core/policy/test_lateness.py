"""Whether to hold a step back: the worth of waiting, against a plain count of tokens and the design's closed form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_wanspec.core.learned.meter import Pace
from vllm_wanspec.core.policy.lateness import Wait, worthwhile_wait
from vllm_wanspec.core.turnaround import Coming

STEP_S = 0.03


def pace(
    *, rows: int = 1, tokens_per_step: float = 3.0, usual: float = 3.0, agreement: float = 0.8, limit: int = 4
) -> Pace:
    """``usual``: tokens of a step with a draft; four drafts at this agreement yield 3.36."""
    return Pace(rows, STEP_S, tokens_per_step, usual, agreement, limit)


def at_once(after_s: float, *, chance: float = 1.0, now: float = 0.0) -> Coming:
    """A full draft that arrives all at one time."""
    return Coming(now + after_s, chance, 0.0)


def wait(*coming: Coming, max_wait_s: float = 1.0, now: float = 0.0, **changes: float) -> Wait | None:
    return worthwhile_wait(coming, pace(**changes), now=now, max_wait_s=max_wait_s)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens_per_step", [1.2, 2.0, 3.0])
def test_one_request_waits_for_a_full_draft_iff_w_is_below_the_closed_form(tokens_per_step: float) -> None:
    limit_s = STEP_S - STEP_S / tokens_per_step  # w < t_v - 1/r, r the present yield in tokens per second
    assert wait(at_once(limit_s * 0.99), tokens_per_step=tokens_per_step) == Wait(pytest.approx(limit_s * 0.99), 4)
    assert wait(at_once(limit_s * 1.01), tokens_per_step=tokens_per_step) is None


def test_a_short_draft_is_worth_less_than_a_usual_one() -> None:
    assert wait(at_once(0.004), limit=2, usual=2.4) is not None  # 0.4 tokens lost, 2 gained
    assert wait(at_once(0.004), limit=2, usual=4.5) is None  # it would yield 2.44, and the next step 4.5 without it


def test_drafts_that_yield_nothing_are_not_waited_for() -> None:
    assert wait(at_once(0.001), tokens_per_step=1.0) is None


@pytest.mark.parametrize(("max_wait_s", "waits"), [(0.0049, False), (0.0051, True), (0.0, False)])
def test_never_beyond_the_maximum(max_wait_s: float, waits: bool) -> None:
    assert (wait(at_once(0.005), max_wait_s=max_wait_s) is not None) is waits


def test_nothing_is_coming() -> None:
    assert wait() is None


def test_what_is_overdue_is_expected_at_once() -> None:
    assert wait(at_once(-5.0, now=100.0), now=100.0) == Wait(0.0, 4)
    assert wait(at_once(0.004, now=100.0), now=100.0) == Wait(pytest.approx(0.004), 4)


def test_the_wait_stops_the_whole_batch() -> None:
    assert wait(at_once(0.004), rows=1) is not None
    assert wait(at_once(0.004), rows=4) is not None
    assert wait(at_once(0.004), rows=6) is None  # 6 x 3 tokens per 30 ms: 2.4 tokens, for a gain of 2
    assert wait(at_once(0.004), at_once(0.003), rows=6) == Wait(pytest.approx(0.004), 4)


def test_only_what_is_likely_to_be_of_use_is_waited_for() -> None:
    assert wait(at_once(0.01, chance=0.6)) is not None  # costs a token, and gains 0.6 x 2
    assert wait(at_once(0.01, chance=0.4)) is None


def test_the_nearest_of_several_where_the_others_are_too_far() -> None:
    assert wait(at_once(0.002), at_once(0.5)) == Wait(pytest.approx(0.002), 4)
    assert wait(at_once(0.002), at_once(0.012), rows=2) == Wait(pytest.approx(0.002), 4)


def test_tokens_that_come_one_by_one_are_waited_for_while_each_is_worth_it() -> None:
    slow, fast = Coming(0.001, 1.0, 0.02), Coming(0.001, 1.0, 0.0001)
    assert wait(slow, agreement=0.5, tokens_per_step=1.9, usual=1.9) == Wait(pytest.approx(0.001), 1)
    assert wait(fast) == Wait(pytest.approx(0.0013), 4)


def gain(coming: list[Coming], seconds: float, pace: Pace) -> float:
    """Tokens won by a wait, counted one by one."""
    total = -pace.rows * pace.tokens_per_step * seconds / pace.step_s
    for request in coming:
        arrivals = [max(0.0, request.at_s) + i * request.gap_s for i in range(pace.limit)]
        drafts = [at_s for at_s in arrivals if at_s <= seconds + 1e-12]  # whichever way their sums are rounded
        if drafts:
            now_yields = sum(pace.agreement**i for i in range(len(drafts) + 1))
            short = max(0.0, pace.tokens_per_drafted_step - now_yields)
            total += request.chance * (pace.tokens_per_step - 1.0 - short)
    return total


comings = st.builds(Coming, st.floats(-0.01, 0.03), st.floats(0.1, 1.0), st.floats(0.0, 0.01))
paces = st.builds(
    Pace,
    rows=st.integers(1, 8),
    step_s=st.floats(0.005, 0.1),
    tokens_per_step=st.floats(1.0, 5.0),
    tokens_per_drafted_step=st.floats(1.0, 5.0),
    agreement=st.floats(0.1, 0.95),
    limit=st.integers(1, 6),
)


@given(st.lists(comings, max_size=4), paces, st.floats(0.0, 0.03))
def test_no_other_wait_would_gain_more(coming: list[Coming], now_pace: Pace, max_wait_s: float) -> None:
    best = worthwhile_wait(coming, now_pace, now=0.0, max_wait_s=max_wait_s)
    reached = [request for request in coming if request.at_s <= max_wait_s]
    others = [max_wait_s * i / 50 for i in range(51)]
    if best is None:
        assert all(gain(reached, seconds, now_pace) <= 1e-9 for seconds in others)
        return
    assert 0.0 <= best.seconds <= max_wait_s
    assert 1 <= best.drafts <= now_pace.limit
    assert gain(reached, best.seconds, now_pace) > 0.0
    assert all(gain(reached, s, now_pace) <= gain(reached, best.seconds, now_pace) + 1e-9 for s in others)
