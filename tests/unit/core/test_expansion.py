"""Entropy from a distribution's head, the automatic lookahead, and the tip of the main line."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_wanspec.core.expansion import LOOKAHEAD_SLACK, entropy_nats, lookahead_tokens, main_line_tip
from vllm_wanspec.core.tree import DraftTree, NodeRecord

distributions = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=20).map(
    lambda weights: sorted((w / sum(weights) for w in weights), reverse=True)
)


def true_entropy(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities)


@given(distributions)
def test_entropy_of_a_whole_distribution_is_exact(probabilities: list[float]) -> None:
    assert entropy_nats(map(math.log, probabilities)) == pytest.approx(true_entropy(probabilities), abs=1e-9)


@given(distributions, st.integers(1, 20))
def test_entropy_of_the_head_is_a_lower_bound_that_grows_with_k(probabilities: list[float], k: int) -> None:
    estimates = [entropy_nats(map(math.log, probabilities[:n])) for n in range(1, len(probabilities) + 1)]
    assert all(0.0 <= estimate <= true_entropy(probabilities) + 1e-9 for estimate in estimates)
    assert all(a <= b + 1e-9 for a, b in pairwise(estimates))


def test_entropy_includes_the_tail() -> None:
    uniform = [math.log(1 / 64)] * 4
    assert entropy_nats(uniform) == pytest.approx(math.log(64))


def test_entropy_of_certainty_and_of_nothing() -> None:
    assert entropy_nats([0.0]) == 0.0
    assert entropy_nats([]) == 0.0


def test_entropy_is_never_negative_when_the_head_sums_above_one() -> None:
    assert entropy_nats([1e-7, -30.0]) >= 0.0


def test_entropy_takes_impossible_tokens_with_finite_log_probabilities() -> None:
    assert math.isfinite(entropy_nats([-0.0, -1000.0]))


@pytest.mark.parametrize(
    ("rtt_s", "step_s", "length", "expected"),
    [
        (0.0, 0.03, 8, 9 + 8),
        (0.02, 0.03, 8, 9 + 8),
        (0.03, 0.03, 8, 9 + 8),
        (0.031, 0.03, 8, 18 + 8),
        (0.1, 0.035, 4, 15 + 4),
        (0.1, 0.035, 1, 6 + 1),
    ],
)
def test_lookahead_covers_a_round_trip_of_lucky_steps(rtt_s: float, step_s: float, length: int, expected: int) -> None:
    assert lookahead_tokens(rtt_s, step_s, length) == expected + LOOKAHEAD_SLACK


def test_the_tip_follows_the_most_probable_children() -> None:
    tree = DraftTree(5, vocab_size=10, max_nodes=10)
    assert main_line_tip(tree) is tree.cursor
    tree.append([NodeRecord(1, 0, 1, -0.5, 1.0), NodeRecord(2, 0, 2, -2.0, 1.0), NodeRecord(3, 2, 3, -0.1, 1.0)])
    assert main_line_tip(tree).id == 1
    tree.commit([2])
    assert main_line_tip(tree).id == 3
