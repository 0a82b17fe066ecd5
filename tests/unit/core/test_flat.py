"""FlatTree against DraftTree, the plain form of its rules, under any script; its words against its draft."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_checks import CONTEXT, record

from vllm_wanspec.core import flat
from vllm_wanspec.core.block import BLOCK_NODES, MAX_FOLLOWED, Publication, parts, walk
from vllm_wanspec.core.flat import FlatTree
from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.tree import DraftTree, NodeRecord, main_line_tip
from vllm_wanspec.core.words import Guess, TreeWords
from vllm_wanspec.errors import RemoteProtocolError

VOCAB_SIZE = 5
LIMIT = 6


class Both:
    """The same records and commits for both trees, and what must be the same then."""

    def __init__(self, max_nodes: int = 100, vocab_size: int = VOCAB_SIZE) -> None:
        self.learned, self.plain_learned = Calibration(), Calibration()
        self.tree = FlatTree(CONTEXT, vocab_size=vocab_size, max_nodes=max_nodes, calibration=self.learned)
        self.plain = DraftTree(CONTEXT, vocab_size=vocab_size, max_nodes=max_nodes, calibration=self.plain_learned)
        self.context = [0] * CONTEXT

    def append(self, records: list[NodeRecord]) -> bool:
        """Append to both; whether the records were those of a correct drafter."""
        try:
            expected = self.plain.append(records)
        except RemoteProtocolError as error:
            with pytest.raises(RemoteProtocolError) as caught:
                self.tree.append(records)
            assert str(caught.value) == str(error)
            return False
        assert self.tree.append(records) == expected
        self.check()
        return True

    def commit(self, tokens: list[int]) -> None:
        assert self.tree.commit(tokens) == self.plain.commit(tokens)
        self.context.extend(tokens)
        self.check()

    def catch_up(self, length: int) -> None:
        self.tree.catch_up(length)
        self.plain.catch_up(length)
        self.check()

    def prune(self) -> None:
        self.tree.prune()
        self.plain.prune()
        self.check()

    def check(self) -> None:
        tree, plain = self.tree, self.plain
        assert list(tree.pending) == list(plain.pending)
        assert tree.committed_length == plain.committed_length == len(self.context)
        assert (tree.last_id, tree.cursor_id, tree.size) == (plain.last_id, plain.cursor.id, plain.size)
        tip = plain.cursor if plain.pending else main_line_tip(plain)
        assert tree.line == (tip.id, tip.position - plain.cursor.position)
        assert tree.path[tree.at :] == [node.token for node in plain.best_path(1000)]
        assert [tree._ids[node] for node in tree.best_path(LIMIT)] == [node.id for node in plain.best_path(LIMIT)]
        for least in (0.0, 0.3):
            tokens, *chances = plain.draft(LIMIT, least)
            assert tree.draft(LIMIT, least)[:3] == (tokens, *map(pytest.approx, chances))
        for last_id in range(max(0, tree.cursor_id), tree.last_id + 1, 3):
            path = [node.token for node in plain.best_path(LIMIT)]
            assert tree.drafted_until(last_id, path) == plain.drafted_until(last_id, LIMIT)
        below = [(node.token, node.logprob, node is plain.cursor.best) for node in plain.cursor.children.values()]
        assert [entry[1:] for entry in tree.below()] == below
        assert self.learned.outcomes == self.plain_learned.outcomes
        assert self.learned.probability == self.plain_learned.probability
        assert {number: tree._reaches[node] - tree._reaches[tree.cursor] for number, node in tree._index.items()} == (
            pytest.approx({number: node.reach - plain.cursor.reach for number, node in plain._nodes.items()}, abs=1e-9)
        )


@pytest.fixture(params=[0, 256])
def least_dead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Columns that are made anew all the time, and hardly ever."""
    monkeypatch.setattr(flat, "_LEAST_DEAD", request.param)
    return request.param


logprobs = st.sampled_from([-0.1, -0.5, -1.0, -3.0])
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 10), st.integers(0, VOCAB_SIZE - 1), logprobs),
        st.tuples(st.just("extend"), st.integers(0, 3), st.integers(0, VOCAB_SIZE - 1), logprobs),
        st.tuples(st.just("commit"), st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4)),
        st.tuples(st.just("follow"), st.integers(1, 4)),
        st.tuples(st.just("catch up"), st.integers(0, 3)),
        st.tuples(st.just("prune")),
    ),
    max_size=60,
)


