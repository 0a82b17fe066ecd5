"""LinkHealth: histories and the state that they make, probes, what a drafter costs; Bar: rejects of one request."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_wanspec.core.health import (
    DOUBT_S,
    FAILURES_IN_A_ROW,
    FIRST_BAR_S,
    FIRST_PROBE_S,
    JUDGED_ROWS,
    JUDGED_S,
    LEAST_USE,
    MAX_BAR_S,
    MAX_PROBE_S,
    PATIENCE_S,
    PINGS_UNANSWERED,
    REMEDIES,
    TRUST_S,
    Bar,
    LinkHealth,
    Why,
    patience,
)
from vllm_wanspec.core.messages import REJECT_CODES
from vllm_wanspec.core.states import LinkState

HEALTHY, SUSPECT, BROKEN = LinkState
Happening = Callable[[LinkHealth, float], object]


def reject(health: LinkHealth, now: float) -> bool:
    return health.rejected("overloaded", now)


def unanswered(health: LinkHealth, now: float) -> bool:
    return health.unanswered(0, PATIENCE_S, now, waited=False)


def draft(health: LinkHealth, now: float) -> bool:
    return health.drafted(now)


def lose(health: LinkHealth, now: float) -> bool:
    return health.lost(0, 3, now)


def lose_idle(health: LinkHealth, now: float) -> bool:
    return health.lost(0, 0, now)


def silence(health: LinkHealth, now: float) -> bool:
    return health.pinged(PINGS_UNANSWERED, now)


def pong(health: LinkHealth, now: float) -> bool:
    return health.pinged(0, now)


def fault(health: LinkHealth, now: float) -> bool:
    return health.lost(health._faults + 1, 0, now)


def window(tokens_a_drafted_row: float, share: float = 0.5, dry_tokens: float = 1.2) -> Happening:
    """Enough steps to be judged by, of which ``share`` had drafts, and such a yield."""

    def judged(health: LinkHealth, now: float) -> bool:
        health.judge(dry_tokens, now - JUDGED_S - 1.0)
        health.rows += JUDGED_ROWS
        health.drafted_rows += round(share * JUDGED_ROWS)
        health.drafted_tokens += round(share * JUDGED_ROWS * tokens_a_drafted_row)
        return health.judge(dry_tokens, now)

    return judged


useful, useless = window(2.5), window(1.2)
late = window(2.5, share=0.0)


@pytest.mark.parametrize(
    ("history", "state", "why"),
    [
        ([], HEALTHY, None),
        ([(0, reject), (0, reject)], HEALTHY, None),
        ([(0, reject)] * 3, SUSPECT, Why.REJECTS),
        ([(0, reject), (1, reject), (2, draft), (3, reject), (4, reject)], HEALTHY, None),
        ([(0, reject)] * 3 + [(DOUBT_S - 1, reject)], SUSPECT, Why.REJECTS),
        ([(0, reject)] * 3 + [(DOUBT_S, reject)], BROKEN, Why.REJECTS),
        ([(0, reject)] * 3 + [(1, draft)], HEALTHY, None),
        ([(0, reject), (1, lose), (2, reject)], SUSPECT, Why.REJECTS),
        ([(0, lose), (1, lose), (2, lose)], SUSPECT, Why.LOSSES),
        ([(0, lose_idle)] * 9, HEALTHY, None),
        ([(0, unanswered)], SUSPECT, Why.UNANSWERED),
        ([(0, draft), (PATIENCE_S - 0.1, unanswered)], HEALTHY, None),  # others have their drafts
        ([(0, draft), (PATIENCE_S, unanswered)], SUSPECT, Why.UNANSWERED),
        ([(0, unanswered)] * 9, SUSPECT, Why.UNANSWERED),  # of many sessions at once
        ([(0, unanswered), (DOUBT_S, unanswered)], BROKEN, Why.UNANSWERED),
        ([(0, unanswered), (DOUBT_S, unanswered), (60, draft)], HEALTHY, None),
        ([(0, silence)], SUSPECT, Why.PINGS),
        ([(0, silence), (60, silence)], SUSPECT, Why.PINGS),  # soon its connection is given up
        ([(0, silence), (1, pong)], HEALTHY, None),
        ([(0, silence), (1, unanswered), (2, pong)], SUSPECT, Why.UNANSWERED),
        ([(0, unanswered), (2, pong)], SUSPECT, Why.UNANSWERED),
        ([(0, fault)], BROKEN, Why.FAULT),
        ([(0, fault), (9, fault)], BROKEN, Why.FAULT),
        ([(0, unanswered), (1, fault)], BROKEN, Why.FAULT),
        ([(0, fault), (9, draft)], HEALTHY, None),
        ([(20, useful), (40, useful)], HEALTHY, None),
        ([(20, useless)], SUSPECT, Why.USELESS),
        ([(20, late)], SUSPECT, Why.USELESS),
        ([(20, useless), (40, useless)], BROKEN, Why.USELESS),
        ([(20, useless), (40, useful)], HEALTHY, None),
        ([(20, useless), (21, draft)], SUSPECT, Why.USELESS),  # that it drafts was never in doubt
        ([(20, useless), (40, useless), (41, draft)], BROKEN, Why.USELESS),
        ([(20, useless), (40, useless), (60, useful)], HEALTHY, None),
        ([(20, useless), (40, useful), (60, useless)], SUSPECT, Why.USELESS),
        ([(20, unanswered), (21, useful)], SUSPECT, Why.UNANSWERED),
    ],
)
def test_what_a_history_makes_of_a_drafter(
    history: list[tuple[float, Happening]], state: LinkState, why: Why | None
) -> None:
    health = LinkHealth()
    for at_s, happening in history:
        before = health.state
        assert happening(health, 1000.0 + at_s) == (health.state is not before)
    assert (health.state, health.why) == (state, why)


def test_every_reason_has_a_remedy() -> None:
    assert set(REMEDIES) == set(Why)


@pytest.mark.parametrize("code", sorted(REJECT_CODES))
def test_rejects_of_any_code_count(code: str) -> None:
    health = LinkHealth()
    for _ in range(FAILURES_IN_A_ROW):
        health.rejected(code, 0.0)
    assert (health.state, health.code, health.rejects[code]) == (SUSPECT, code, FAILURES_IN_A_ROW)


# What drafts add


def test_what_drafts_add_is_what_they_yield_over_prompt_lookup() -> None:
    health = LinkHealth()
    window(2.2, share=0.5, dry_tokens=1.2)(health, 100.0)
    assert health.added == pytest.approx(0.5)
    assert (health.rows, health.drafted_rows, health.drafted_tokens) == (0, 0, 0)


@pytest.mark.parametrize(("share", "state"), [(0.9 * LEAST_USE, SUSPECT), (1.6 * LEAST_USE, HEALTHY)])
def test_a_drafter_must_add_what_it_may_cost(share: float, state: LinkState) -> None:
    health = LinkHealth()
    health.judge(1.0, 0.0)
    health.rows, health.drafted_rows = 1000, round(1000 * share)
    health.drafted_tokens = 2 * health.drafted_rows
    health.judge(1.0, JUDGED_S)
    assert health.state is state


@pytest.mark.parametrize(("rows", "seconds"), [(JUDGED_ROWS - 1, 1e4), (10**6, 0.9 * JUDGED_S)])
def test_too_little_is_not_judged(rows: int, seconds: float) -> None:
    health = LinkHealth()
    health.judge(1.0, 0.0)
    health.rows = rows
    assert not health.judge(1.0, seconds)
    assert (health.state, health.rows, health.added) == (HEALTHY, rows, None)


def test_idle_time_is_no_time_to_be_judged_by() -> None:
    health = LinkHealth()
    for at_s in range(0, 100):
        health.judge(1.0, float(at_s))
    health.rows = JUDGED_ROWS
    assert not health.judge(1.0, 100.0)


def test_a_probe_of_a_useless_drafter_ends_when_it_has_been_judged() -> None:
    health = LinkHealth()
    useless(health, 20.0)
    useless(health, 40.0)
    health.opened(7, 50.0, waits=True, probe=True)
    useless(health, 70.0)
    assert (health.state, health.probing) == (BROKEN, None)


# Probes


def broken(now: float = 0.0) -> LinkHealth:
    health = LinkHealth()
    unanswered(health, now - DOUBT_S)
    unanswered(health, now)
    assert health.state is BROKEN
    return health


def next_probe_s(health: LinkHealth, now: float) -> float:
    """When the next probe is due, to a tenth of a second."""
    while not health.probe_due(now):
        now += 0.1
    return now


def test_probes_get_rarer_and_never_stop() -> None:
    health, now, times = broken(), 0.0, []
    for number in range(20):
        now = next_probe_s(health, now)
        times.append(now)
        health.opened(number, now, waits=True, probe=True)
        assert not health.probe_due(now + 1e6)  # one at a time
        health.unanswered(number, PATIENCE_S, now + PATIENCE_S, waited=True)
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps[0] >= 2.0 * FIRST_PROBE_S
    assert all(after >= before - 0.2 for before, after in pairwise(gaps))
    assert gaps[-1] == pytest.approx(MAX_PROBE_S, abs=0.2)
    assert (health.probes, health.opening) == (20, 0)


@pytest.mark.parametrize("how", ["ended", "lost"])
def test_a_probe_that_is_over_makes_room_for_the_next(how: str) -> None:
    health = broken()
    health.opened(5, 100.0, waits=True, probe=True)
    if how == "lost":
        health.lost(0, 1, 100.0)
    else:
        health.ended(5, waited=True)
    assert health.opening == 0
    assert health.probe_due(100.0 + MAX_PROBE_S)


def test_a_healthy_drafter_is_not_probed() -> None:
    assert not LinkHealth().probe_due(1e9)
    health = broken()
    draft(health, 10.0)
    assert not health.probe_due(1e9)


def test_who_fails_again_soon_is_probed_as_rarely_as_before() -> None:
    health = broken()
    for number in range(5):
        health.opened(number, 10.0, waits=False, probe=True)
        health.ended(number, waited=False)
    draft(health, 20.0)
    fault(health, 21.0)
    assert next_probe_s(health, 21.0) > 21.0 + 16.0
    draft(health, 60.0)
    fault(health, 60.0 + TRUST_S)
    assert next_probe_s(health, 60.0 + TRUST_S) == pytest.approx(60.0 + TRUST_S + FIRST_PROBE_S, abs=0.2)


def test_a_drafter_that_comes_back_is_probed_soon() -> None:
    health = broken()
    for number in range(8):
        health.opened(number, 10.0, waits=False, probe=True)
        health.ended(number, waited=False)
    assert not health.probe_due(20.0)
    health.lost(0, 0, 20.0)
    health.welcomed(0, 30.0)
    assert next_probe_s(health, 30.0) <= 30.2 + FIRST_PROBE_S


HAPPENINGS = st.sampled_from([reject, unanswered, lose, lose_idle, silence, pong, fault, useless, useful, late, draft])
HISTORIES = st.lists(st.tuples(st.floats(0.0, 200.0), HAPPENINGS), max_size=40)


@given(HISTORIES)
@settings(max_examples=300)
def test_whatever_has_happened_one_that_is_well_is_healthy_in_time(history: list[tuple[float, Happening]]) -> None:
    """Within the longest wait for a probe, and the time that it takes to be judged."""
    health, now, number = LinkHealth(), 1000.0, 0
    for after_s, happening in history:
        now += after_s
        happening(health, now)
        if health.probe_due(now):
            number += 1
            health.opened(number, now, waits=True, probe=True)
    if health.probing is not None:
        health.ended(health.probing, waited=True)
    began_s = now
    while health.state is not HEALTHY and not health.probe_due(now):
        now += 0.5
        pong(health, now)
    assert now - began_s <= MAX_PROBE_S + 0.5
    if health.state is not HEALTHY:
        health.opened(number + 1, now, waits=True, probe=True)
        draft(health, now + 1.0)
        useful(health, now + 2.0 + JUDGED_S)
    assert health.state is HEALTHY
    assert health.why is health.probing is None


@given(HISTORIES)
@settings(max_examples=300)
def test_probes_are_one_at_a_time_and_ever_further_apart(history: list[tuple[float, Happening]]) -> None:
    health, now, number = LinkHealth(), 1000.0, 0
    last_s = wait_s = 0.0
    for after_s, happening in history:
        now += after_s
        happening(health, now)
        if health.state is HEALTHY:
            last_s = wait_s = 0.0
        if health.probe_due(now):
            assert health.probing is None
            assert not last_s or now - last_s >= min(MAX_PROBE_S, wait_s)
            wait_s = 2.0 * wait_s if last_s else 2.0 * FIRST_PROBE_S
            last_s = now
            number += 1
            health.opened(number, now, waits=False, probe=True)
            assert not health.probe_due(now)


@given(HISTORIES)
def test_what_is_remembered_stays_sound(history: list[tuple[float, Happening]]) -> None:
    health, now = LinkHealth(), 1000.0
    for after_s, happening in history:
        now += after_s
        happening(health, now)
        assert (health.why is None) == (health.state is HEALTHY)
        assert health.opening == 0


# What one more session costs


def test_what_a_first_draft_is_expected_to_take() -> None:
    health = LinkHealth()
    assert health.cost_s(0.02, 0, 0.0) == pytest.approx(0.02)
    assert health.cost_s(0.02, 3, 0.0) == pytest.approx(0.08)
    health.opened(1, 0.0, waits=True, probe=False)
    health.answered(1.0, 1000, 10.0)  # a tenth of a second for the context
    assert health.cost_s(0.02, 0, 10.0) == pytest.approx(0.02 + 0.88)
    assert health.cost_s(0.02, 0, 1e4) == pytest.approx(0.02)
    assert health.opening == 0


@given(st.floats(0.0, 50.0), st.floats(0.0, 50.0))
def test_load_makes_a_drafter_dearer(one: float, other: float) -> None:
    costs = []
    for load in sorted((one, other)):
        health = LinkHealth()
        health.load = load
        costs.append(health.cost_s(0.02, 0, 0.0))
    assert costs[0] <= costs[1]
    assert costs[0] >= 0.02


def test_longer_contexts_and_ways_may_take_longer() -> None:
    assert patience(0, 0.0) == PATIENCE_S
    assert patience(0, 0.5) == PATIENCE_S + 1.0
    assert patience(100_000, 0.0) > PATIENCE_S + 5.0


# Bars


@pytest.mark.parametrize("code", sorted(REJECT_CODES))
def test_what_a_reject_means_for_the_request_there(code: str) -> None:
    bar = Bar()
    assert not bar.holds(100.0)
    bar.rejected(code, 100.0)
    assert bar.holds(100.0)
    assert bar.code == code
    assert bar.lasts == bar.holds(1e9) == (code in {"too_long", "vocabulary"})


def test_the_wait_after_rejects_doubles_up_to_a_limit() -> None:
    bar, waits = Bar(), []
    for _ in range(12):
        bar.rejected("overloaded", 100.0)
        waits.append(bar.until_s - 100.0)
    assert waits[:3] == pytest.approx([2 * FIRST_BAR_S, 4 * FIRST_BAR_S, 8 * FIRST_BAR_S])
    assert waits[-1] == pytest.approx(MAX_BAR_S)
