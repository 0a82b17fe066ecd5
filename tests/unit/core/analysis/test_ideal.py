"""The ideal drafter, against times worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from vllm_wanspec.core.analysis.ideal import ideal_decode_ms

AGREE: Sequence[int | None] = (0,) * 9


def ideal(ranks: Sequence[int | None], **changes: Any) -> float:
    """Forwards of 30 ms on the target's side, 5 ms on the drafter's, none of them longer for more tokens."""
    times: dict[str, Any] = {"rtt_ms": 20.0, "target_ms": lambda tokens: 30.0, "draft_ms": lambda tokens: 5.0}
    return ideal_decode_ms(ranks, 10, **(times | {"limit": 4} | changes))


def test_a_text_of_one_token_takes_no_time() -> None:
    assert ideal(AGREE[:1]) == 0.0


def test_a_drafter_that_is_always_right_and_early_fills_every_step() -> None:
    # Token i is drafted at -15 + 5 i ms and arrives 10 ms later: token 1 alone in time for the first step.
    assert ideal(AGREE[:2]) == 30.0
    assert ideal(AGREE[:3]) == 30.0
    # The second step begins at 30 ms, when tokens up to 7 have arrived: four of them and one more.
    assert ideal(AGREE[:4]) == ideal(AGREE[:8]) == 60.0
    assert ideal(AGREE) == 90.0


def test_a_token_outside_the_tree_costs_a_round_trip_of_drafting() -> None:
    # The first step verifies the wrong token 1 and corrects it at 30 ms; the drafter knows at 40 ms, has drafted at
    # 45 ms, and the draft arrives at 55 ms: the step at 30 ms is without, the one at 60 ms has tokens 3 and 4 at hand.
    assert ideal((0, None, 0, 0, 0)) == 90.0


def test_a_token_among_the_best_eight_was_extended_before_it_was_committed() -> None:
    # As above, but token 2 was drafted at -5 ms: the step at 30 ms verifies tokens 2 to 4.
    assert ideal((0, 3, 0, 0, 0)) == 60.0


def test_what_follows_a_wrong_token_is_verified_in_vain() -> None:
    per_token = {"target_ms": lambda tokens: 30.0 + tokens}
    # With R = 22 ms token 1 was drafted at -19 ms and its wrong successor at -14 ms, in time for the step at 0; with
    # R = 2 ms more of them are there than a step takes.
    assert ideal((0, 1), rtt_ms=22.0, **per_token) == 33.0
    assert ideal((0, 1), rtt_ms=2.0, **per_token) == 35.0
    assert ideal((0, 0), rtt_ms=2.0, **per_token) == 32.0  # the text is at its end


@pytest.mark.parametrize("rtt_ms", [0.0, 10.0, 50.0, 500.0])
def test_it_never_takes_longer_than_decoding_alone(rtt_ms: float) -> None:
    hopeless = (None,) * 20
    assert ideal(hopeless, rtt_ms=rtt_ms) == 19 * 30.0
    assert ideal((0, 1, None, 0) * 5, rtt_ms=rtt_ms) <= 19 * 30.0


def test_the_farther_the_slower() -> None:
    ranks = (0, 0, None, 1, 0, 2, 0, None) * 6
    times = [ideal(ranks, rtt_ms=rtt_ms) for rtt_ms in (0.0, 20.0, 60.0, 200.0)]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_times_scale_alike() -> None:
    ranks = (0, None, 0, None, 1) * 6
    scaled = ideal(ranks, rtt_ms=30.0, target_ms=lambda tokens: 45.0, draft_ms=lambda tokens: 7.5)
    assert scaled == pytest.approx(1.5 * ideal(ranks))