def play(both: Both, script: list[tuple], batch: int) -> Iterator[None]:
    """Play a script in messages of ``batch`` nodes; a step after each."""
    waiting: list[NodeRecord] = []
    for operation in script:
        if operation[0] in ("append", "extend"):
            _, choice, token, logprob = operation
            last = both.plain.last_id + len(waiting)
            if operation[0] == "append":
                parent = max(0, last - choice)
            else:
                live = sorted(both.plain._nodes)
                parent = live[-1 - choice % len(live)]
            waiting.append(record(last + 1, parent, token, logprob))
            if len(waiting) < batch:
                continue
        if waiting:
            if not both.append(waiting):
                return
            waiting = []
            yield
        if operation[0] == "commit":
            both.commit(operation[1])
        elif operation[0] == "follow":
            both.commit([node.token for node in both.plain.best_path(operation[1])])
        elif operation[0] == "catch up":
            both.catch_up(both.plain.committed_length - operation[1])
        elif operation[0] == "prune":
            both.prune()
        yield


@pytest.mark.usefixtures("least_dead")
def test_it_agrees_with_the_plain_tree() -> None:
    @settings(max_examples=300, deadline=None)
    @given(operations, st.integers(3, 30), st.integers(1, 5))
    def check(script: list[tuple], max_nodes: int, batch: int) -> None:
        for _ in play(Both(max_nodes), script, batch):
            pass

    check()


@pytest.mark.usefixtures("least_dead")
def test_only_remote_protocol_errors_come_from_any_records() -> None:
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(-2, 40), st.integers(-2, 40), st.integers(-2, 8)), max_size=40),
        st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3), max_size=10),
    )
    def check(items: list[tuple[int, int, int]], commits: list[list[int]]) -> None:
        both = Both(max_nodes=8)
        for index, (node, parent, token) in enumerate(items):
            both.append([record(node, parent, token)])
            if index < len(commits):
                both.commit(commits[index])
            assert both.tree.size <= 8 + len(both.tree._walked)

    check()


def test_columns_do_not_grow_for_ever() -> None:
    both = Both(max_nodes=64, vocab_size=1000)
    rng = random.Random(0)
    for _ in range(400):
        tip = both.tree.line[0]
        number = both.tree.last_id
        records = [record(number + 1, tip, rng.randrange(1000), -0.2)]
        records += [record(number + 2 + i, tip, 1000 - 1 - i, -2.0) for i in range(3)]
        with contextlib.suppress(RemoteProtocolError):
            both.append(records)
        both.commit([both.tree._tokens[node] for node in both.tree.best_path(1)] or [1])
    assert both.tree.version > 2
    assert len(both.tree._ids) < 64 + 2 * 64 + 300
    assert len(both.tree._children) < 500


# The words of a tree


class Published:
    """A tree's block in a slot, as a device finds it."""

    def __init__(self, tree: FlatTree) -> None:
        self.headers, self.words = np.zeros(2, np.int64), np.zeros((2, 2, BLOCK_NODES), np.int64)
        self.publication = Publication(self.headers, self.words)
        self.tree_words = TreeWords(tree)
        self.publish()

    def publish(self, guess: list[int] | None = None) -> None:
        after = self.tree_words.tree.line[0]
        words = self.tree_words.current(None if guess is None else Guess(after, guess, 3))
        self.publication.publish(1, self.tree_words.root, words)

    def walk(self, context: list[int], limit: int = LIMIT, vocab_size: int = VOCAB_SIZE) -> tuple[list[int], int]:
        header = int(self.headers[1])
        words = self.words[1, header & 1].tolist()
        return walk(header, words, context, len(context), limit, vocab_size)


@pytest.mark.usefixtures("least_dead")
@pytest.mark.parametrize("publish_every", [1, 3])
def test_a_walk_finds_the_trees_draft_also_where_the_block_is_behind_the_commits(publish_every: int) -> None:
    found = 0

    @settings(max_examples=300, deadline=None)
    @given(operations, st.integers(1, 5))
    def check(script: list[tuple], batch: int) -> None:
        nonlocal found
        both = Both()
        published = Published(both.tree)
        nodes = both.tree.last_id
        for number, _ in enumerate(play(both, script, batch)):
            if both.tree.last_id != nodes or number % publish_every == 0:
                published.publish()
                nodes = both.tree.last_id
            draft = both.tree.draft(LIMIT)[0]
            assert published.walk(both.context) == (draft, 0)
            found += len(draft)

    check()
    assert found > 100


