"""DraftTree's rules one by one; against a naive model in test_tree_model."""

import math

import pytest
from tree_checks import CONTEXT, chain, check_consistent, make_tree, reachable, record

from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.tree import Appended, Committed, DraftTree, NodeRecord, main_line_tip
from vllm_wanspec.errors import RemoteProtocolError


def test_new_tree_is_empty() -> None:
    tree = make_tree()
    assert (tree.size, tree.committed_length, tree.last_id, list(tree.pending)) == (0, CONTEXT, 0, [])
    assert tree.best_path(8) == []
    assert tree.cursor.position == CONTEXT


def test_best_path_takes_the_most_probable_child_each_time_and_obeys_the_limit() -> None:
    tree = make_tree()
    tree.append(
        [
            record(1, 0, 7, -2.0),
            record(2, 0, 8, -0.5),
            record(3, 2, 9, -1.0),
            record(4, 2, 6, -1.0),
            record(5, 1, 5, -0.001),
            record(6, 3, 4, -9.0),
        ]
    )
    assert [n.token for n in tree.best_path(9)] == [8, 9, 4]  # the first of equals
    assert [n.token for n in tree.best_path(2)] == [8, 9]
    assert tree.best_path(0) == []
    assert [n.position for n in tree.best_path(9)] == [CONTEXT + 1, CONTEXT + 2, CONTEXT + 3]


def test_commit_in_a_branch_re_roots_and_keeps_what_is_below() -> None:
    tree = make_tree()
    tree.append([record(1, 0, 7, -0.1), record(2, 0, 8, -3.0), record(3, 2, 9, -0.1), record(4, 1, 6, -0.1)])
    assert tree.commit([8]) == Committed(1, 0, True)
    assert [n.token for n in tree.best_path(9)] == [9]
    assert not tree.pending
    check_consistent(tree)
    assert tree.size == 1


def test_commit_that_leaves_the_tree_drops_all_and_waits() -> None:
    tree = make_tree()
    ids = chain(tree, [1, 2, 3])
    assert tree.commit([1, 9, 4]) == Committed(1, 1, True)
    tree.prune()
    assert list(tree.pending) == [9, 4]
    assert (tree.size, tree.committed_length, tree.cursor.id) == (0, CONTEXT + 3, ids[0])
    assert tree.best_path(8) == []


def test_late_drafts_that_agree_confirm_pending_commits() -> None:
    tree = make_tree()
    assert tree.commit([1, 2]) == Committed(0, 0, False)
    appended = tree.append([record(1, 0, 1), record(2, 1, 2), record(3, 2, 3)])
    assert (appended.added, appended.stale, appended.late, appended.late_hits) == (1, 0, 2, 2)
    assert [n.token for n in tree.best_path(8)] == [3]
    assert tree.cursor.id == 2
    assert not tree.pending


def test_children_of_the_cursor_that_contradict_a_pending_commit_are_dropped_at_once() -> None:
    tree = make_tree()
    tree.commit([1])
    appended = tree.append([record(1, 0, 5), record(2, 1, 6), record(3, 0, 1), record(4, 3, 2)])
    assert (appended.added, appended.stale, appended.late, appended.late_hits) == (1, 2, 1, 1)
    assert [n.token for n in tree.best_path(8)] == [2]


@pytest.mark.parametrize("right", [0, 1, 2, None])
def test_alternatives_of_one_position_are_late_once(right: int | None) -> None:
    tree = make_tree()
    tree.commit([7, 8])
    tokens = [7 if index == right else 20 + index for index in range(3)]
    appended = tree.append(record(index + 1, 0, token) for index, token in enumerate(tokens))
    assert (appended.added, appended.late, appended.late_hits) == (0, 1, int(right is not None))
    assert appended.stale == (3 if right is None else 2)
    assert list(tree.pending) == ([7, 8] if right is None else [8])


def test_what_left_the_tree_becomes_nodes_of_the_next_ids() -> None:
    tree = make_tree()
    chain(tree, [1, 5])
    tree.commit([1, 2, 3])
    tree.catch_up(CONTEXT + 1)  # the drafter does not know yet
    assert (tree.last_id, list(tree.pending)) == (2, [2, 3])
    tree.catch_up(CONTEXT + 2)
    assert (tree.last_id, tree.cursor.id, list(tree.pending), tree.size) == (3, 3, [3], 0)
    tree.catch_up(CONTEXT + 9)
    assert (tree.last_id, tree.cursor.id, list(tree.pending)) == (4, 4, [])
    assert tree.committed_length == CONTEXT + 3
    check_consistent(tree)
    assert tree.append([record(5, 4, 7), record(6, 3, 8)]) == Appended(1, 1, 0, 0)
    assert [node.token for node in tree.best_path(5)] == [7]


