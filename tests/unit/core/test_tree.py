"""DraftTree against a naive model that keeps whole paths, and its rules one by one."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_wanspec.core.tree import ROOT_ID, DraftTree, Node, NodeRecord
from vllm_wanspec.errors import RemoteProtocolError

VOCAB_SIZE = 5
CONTEXT = 10


def make_tree(max_nodes: int = 1000, vocab_size: int = 100) -> DraftTree:
    return DraftTree(CONTEXT, vocab_size=vocab_size, max_nodes=max_nodes)


def record(node: int, parent: int, token: int, logprob: float = -1.0, entropy: float = 1.0) -> NodeRecord:
    return NodeRecord(node, parent, token, logprob, entropy)


def chain(tree: DraftTree, tokens: list[int], parent: int = ROOT_ID, logprob: float = -1.0) -> list[int]:
    ids = []
    for token in tokens:
        parent_id = ids[-1] if ids else parent
        node = record(tree.last_id + 1, parent_id, token, logprob)
        tree.append([node])
        ids.append(node.id)
    return ids


def reachable(tree: DraftTree) -> dict[int, Node]:
    """Every node below the cursor, the cursor included, by walking."""
    found: dict[int, Node] = {}
    todo = [tree.cursor]
    while todo:
        node = todo.pop()
        assert node.id not in found
        found[node.id] = node
        todo.extend(node.children.values())
    return found


def check_consistent(tree: DraftTree) -> None:
    """What must hold at any time, whatever happened."""
    live = reachable(tree)
    assert live == tree._nodes
    assert tree.size == len(live) - 1
    assert tree.committed_length == tree.cursor.position + len(tree.pending)
    for node in live.values():
        assert node in tree
        assert all(child.position == node.position + 1 and child.token == t for t, child in node.children.items())
        best = max(node.children.values(), key=lambda child: child.logprob, default=None)
        assert (node.best is None) == (best is None)
        assert best is None or (node.best is not None and node.best.logprob == best.logprob)
    if tree.pending:
        assert tree.size == 0


class NaiveTree:
    """The same tree with no cleverness: every node ever sent with its whole path, and the list of committed tokens."""

    def __init__(self, max_nodes: int) -> None:
        self.committed: list[int] = []
        self.paths: dict[int, tuple[int, ...]] = {ROOT_ID: ()}
        self.logprobs: dict[int, float] = {ROOT_ID: 0.0}
        self.alive: set[int] = {ROOT_ID}
        self.max_nodes = max_nodes

    def possible(self, path: tuple[int, ...]) -> bool:
        """Whether a path neither contradicts what is committed nor ends before the cursor."""
        common = min(len(path), len(self.committed))
        return list(path[:common]) == self.committed[:common]

    @property
    def cursor(self) -> int:
        """The deepest live node on the committed path."""
        on_path = [n for n in self.alive if list(self.paths[n]) == self.committed[: len(self.paths[n])]]
        return max(on_path, key=lambda n: len(self.paths[n]))

    @property
    def pending(self) -> list[int]:
        return self.committed[len(self.paths[self.cursor]) :]

    def prune(self) -> None:
        cursor = self.cursor
        depth = len(self.paths[cursor])
        below = self.paths[cursor]
        self.alive = {n for n in self.alive if self.possible(self.paths[n]) and self.paths[n][:depth] == below}

    def append(self, new: NodeRecord) -> tuple[int, int, int]:
        path = (*self.paths[new.parent], new.token)
        self.paths[new.id] = path
        self.logprobs[new.id] = new.logprob
        if new.parent not in self.alive:
            return (0, 1, 0)
        if not self.possible(path):
            return (0, 1, int(not new.is_echo))
        late = bool(self.pending)
        self.alive.add(new.id)
        self.prune()
        return (0, 0, int(not new.is_echo)) if late else (1, 0, 0)

    def commit(self, tokens: list[int]) -> int:
        stayed = 0
        for token in tokens:
            known = not self.pending
            self.committed.append(token)
            self.prune()
            stayed += known and not self.pending
        return stayed

    @property
    def size(self) -> int:
        return len(self.alive) - 1

    def best_path(self, limit: int) -> list[int]:
        if self.pending:
            return []
        path = [self.cursor]
        while len(path) <= limit:
            here = self.paths[path[-1]]
            children = [n for n in self.alive if self.paths[n][:-1] == here and len(self.paths[n]) == len(here) + 1]
            if not children:
                break
            path.append(max(children, key=lambda n: (self.logprobs[n], -n)))
        return path[1:]


logprobs = st.sampled_from([-0.1, -0.5, -1.0, -3.0])
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 10), st.integers(0, VOCAB_SIZE - 1), logprobs, st.booleans()),
        st.tuples(st.just("extend"), st.integers(0, 3), st.integers(0, VOCAB_SIZE - 1), logprobs, st.booleans()),
        st.tuples(st.just("commit"), st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4)),
        st.tuples(st.just("follow"), st.integers(1, 4)),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(operations, st.integers(3, 30))
def test_tree_agrees_with_a_naive_model(script: list[tuple], max_nodes: int) -> None:
    tree = DraftTree(CONTEXT, vocab_size=VOCAB_SIZE, max_nodes=max_nodes)
    naive = NaiveTree(max_nodes)
    for operation in script:
        if operation[0] == "commit":
            assert tree.commit(operation[1]) == naive.commit(operation[1])
        elif operation[0] == "follow":
            tokens = [node.token for node in tree.best_path(operation[1])]
            assert tree.commit(tokens) == naive.commit(tokens) == len(tokens)
        else:
            _, choice, token, logprob, echo = operation
            if operation[0] == "append":
                parent = max(0, tree.last_id - choice)
            else:
                live = sorted(reachable(tree))
                parent = live[-1 - choice % len(live)]
            new = record(tree.last_id + 1, parent, token, 0.0 if echo else logprob, 0.0 if echo else 1.0)
            repeated = parent in naive.alive and any(
                naive.paths[n] == (*naive.paths[parent], token) for n in naive.alive
            )
            full = not naive.pending and parent in naive.alive and naive.size >= max_nodes
            if repeated or full:
                with pytest.raises(RemoteProtocolError):
                    tree.append([new])
                return
            assert _as_tuple(tree, new) == naive.append(new)
        check_consistent(tree)
        assert tree.size == naive.size <= max_nodes
        assert tree.cursor.id == naive.cursor
        assert list(tree.pending) == naive.pending
        assert tree.committed_length == CONTEXT + len(naive.committed)
        assert [node.id for node in tree.best_path(6)] == naive.best_path(6)
        assert set(tree._nodes) == naive.alive


def _as_tuple(tree: DraftTree, new: NodeRecord) -> tuple[int, int, int]:
    appended = tree.append([new])
    return appended.added, appended.stale, appended.late


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2, 40), st.integers(-2, 40), st.integers(-2, 8)), max_size=40),
    st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3), max_size=10),
)
def test_only_remote_protocol_errors_come_from_any_records(
    items: list[tuple[int, int, int]], commits: list[list[int]]
) -> None:
    tree = DraftTree(CONTEXT, vocab_size=VOCAB_SIZE, max_nodes=8)
    for index, (node, parent, token) in enumerate(items):
        with contextlib.suppress(RemoteProtocolError):
            tree.append([record(node, parent, token)])
        if index < len(commits):
            tree.commit(commits[index])
        check_consistent(tree)
        assert tree.size <= 8


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
    assert tree.commit([8]) == 1
    assert [n.token for n in tree.best_path(9)] == [9]
    assert tree.size == 1
    assert not tree.pending
    check_consistent(tree)


def test_commit_that_leaves_the_tree_drops_all_and_waits() -> None:
    tree = make_tree()
    ids = chain(tree, [1, 2, 3])
    assert tree.commit([1, 9, 4]) == 1
    assert list(tree.pending) == [9, 4]
    assert (tree.size, tree.committed_length, tree.cursor.id) == (0, CONTEXT + 3, ids[0])
    assert tree.best_path(8) == []


def test_late_drafts_that_agree_confirm_pending_commits() -> None:
    tree = make_tree()
    assert tree.commit([1, 2]) == 0
    appended = tree.append([record(1, 0, 1), record(2, 1, 2), record(3, 2, 3)])
    assert (appended.added, appended.stale, appended.late) == (1, 0, 2)
    assert [n.token for n in tree.best_path(8)] == [3]
    assert tree.cursor.id == 2
    assert not tree.pending


def test_children_of_the_cursor_that_contradict_a_pending_commit_are_dropped_at_once() -> None:
    tree = make_tree()
    tree.commit([1])
    appended = tree.append([record(1, 0, 5), record(2, 1, 6), record(3, 0, 1), record(4, 3, 2)])
    assert (appended.added, appended.stale, appended.late) == (1, 2, 1)
    assert [n.token for n in tree.best_path(8)] == [2]


@pytest.mark.parametrize("right", [0, 1, 2, None])
def test_alternatives_of_one_position_are_late_once(right: int | None) -> None:
    tree = make_tree()
    tree.commit([7, 8])
    tokens = [7 if index == right else 20 + index for index in range(3)]
    appended = tree.append(record(index + 1, 0, token) for index, token in enumerate(tokens))
    assert (appended.added, appended.late) == (0, 1)
    assert appended.stale == (3 if right is None else 2)
    assert list(tree.pending) == ([7, 8] if right is None else [8])


def test_echoes_confirm_without_being_counted_as_late() -> None:
    tree = make_tree()
    tree.commit([1, 2])
    appended = tree.append([record(1, 0, 1, 0.0, 0.0), record(2, 1, 2, 0.0, 0.0)])
    assert (appended.added, appended.stale, appended.late) == (0, 0, 0)
    assert not tree.pending


def test_nodes_below_something_pruned_are_stale_not_a_fault() -> None:
    tree = make_tree()
    tree.append([record(1, 0, 1), record(2, 0, 2)])
    tree.commit([2])
    appended = tree.append([record(3, 1, 3), record(4, 3, 4), record(5, 0, 9), record(6, 2, 5)])
    assert (appended.added, appended.stale, appended.late) == (1, 3, 0)


def test_a_commit_of_no_tokens_changes_nothing() -> None:
    tree = make_tree()
    chain(tree, [1, 2])
    assert tree.commit([]) == 0
    assert tree.size == 2


@pytest.mark.parametrize(
    ("bad", "fragment"),
    [
        (record(2, 0, 5), "does not rise"),
        (record(1, 0, 5), "does not rise"),
        (record(0, 0, 5), "does not rise"),
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
    tree.append([record(5, 0, 1)])
    tree.commit([9])
    tree.append([record(8, 5, 2)])
    assert tree.last_id == 8
    with pytest.raises(RemoteProtocolError, match="does not rise"):
        tree.append([record(8, 5, 3)])


def test_ids_may_leave_gaps() -> None:
    tree = make_tree()
    tree.append([record(10, 0, 1), record(1000, 10, 2)])
    assert [n.id for n in tree.best_path(5)] == [10, 1000]


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
    assert tree.size == 0
    check_consistent(tree)


def test_a_node_is_in_the_tree_only_while_it_is_live() -> None:
    tree = make_tree()
    tree.append([record(1, 0, 1), record(2, 0, 2)])
    first, second = (tree.cursor.children[token] for token in (1, 2))
    assert first in tree
    assert second in tree
    tree.commit([1])
    assert first in tree
    assert second not in tree