def test_a_tree_that_is_too_large_is_published_by_probability() -> None:
    both = Both(max_nodes=1000, vocab_size=1000)
    records, number = [], 0
    for depth in range(100):  # a main line, and an alternative of each of its tokens that goes on for three more
        parent = 4 * depth - 3 if depth else 0
        records.append(record(number + 1, parent, depth, -0.05, 1.0))
        records.append(record(number + 2, parent, 500 + depth, -3.5, 1.0))
        records += [record(number + 3 + i, number + 2 + i, 700 + i, -0.05, 1.0) for i in range(2)]
        number += 4
    assert both.append(records)
    published = Published(both.tree)
    assert published.walk(both.context, 60, 1000)[0] == list(range(60))
    words = [parts(int(value)) for value in published.words[1, published.headers[1] & 1]]
    assert len(words) == BLOCK_NODES
    reach = sorted(-reach for reach in both.tree._reaches[1:])[BLOCK_NODES]
    assert min(node.survival for node in words) >= 255 - 16 * reach - 1
    # What was left out comes in once the text has gone on.
    both.commit(list(range(40)))
    published.publish()
    assert published.walk(both.context, 60, 1000)[0] == list(range(40, 100))


def test_a_guess_follows_the_draft_and_gives_way_to_it() -> None:
    both = Both()
    assert both.append([record(1, 0, 3, -0.1), record(2, 1, 4, -0.1)])
    published = Published(both.tree)
    published.publish([2, 1])
    assert published.walk(both.context) == ([3, 4, 2, 1], 2)
    assert published.walk([*both.context, 3, 4, 2]) == ([1], 1)
    assert both.append([record(3, 2, 2, -0.1), record(4, 3, 0, -0.1)])
    published.publish()
    assert published.walk(both.context) == ([3, 4, 2, 0], 0)
    both.commit([1])  # which leaves the tree: what was guessed comes behind what is pending
    published.publish([4, 4])
    assert published.walk(both.context) == ([4, 4], 2)
    assert published.walk(both.context[:-1]) == ([1, 4, 4], 3)


def test_a_root_that_is_far_back_is_not_followed() -> None:
    both = Both(vocab_size=1000)
    assert both.append([record(i + 1, i, i, -0.1) for i in range(MAX_FOLLOWED + 8)])
    published = Published(both.tree)
    context = [*both.context, *range(MAX_FOLLOWED)]
    assert published.walk(context, 3, 1000)[0] == [MAX_FOLLOWED, MAX_FOLLOWED + 1, MAX_FOLLOWED + 2]
    assert published.walk([*context, MAX_FOLLOWED], 3, 1000)[0] == []
    both.commit(list(range(MAX_FOLLOWED + 1)))
    published.publish()
    assert published.walk(both.context, 3, 1000)[0] == [MAX_FOLLOWED + 1, MAX_FOLLOWED + 2, MAX_FOLLOWED + 3]


def test_what_a_device_cannot_hold_is_left_out() -> None:
    both = Both(vocab_size=2**30)
    assert both.append([record(1, 0, 2**24, -0.1), record(2, 1, 7, -0.1), record(3, 0, 2**24 - 1, -3.0)])
    published = Published(both.tree)
    assert published.walk(both.context, vocab_size=2**30)[0] == []
    assert published.walk([*both.context, 2**24 - 1], vocab_size=2**30)[0] == []


def test_survival_is_the_chance_of_the_path() -> None:
    both = Both()
    assert both.append([record(1, 0, 3, -0.1), record(2, 1, 4, -0.7), record(3, 0, 2, -3.0)])
    published = Published(both.tree)
    nodes = [parts(int(value)) for value in published.words[1, published.headers[1] & 1, :3]]
    first, second = (both.learned.probability[both.tree._buckets[node]] for node in (1, 2))
    assert [math.exp((node.survival - 255) / 16) for node in nodes[:2]] == pytest.approx(
        [first, first * second], rel=0.05
    )
    assert [node.best for node in nodes] == [True, True, False]