def test_nodes_below_something_pruned_are_stale_not_a_fault() -> None:
    tree = make_tree()
    tree.append([record(1, 0, 1), record(2, 0, 2)])
    tree.commit([2])
    appended = tree.append([record(3, 1, 3), record(4, 3, 4), record(5, 0, 9), record(6, 2, 5)])
    assert (appended.added, appended.stale, appended.late) == (1, 3, 0)


def test_a_commit_of_no_tokens_changes_nothing() -> None:
    tree = make_tree()
    chain(tree, [1, 2])
    assert tree.commit([]) == Committed(0, 0, False)
    assert tree.size == 2


@pytest.mark.parametrize(
    ("bad", "fragment"),
    [
        (record(2, 0, 5), "does not follow 2"),
        (record(1, 0, 5), "does not follow 2"),
        (record(0, 0, 5), "does not follow 2"),
        (record(4, 0, 5), "does not follow 2"),
        (record(3, 3, 5), "never sent"),
        (record(3, 9, 5), "never sent"),
        (record(3, -1, 5), "never sent"),
        (record(3, 2, 100), "outside 0..99"),
        (record(3, 2, -1), "outside 0..99"),
        (record(3, 0, 1), "repeats token 1"),
    ],
)
def test_records_that_no_correct_drafter_sends(bad: NodeRecord, fragment: str) -> None:
    tree = make_tree()
    tree.append([record(1, 0, 1), record(2, 1, 2)])
    with pytest.raises(RemoteProtocolError, match=fragment):
        tree.append([bad])
    check_consistent(tree)


def test_id_rules_hold_for_stale_nodes_too() -> None:
    tree = make_tree()
    tree.append([record(1, 0, 1)])
    tree.commit([9])
    tree.append([record(2, 1, 2)])
    assert tree.last_id == 2
    with pytest.raises(RemoteProtocolError, match="does not follow"):
        tree.append([record(2, 1, 3)])


def test_budget_counts_live_nodes_only() -> None:
    tree = make_tree(max_nodes=3)
    chain(tree, [1, 2, 3])
    with pytest.raises(RemoteProtocolError, match="over the budget of 3"):
        tree.append([record(4, 3, 4)])
    tree.commit([1])
    tree.append([record(5, 3, 4)])
    assert tree.size == 3


def test_memory_stays_bounded_over_a_long_session() -> None:
    tree = make_tree(max_nodes=16)
    for step in range(3000):
        parent = tree.cursor.id
        first = tree.last_id + 1
        tree.append([record(first, parent, step % 7, -0.1), record(first + 1, parent, 20, -2.0)])
        tree.append([record(first + 2, first, 30), record(first + 3, first + 1, 31)])
        tree.commit([step % 7 if step % 3 else 20])
        tree.commit([30 if step % 3 else 31])
        assert len(tree._nodes) <= 5
        check_consistent(tree)
        assert len(tree._nodes) == 1
    assert tree.last_id == 12000


def test_pending_is_as_long_as_what_was_committed_without_word_from_the_drafter() -> None:
    tree = make_tree()
    for _ in range(100):
        tree.commit([1, 2])
    assert len(tree.pending) == 200
    assert len(tree._nodes) == 1


def test_a_very_deep_tree_can_be_dropped() -> None:
    tree = make_tree(max_nodes=65536)
    tree.append(record(index, index - 1, index % 100) for index in range(1, 65537))
    assert len(tree.best_path(10**6)) == 65536
    tree.commit([99])
    check_consistent(tree)
    assert tree.size == 0


def test_a_node_is_in_the_tree_only_while_it_is_live() -> None:
    tree = make_tree()
    tree.append([record(1, 0, 1), record(2, 0, 2)])
    first, second = (tree.cursor.children[token] for token in (1, 2))
    assert first in tree
    assert second in tree
    tree.commit([1])
    tree.prune()
    assert first in tree
    assert second not in tree


# Pruning is late: a commit only moves the cursor


def test_a_commit_changes_what_is_drafted_at_once_and_the_next_append_frees_the_rest() -> None:
    tree = make_tree()
    tree.append([record(1, 0, 7, -0.1), record(2, 0, 8, -3.0), record(3, 2, 9, -0.1), record(4, 1, 6, -0.1)])
    tree.commit([8])
    assert [n.token for n in tree.best_path(9)] == [9]
    assert tree.draft(9)[0] == [9]
    assert tree.size == 4  # nothing is freed on the serving path
    assert tree.append([]) == Appended(0, 0, 0, 0)
    assert tree.size == 1


def test_nodes_below_what_waits_to_be_pruned_are_stale() -> None:
    tree = make_tree()
    tree.append([record(1, 0, 1), record(2, 0, 2)])
    tree.commit([2])
    assert tree.append([record(3, 1, 3), record(4, 2, 4)]) == Appended(1, 1, 0, 0)


