"""Calibration: what it learns from commits, and the adaptive entropy threshold."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tree_checks import CONTEXT, make_tree, record

from vllm_wanspec.core.learned.calibration import (
    ADAPTIVE_DEFAULT_NATS,
    ASSUMED_AGREEMENT,
    ENTROPY_EDGES_NATS,
    MEMORY,
    MIN_OBSERVATIONS,
    OUTCOMES,
    PROBABILITY_EDGES,
    Calibration,
    entropy_range,
    entropy_ranges,
)

RANGES = len(PROBABILITY_EDGES) + 1


def saw(calibration: Calibration, bucket: int, taken: int, other: int) -> None:
    for index in range(taken + other):
        calibration.saw(bucket, index * taken // (taken + other) != (index + 1) * taken // (taken + other))


# Probabilities


def test_it_begins_by_believing_the_draft_model() -> None:
    calibration = Calibration()
    for best in (False, True):
        believed = [calibration.probability[calibration.bucket(math.log(p), best=best)] for p in (0.02, 0.35, 0.85)]
        assert believed == [pytest.approx(p, rel=0.3) for p in (0.02, 0.35, 0.85)]


@pytest.mark.parametrize(("taken", "other"), [(900, 100), (50, 950), (500, 500)])
def test_it_learns_how_often_the_target_takes_such_tokens(taken: int, other: int) -> None:
    calibration = Calibration()
    bucket = calibration.bucket(math.log(0.35), best=False)
    before = list(calibration.probability)
    saw(calibration, bucket, taken, other)
    assert calibration.probability[bucket] == pytest.approx(taken / 1000, abs=0.02)
    before[bucket] = calibration.probability[bucket]
    assert calibration.probability == before  # nothing of the other ranges


def test_the_most_probable_token_has_ranges_of_its_own() -> None:
    calibration = Calibration()
    best, other = (calibration.bucket(math.log(0.45), best=best) for best in (True, False))
    saw(calibration, best, 100, 0)
    assert calibration.probability[best] > 0.8
    assert calibration.probability[other] < 0.5


@pytest.mark.parametrize("best", [True, False])
def test_ranges_begin_at_their_edges(best: bool) -> None:
    calibration = Calibration()
    lowest = calibration.bucket(-3e38, best=best)
    at = [calibration.bucket(math.log(p), best=best) - lowest for p in PROBABILITY_EDGES]
    below = [calibration.bucket(math.log(p) - 1e-9, best=best) - lowest for p in PROBABILITY_EDGES]
    assert at == list(range(1, RANGES))
    assert below == list(range(RANGES - 1))
    assert calibration.bucket(0.0, best=best) - lowest == RANGES - 1


@given(st.lists(st.tuples(st.integers(0, 2 * RANGES - 1), st.booleans(), st.integers(1, 300)), max_size=30))
def test_no_probability_is_ever_0_or_1(script: list[tuple[int, bool, int]]) -> None:
    calibration = Calibration()
    for bucket, taken, count in script:
        for _ in range(count):
            calibration.saw(bucket, taken)
        assert all(0.0 < p < 1.0 for p in calibration.probability)


@pytest.mark.parametrize("taken", [True, False])
def test_not_even_after_very_many_of_one_kind(taken: bool) -> None:
    calibration = Calibration()
    for _ in range(30_000):
        calibration.saw(3, taken)
    assert calibration.probability[3] == (0.999 if taken else pytest.approx(0.0, abs=2e-4))
    assert calibration.probability[3] > 0.0


def test_its_memory_is_bounded_and_it_follows_a_change() -> None:
    calibration = Calibration()
    saw(calibration, 5, 9000, 1000)
    count = 0
    while calibration.probability[5] > 0.1:
        calibration.saw(5, False)
        count += 1
    assert count < 3 * MEMORY  # however long it was another way before
    saw(calibration, 5, 50_000, 50_000)
    assert calibration._seen[5] <= MEMORY
    assert calibration.probability[5] == pytest.approx(0.5, abs=0.02)


# Outcomes


def test_outcomes_are_counted_by_entropy() -> None:
    calibration = Calibration()
    for entropy, outcome in ((0.0, 0), (0.249, 1), (0.25, 2), (0.5, 3), (0.5, 3), (3.9, 0), (4.0, 1), (99.0, 2)):
        calibration.saw_outcome(entropy, outcome)
    rows = dict(zip(entropy_ranges(), calibration.outcomes, strict=True))
    assert rows["0-0.25"] == [1, 1, 0, 0]
    assert rows["0.25-0.5"] == [0, 0, 1, 0]
    assert rows["0.5-1"] == [0, 0, 0, 2]
    assert rows["3-4"] == [1, 0, 0, 0]
    assert rows["4-inf"] == [0, 1, 1, 0]
    assert sum(map(sum, calibration.outcomes)) == 8


def test_ranges_of_entropy_join_without_gaps() -> None:
    ranges = [entropy_range(index) for index in range(len(ENTROPY_EDGES_NATS) + 1)]
    assert ranges[0][0] == 0.0
    assert ranges[-1][1] == math.inf
    assert [high for _, high in ranges[:-1]] == [low for low, _ in ranges[1:]]


def test_agreement() -> None:
    calibration = Calibration()
    assert calibration.agreement() == ASSUMED_AGREEMENT
    for outcome in (0, 0, 0, 1, 2):
        calibration.saw_outcome(1.0, outcome)
    calibration.saw_outcome(0.1, 0)
    assert calibration.agreement() == pytest.approx(4 / 6)


# The adaptive threshold


def agreed(calibration: Calibration, entropy: float, of_100: int, hundreds: int = 1) -> None:
    for _ in range(hundreds):
        for index in range(100):
            calibration.saw_outcome(entropy, 0 if index < of_100 else 1 + index % 3)


def test_the_threshold_before_anything_is_known() -> None:
    calibration = Calibration()
    assert calibration.entropy_threshold_nats() == ADAPTIVE_DEFAULT_NATS
    for _ in range(MIN_OBSERVATIONS - 1):
        calibration.saw_outcome(0.0, 3)
    assert calibration.entropy_threshold_nats() == ADAPTIVE_DEFAULT_NATS
    calibration.saw_outcome(0.0, 3)
    assert calibration.entropy_threshold_nats() == 0.0


@pytest.mark.parametrize(
    ("agreement", "threshold"),
    [
        ({0.1: 100, 0.7: 99, 1.2: 80, 2.2: 50}, 1.0),
        ({0.1: 100, 0.7: 80, 1.2: 99}, 0.5),  # the lowest range decides
        ({0.1: 85}, 0.0),
        ({0.1: 91, 0.3: 90}, 0.25),
        ({0.1: 100, 5.0: 100}, math.inf),  # a draft model that is always right
        ({5.0: 10}, 4.0),
    ],
)
def test_the_threshold_is_where_the_target_often_takes_another(agreement: dict[float, int], threshold: float) -> None:
    calibration = Calibration()
    for entropy, of_100 in agreement.items():
        agreed(calibration, entropy, of_100)
    assert calibration.entropy_threshold_nats() == threshold


# What a tree teaches it


def four_ways() -> tuple:
    """A tree of one position: 1 is the most probable token, 2 has been extended, 3 is a leaf."""
    calibration = Calibration()
    tree = make_tree(calibration=calibration)
    tree.append([record(1, 0, 1, math.log(0.5), 1.2), record(2, 0, 2, math.log(0.25), 1.2)])
    tree.append([record(3, 0, 3, math.log(0.15), 1.2), record(4, 2, 7, math.log(0.8), 0.1)])
    return tree, calibration


@pytest.mark.parametrize(("token", "outcome"), [(1, "agreed"), (2, "branch"), (3, "leaf"), (9, "outside")])
def test_what_became_of_a_position(token: int, outcome: str) -> None:
    tree, calibration = four_ways()
    tree.commit([token])
    tree.prune()
    row = dict(zip(OUTCOMES, calibration.outcomes[list(entropy_ranges()).index("1-1.5")], strict=True))
    assert row == dict.fromkeys(OUTCOMES, 0) | {outcome: 1}
    assert sum(map(sum, calibration.outcomes)) == 1
    fresh = Calibration().probability
    changed = {index for index, p in enumerate(calibration.probability) if p != fresh[index]}
    assert changed == {calibration.bucket(math.log(p), best=p == 0.5) for p in (0.5, 0.25, 0.15)}
    up = {index for index in changed if calibration.probability[index] > fresh[index]}
    assert len(up) == (token != 9)  # the token that was taken, and no other


def test_positions_are_counted_once_however_late_they_are_pruned() -> None:
    tree, calibration = four_ways()
    tree.commit([2])
    tree.commit([7])
    for _ in range(3):
        tree.prune()
    assert Counter(map(sum, calibration.outcomes)) == Counter({0: 7, 1: 2})


def test_what_was_not_predicted_teaches_nothing() -> None:
    tree, calibration = four_ways()
    tree.commit([1, 5, 6])  # nothing was drafted below 1
    tree.catch_up(CONTEXT + 3)
    assert sum(map(sum, calibration.outcomes)) == 1


def test_it_finds_out_how_underconfident_a_draft_model_is() -> None:
    """The draft model says 0.45 where the target takes the token nine times out of ten."""
    rng = random.Random(5)
    calibration = Calibration()
    tree = make_tree(calibration=calibration)
    for _ in range(2000):
        first, parent = tree.last_id + 1, tree.cursor.id
        tree.append([record(first, parent, 1, math.log(0.45)), record(first + 1, parent, 2, math.log(0.35))])
        tree.commit([1 if rng.random() < 0.9 else 2])
    assert calibration.probability[calibration.bucket(math.log(0.45), best=True)] == pytest.approx(0.9, abs=0.03)
    assert calibration.probability[calibration.bucket(math.log(0.35), best=False)] == pytest.approx(0.1, abs=0.03)
    assert calibration.agreement() == pytest.approx(0.9, abs=0.03)
