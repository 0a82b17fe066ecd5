"""DraftTree against a naive model that keeps whole paths, under any records and commits."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_checks import CONTEXT, check_consistent, record

from vllm_wanspec.core.tree import ROOT_ID, Appended, Committed, DraftTree, NodeRecord
from vllm_wanspec.errors import RemoteProtocolError

VOCAB_SIZE = 5


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

    def append(self, new: NodeRecord) -> Appended:
        path = (*self.paths[new.parent], new.token)
        self.paths[new.id] = path
        self.logprobs[new.id] = new.logprob
        if new.parent not in self.alive:
            return Appended(0, 1, 0, 0)
        if not self.possible(path):
            return Appended(0, 1, 1, 0)
        late = bool(self.pending)
        self.alive.add(new.id)
        self.prune()
        return Appended(0, 0, 1, 1) if late else Appended(1, 0, 0, 0)

    def catch_up(self, length: int, first: int) -> int:
        """Nodes for pending tokens, from the id ``first`` on; the next id."""
        while self.pending and CONTEXT + len(self.paths[self.cursor]) < length:
            path = (*self.paths[self.cursor], self.pending[0])
            self.paths[first], self.logprobs[first] = path, 0.0
            self.alive.add(first)
            self.prune()
            first += 1
        return first

    def commit(self, tokens: list[int]) -> Committed:
        stayed = followed = 0
        missed = False
        for token in tokens:
            known = not self.pending
            best = [self.paths[n][-1] for n in self.best_path(1)]
            followed += best == [token] and not missed
            missed = missed or bool(best and best != [token])
            self.committed.append(token)
            self.prune()
            stayed += known and not self.pending
        return Committed(stayed, followed, missed)

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
        st.tuples(st.just("append"), st.integers(0, 10), st.integers(0, VOCAB_SIZE - 1), logprobs),
        st.tuples(st.just("extend"), st.integers(0, 3), st.integers(0, VOCAB_SIZE - 1), logprobs),
        st.tuples(st.just("commit"), st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4)),
        st.tuples(st.just("follow"), st.integers(1, 4)),
        st.tuples(st.just("catch up"), st.integers(0, 3)),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(operations, st.integers(3, 30), st.integers(1, 5))
def test_tree_agrees_with_a_naive_model(script: list[tuple], max_nodes: int, prune_every: int) -> None:
    tree = DraftTree(CONTEXT, vocab_size=VOCAB_SIZE, max_nodes=max_nodes)
    naive = NaiveTree(max_nodes)
    for number, operation in enumerate(script):
        if operation[0] == "commit":
            assert tree.commit(operation[1]) == naive.commit(operation[1])
        elif operation[0] == "follow":
            tokens = [node.token for node in tree.best_path(operation[1])]
            assert tree.commit(tokens) == naive.commit(tokens) == Committed(len(tokens), len(tokens), False)
        elif operation[0] == "catch up":
            length = tree.committed_length - operation[1]
            tree.catch_up(length)
            assert tree.last_id + 1 == naive.catch_up(length, max(naive.paths) + 1)
        else:
            _, choice, token, logprob = operation
            if operation[0] == "append":
                parent = max(0, tree.last_id - choice)
            else:
                parent = sorted(naive.alive)[-1 - choice % len(naive.alive)]
            new = record(tree.last_id + 1, parent, token, logprob)
            repeated = parent in naive.alive and any(
                naive.paths[n] == (*naive.paths[parent], token) for n in naive.alive
            )
            full = not naive.pending and parent in naive.alive and naive.size >= max_nodes
            if repeated or full:
                with pytest.raises(RemoteProtocolError):
                    tree.append([new])
                return
            assert tree.append([new]) == naive.append(new)
        assert tree.cursor.id == naive.cursor
        assert list(tree.pending) == naive.pending
        assert tree.committed_length == CONTEXT + len(naive.committed)
        assert [node.id for node in tree.best_path(6)] == naive.best_path(6)
        assert tree.draft(6)[0] == [naive.paths[n][-1] for n in naive.best_path(6)]
        if number % prune_every == 0:
            check_consistent(tree)
            assert tree.size == naive.size <= max_nodes
            assert set(tree._nodes) == naive.alive


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