def test_what_waits_to_be_pruned_takes_no_room() -> None:
    tree = make_tree(max_nodes=3)
    chain(tree, [1, 2, 3])
    tree.commit([1, 2, 3])
    assert tree.append([record(4, 3, 4), record(5, 4, 5), record(6, 5, 6)]) == Appended(3, 0, 0, 0)


def test_several_commits_before_one_pruning() -> None:
    tree = make_tree()
    ids = chain(tree, [1, 2, 3, 4, 5])
    tree.append([record(6, ids[2], 9, -3.0), record(7, 6, 8, -1.0)])
    assert [tree.commit([t]) for t in (1, 2)] == [Committed(1, 1, False)] * 2
    assert tree.commit([3, 9]) == Committed(2, 1, True)
    assert tree.commit([8, 50]) == Committed(1, 1, False)  # the tree ended there: nothing was missed
    assert tree.commit([51]) == Committed(0, 0, False)
    check_consistent(tree)
    assert (tree.cursor.id, list(tree.pending), tree.size) == (7, [50, 51], 0)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3], Committed(3, 3, False)),
        ([1, 2, 3, 4], Committed(3, 3, False)),
        ([1, 5], Committed(2, 1, True)),
        ([1, 5, 6], Committed(3, 1, True)),  # after a miss nothing counts as followed
        ([1, 9], Committed(1, 1, True)),
        ([9, 1], Committed(0, 0, True)),
    ],
)
def test_what_a_commit_says_of_itself(tokens: list[int], expected: Committed) -> None:
    tree = make_tree()
    tree.append([record(1, 0, 1), record(2, 1, 2), record(3, 2, 3), record(4, 1, 5, -3.0), record(5, 4, 6)])
    assert tree.commit(tokens) == expected


# How probable nodes are


def test_reach_is_the_calibrated_probability_of_the_path() -> None:
    calibration = Calibration()
    tree = make_tree(calibration=calibration)
    tree.append([record(1, 0, 1, math.log(0.5)), record(2, 1, 2, math.log(0.25)), record(3, 1, 3, math.log(0.02))])
    p = calibration.probability
    best, second, third = reachable(tree)[1], reachable(tree)[2], reachable(tree)[3]
    assert best.reach == pytest.approx(math.log(p[best.bucket]))
    assert second.reach == pytest.approx(math.log(p[best.bucket] * p[second.bucket]))
    assert third.reach < second.reach < best.reach < 0.0
    assert best.bucket != calibration.bucket(math.log(0.5), best=False)


def test_reach_compares_nodes_of_different_ages() -> None:
    tree = make_tree()
    tree.append([record(1, 0, 1, math.log(0.6)), record(2, 0, 2, math.log(0.05)), record(3, 1, 3, math.log(0.5))])
    tree.append([record(4, 3, 4, math.log(0.5)), record(5, 4, 5, math.log(0.5))])
    order = sorted(reachable(tree).values(), key=lambda node: -node.reach)
    assert [node.id for node in order] == [0, 1, 3, 4, 5, 2]
    tree.commit([1])
    tree.prune()
    assert [n.id for n in sorted(reachable(tree).values(), key=lambda node: -node.reach)] == [1, 3, 4, 5]


def test_an_echo_is_certain() -> None:
    tree = make_tree()
    tree.append([record(1, 0, 1, math.log(0.5))])
    tree.commit([9])
    tree.catch_up(CONTEXT + 1)
    assert (tree.cursor.id, tree.cursor.reach) == (2, 0.0)


def test_a_draft_ends_where_the_target_is_unlikely_to_follow() -> None:
    calibration = Calibration()
    tree = make_tree(calibration=calibration)
    chain(tree, [1, 2, 3, 4, 5], logprob=math.log(0.65))
    p = calibration.probability[calibration.bucket(math.log(0.65), best=True)]
    assert tree.draft(9) == ([1, 2, 3, 4, 5], pytest.approx(sum(p**n for n in range(1, 6))), pytest.approx(p**5))
    assert tree.draft(9, p**3 - 1e-9) == ([1, 2, 3], pytest.approx(p + p**2 + p**3), pytest.approx(p**3))
    assert tree.draft(9, p**3 + 1e-9)[0] == [1, 2]
    assert tree.draft(2)[0] == [1, 2]
    assert tree.draft(0) == ([], 0.0, 1.0)
    assert tree.draft(9, 1.0) == ([], 0.0, 1.0)
    tree.commit([9])
    assert tree.draft(9) == ([], 0.0, 1.0)


def test_the_tip_follows_the_most_probable_children() -> None:
    tree = DraftTree(5, vocab_size=10, max_nodes=10)
    assert main_line_tip(tree) is tree.cursor
    tree.append([NodeRecord(1, 0, 1, -0.5, 1.0), NodeRecord(2, 0, 2, -2.0, 1.0), NodeRecord(3, 2, 3, -0.1, 1.0)])
    assert main_line_tip(tree).id == 1
    tree.commit([2])
    assert main_line_tip(tree).id == 3
