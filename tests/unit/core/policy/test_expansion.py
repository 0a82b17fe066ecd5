"""Entropy from a distribution's head, the automatic lookahead, where to branch, and the order of candidates."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import limits
from tree_checks import CONTEXT, make_tree, reachable, record

from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.policy.expansion import (
    LOOKAHEAD_SLACK,
    Candidates,
    branching_tokens,
    entropy_nats,
    lookahead_tokens,
)
from vllm_wanspec.core.tree import DraftTree

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


# Where to branch

ALTERNATIVES = [(8, math.log(0.25)), (7, math.log(0.125)), (6, math.log(0.0625)), (5, math.log(0.01))]


@pytest.mark.parametrize(
    ("entropy", "settings", "expected"),
    [
        (1.0, {"max_branches": 4}, [8, 7, 6]),
        (1.0, {"max_branches": 99}, [8, 7, 6, 5]),
        (1.0, {"max_branches": 2}, [8]),
        (1.0, {"max_branches": 1}, []),
        (1.0, {"max_branches": 9, "entropy_threshold_nats": 1.0}, [8, 7, 6, 5]),
        (0.99, {"max_branches": 9, "entropy_threshold_nats": 1.0}, []),
        (99.0, {"max_branches": 9, "entropy_threshold_nats": math.inf}, []),
        (0.0, {"max_branches": 9, "entropy_threshold_nats": 0.0}, [8, 7, 6, 5]),
        (1.0, {"max_branches": 9, "min_probability": 0.0624}, [8, 7, 6]),
        (1.0, {"max_branches": 9, "min_probability": 0.0626}, [8, 7]),
        (1.0, {"max_branches": 9, "min_probability": 1.0}, []),
    ],
)
def test_which_alternatives_become_candidates(entropy: float, settings: dict, expected: list[int]) -> None:
    sent, candidates = branching_tokens(ALTERNATIVES, entropy, limits(**settings), Calibration())
    assert [token for token, _ in sent] == expected
    assert candidates == len(expected)
    assert sent == ALTERNATIVES[: len(expected)]


@pytest.mark.parametrize(
    ("entropy", "settings", "expected"),
    [
        (0.5, {"leaves": 1}, (0, 0)),
        (0.5, {"leaves": 3}, (2, 0)),
        (1.0, {"leaves": 3}, (2, 1)),
        (1.0, {"leaves": 3, "max_branches": 4}, (3, 3)),
        (1.0, {"leaves": 3, "max_branches": 4, "min_probability": 0.13}, (2, 1)),
        (1.0, {"leaves": 64}, (4, 1)),
    ],
)
def test_leaves_are_sent_of_every_position_and_not_followed(
    entropy: float, settings: dict, expected: tuple[int, int]
) -> None:
    bounds = limits(**{"max_branches": 2, "entropy_threshold_nats": 1.0, **settings})
    sent, candidates = branching_tokens(ALTERNATIVES, entropy, bounds, Calibration())
    assert (len(sent), candidates) == expected
    assert sent == ALTERNATIVES[: len(sent)]


def test_an_adaptive_threshold_is_the_calibration_s() -> None:
    calibration = Calibration()
    adaptive = limits(max_branches=4, entropy_threshold_nats=None)
    for _ in range(100):
        calibration.saw_outcome(0.3, 3)
    assert calibration.entropy_threshold_nats() == 0.25
    assert branching_tokens(ALTERNATIVES, 0.25, adaptive, calibration)[1]
    assert not branching_tokens(ALTERNATIVES, 0.24, adaptive, calibration)[1]
    fixed = limits(max_branches=4, entropy_threshold_nats=0.1)
    assert branching_tokens(ALTERNATIVES, 0.24, fixed, calibration)[1]


# Candidates


def leaves(tree: DraftTree, *ids: int, least: float = 0.0) -> Candidates:
    candidates = Candidates(least)
    for number in ids:
        candidates.add(reachable(tree)[number])
    return candidates


def uncertain_tree() -> DraftTree:
    """Leaves 4 (0.4 x 0.3), 2 (0.3) and 5 (0.4 x 0.08) beside the main line 1, 3."""
    tree = make_tree()
    tree.append([record(1, 0, 1, math.log(0.4)), record(2, 0, 4, math.log(0.3))])
    tree.append([record(3, 1, 2, math.log(0.5)), record(4, 1, 3, math.log(0.3)), record(5, 1, 5, math.log(0.08))])
    return tree


@pytest.mark.parametrize("order", [(2, 4, 5), (5, 4, 2), (4, 5, 2)])
def test_candidates_come_in_the_order_of_path_probability(order: tuple[int, ...]) -> None:
    tree = uncertain_tree()
    assert [node.id for node in leaves(tree, *order).take(tree, CONTEXT + 9)] == [2, 4, 5]


def test_what_is_not_taken_stays() -> None:
    tree = uncertain_tree()
    candidates = leaves(tree, 2, 4, 5)
    taking = candidates.take(tree, CONTEXT + 9)
    assert next(taking).id == 2
    taking.close()
    assert [node.id for node in candidates.take(tree, CONTEXT + 9)] == [4, 5]
    assert len(candidates) == 0


def test_leaves_that_are_too_far_wait_without_holding_up_the_others() -> None:
    tree = uncertain_tree()
    candidates = leaves(tree, 2, 4, 5)
    assert [node.id for node in candidates.take(tree, CONTEXT + 2)] == [2]
    assert [node.id for node in candidates.take(tree, CONTEXT + 1)] == []
    assert [node.id for node in candidates.take(tree, CONTEXT + 3)] == [4, 5]


def test_what_is_gone_extended_or_committed_is_no_candidate() -> None:
    tree = uncertain_tree()
    candidates = leaves(tree, 2, 4, 5)
    tree.append([record(6, 4, 1)])
    tree.commit([1])
    tree.prune()
    assert [node.id for node in candidates.take(tree, CONTEXT + 9)] == [5]
    tree.commit([5])
    candidates.add(tree.cursor)
    assert [node.id for node in candidates.take(tree, CONTEXT + 9)] == []


def test_improbable_paths_wait_for_commits() -> None:
    tree = make_tree()
    parent = 0
    for number in range(1, 8):
        tree.append([record(number, parent, number, math.log(0.45))])
        parent = number
    tree.append([record(8, 7, 8, math.log(0.5)), record(9, 7, 9, math.log(0.3))])
    candidates = leaves(tree, 9, least=0.01)
    assert math.exp(reachable(tree)[9].reach) < 0.005
    assert [node.id for node in candidates.take(tree, CONTEXT + 99)] == []
    tree.commit([1, 2, 3, 4])
    tree.prune()
    assert [node.id for node in candidates.take(tree, CONTEXT + 99)] == [9]


def test_forgetting_frees_what_was_dropped_and_keeps_the_order() -> None:
    tree = uncertain_tree()
    candidates = leaves(tree, 2, 4, 5)
    tree.commit([1])
    tree.prune()
    assert len(candidates) == 3
    candidates.forget(tree)
    assert len(candidates) == 2
    assert [node.id for node in candidates.take(tree, CONTEXT + 9)] == [4, 5]
