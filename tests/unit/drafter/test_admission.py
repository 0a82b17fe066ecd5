"""Which sessions are taken: numbers, contexts, first tokens, and the end of a drafter."""

from vllm_wanspec.drafter.admission import FIRST_TOKEN_BOUND_S, LATE_SESSIONS, RECENT_S, Admission

LATE_S = FIRST_TOKEN_BOUND_S + 0.1


def with_sessions(count: int, **settings: int) -> Admission:
    """So many sessions, each with ten tokens, whose first branch was asked for at second 0."""
    admission = Admission(**{"sessions": 100, **settings})  # type: ignore[arg-type]
    for key in range(count):
        admission.opened(key, 10)
        admission.asked(key, 0.0)
    return admission


def test_too_many_sessions() -> None:
    admission = with_sessions(3, sessions=3)
    assert admission.refusal(10, 0.0) == "sessions"
    admission.closed(1)
    assert admission.refusal(10, 0.0) is None


def test_contexts_fit_into_the_cache_together() -> None:
    admission = with_sessions(3, capacity_tokens=100)
    assert admission.refusal(70, 0.0) is None
    assert admission.refusal(71, 0.0) == "context"
    admission.grew(2, 30)
    assert admission.context_tokens == 60
    assert admission.refusal(41, 0.0) == "context"
    admission.closed(2)
    admission.grew(2, 30)
    assert admission.context_tokens == 20
    assert admission.refusal(80, 0.0) is None


def test_the_only_session_is_taken_whatever_its_context() -> None:
    assert Admission(sessions=1, capacity_tokens=10).refusal(1000, 0.0) is None


def test_sessions_that_wait_too_long_for_their_first_token_keep_others_out() -> None:
    admission = with_sessions(LATE_SESSIONS)
    assert admission.refusal(10, FIRST_TOKEN_BOUND_S) is None
    assert admission.refusal(10, LATE_S) == "slow"
    assert with_sessions(LATE_SESSIONS - 1).refusal(10, LATE_S) is None  # may be long contexts


def test_first_tokens_that_came_late_keep_others_out_for_a_while() -> None:
    admission = with_sessions(LATE_SESSIONS)
    for key in range(LATE_SESSIONS):
        admission.answered(key, LATE_S)
    assert admission.refusal(10, LATE_S + RECENT_S - 0.1) == "slow"
    assert admission.refusal(10, LATE_S + RECENT_S + 0.1) is None


def test_some_late_ones_among_many_in_time_do_not() -> None:
    admission = with_sessions(3 * LATE_SESSIONS)
    for key in range(2 * LATE_SESSIONS):
        admission.answered(key, FIRST_TOKEN_BOUND_S)
    assert admission.refusal(10, LATE_S) is None
    assert admission.refusal(10, FIRST_TOKEN_BOUND_S + RECENT_S + 0.1) == "slow"


def test_only_a_session_s_first_token_counts() -> None:
    admission = with_sessions(LATE_SESSIONS)
    for key in range(LATE_SESSIONS):
        admission.answered(key, 0.1)
        admission.asked(key, 0.2)
    assert admission.refusal(10, 99.0) is None


def test_one_that_asked_for_nothing_does_not_wait() -> None:
    admission = Admission(sessions=100)
    for key in range(9):
        admission.opened(key, 1)
    assert admission.refusal(1, 99.0) is None


def test_a_drafter_that_ends_takes_nobody() -> None:
    admission = Admission(sessions=9)
    admission.draining = True
    assert admission.refusal(1, 0.0) == "draining"


def test_what_is_over_leaves_nothing() -> None:
    admission = with_sessions(5)
    for key in (*range(5), 99):
        admission.closed(key)
        admission.answered(key, 1.0)
        admission.asked(key, 1.0)
    assert (admission.sessions, admission.context_tokens) == (0, 0)
    assert (admission._seats, admission._pending) == ({}, {})
