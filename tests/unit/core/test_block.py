"""Words, headers, and what the writer of blocks puts where."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_wanspec.core.block import (
    BEST,
    BLOCK_NODES,
    GENERATIONS,
    LEVELS_PER_NAT,
    LOOKED_UP,
    MAX_FOLLOWED,
    MAX_ROOT,
    MAX_TOKEN,
    UNDER_ROOT,
    Header,
    Node,
    Publication,
    Walked,
    header_parts,
    parts,
    survival_level,
    walk,
    word,
)

SLOTS = 3


class Blocks:
    """A publication and its memory, which is zero in the beginning."""

    def __init__(self) -> None:
        self.headers = np.zeros(SLOTS, np.int64)
        self.words = np.zeros((SLOTS, 2, BLOCK_NODES), np.int64)
        self.publication = Publication(self.headers, self.words)

    def header(self, slot: int) -> Header:
        return header_parts(int(self.headers[slot]))

    def nodes(self, slot: int) -> list[Node]:
        header = self.header(slot)
        return [parts(int(value)) for value in self.words[slot, header.which, : header.nodes]]

    def walk(self, slot: int) -> Walked:
        """The draft for an empty context."""
        return walk(int(self.headers[slot]), self.words[slot, self.header(slot).which].tolist(), [], 0, 4, 10)


@given(st.integers(0, 255), st.integers(0, MAX_TOKEN), st.integers(0, 255), st.booleans(), st.booleans())
def test_a_word_has_its_parts_whatever_the_generation(
    parent: int, token: int, survival: int, best: bool, looked_up: bool
) -> None:
    made = word(parent, token, survival, best * BEST | looked_up * LOOKED_UP)
    assert made & (GENERATIONS - 1) == 0
    for generation in (0, 1, GENERATIONS - 1):
        assert parts(made | generation) == (generation, parent, token, survival, best, looked_up)
    assert np.int64(made) == made  # no sign


def test_survival_levels_fall_with_the_chance() -> None:
    assert survival_level(0.0) == 255
    assert survival_level(1e9) == 1
    levels = [survival_level(nats / 10) for nats in range(200)]
    assert levels == sorted(levels, reverse=True)
    for nats in (0.1, 1.0, 7.5):
        assert (255 - survival_level(nats)) / LEVELS_PER_NAT == pytest.approx(nats, abs=0.5 / LEVELS_PER_NAT + 1e-9)


def test_a_publication_is_found_by_its_header() -> None:
    blocks = Blocks()
    made = array("q", [word(UNDER_ROOT, 7, 200, BEST), word(0, MAX_TOKEN, 9, LOOKED_UP)])
    blocks.publication.publish(1, MAX_ROOT, made)
    header = blocks.header(1)
    assert (header.nodes, header.root) == (2, MAX_ROOT)
    assert blocks.nodes(1) == [
        (header.generation, UNDER_ROOT, 7, 200, True, False),
        (header.generation, 0, MAX_TOKEN, 9, False, True),
    ]
    assert made == array("q", [word(UNDER_ROOT, 7, 200, BEST), word(0, MAX_TOKEN, 9, LOOKED_UP)])
    assert not blocks.headers[[0, 2]].any()
    assert not blocks.words[[0, 2]].any()


def test_the_block_in_use_is_not_written() -> None:
    blocks = Blocks()
    for number in range(5):
        before, in_use = blocks.words.copy(), blocks.header(0).which
        blocks.publication.publish(0, 1, array("q", [word(UNDER_ROOT, number, 1)] * (5 - number)))
        assert (blocks.words[0, in_use] == before[0, in_use]).all()
        assert blocks.header(0).which == 1 - in_use


def test_a_whole_block_can_be_published_and_no_more() -> None:
    blocks = Blocks()
    full = array("q", [word(UNDER_ROOT, token, 1) for token in range(BLOCK_NODES)])
    blocks.publication.publish(0, 5, full)
    assert [node.token for node in blocks.nodes(0)] == list(range(BLOCK_NODES))
    before = blocks.headers.copy(), blocks.words.copy()
    with pytest.raises(ValueError, match="129 words are more than the 128 of a block"):
        blocks.publication.publish(0, 6, array("q", [*full, 0]))
    assert (blocks.headers == before[0]).all()
    assert (blocks.words == before[1]).all()
    in_use = blocks.header(0).which
    blocks.publication.publish(0, 7, full)
    assert blocks.header(0).which == 1 - in_use


def test_generations_wrap_and_are_never_that_of_unwritten_memory() -> None:
    blocks = Blocks()
    one = array("q", [word(UNDER_ROOT, 7, 1)])
    seen = []
    for _ in range(GENERATIONS + 2):
        blocks.publication.publish(2, 1, one)
        seen.append(int(blocks.headers[2]) >> 1 & 0xFFFF)
    assert seen == [*range(1, GENERATIONS), 1, 2, 3]
    assert blocks.nodes(2)[0].generation == 3
    assert not (blocks.words[2, :, 0] & 0xFFFF == 0).any()


def test_a_slot_that_is_cleared_has_nothing() -> None:
    blocks = Blocks()
    blocks.publication.publish(1, 0, array("q", [word(UNDER_ROOT, 7, 1, BEST)]))
    assert blocks.walk(1) == ([7], 0)
    blocks.publication.clear(1)
    assert blocks.header(1).nodes == 0
    assert blocks.walk(1) == ([], 0)
    blocks.publication.publish(1, 0, array("q", [word(UNDER_ROOT, 8, 1, BEST | LOOKED_UP)]))
    assert blocks.walk(1) == ([8], 1)


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        (np.zeros(2, np.int32), np.zeros((2, 2, BLOCK_NODES), np.int64)),
        (np.zeros(2, np.int64), np.zeros((2, 2, BLOCK_NODES), np.uint64)),
        (np.zeros(2, np.int64), np.zeros((2, 1, BLOCK_NODES), np.int64)),
        (np.zeros(2, np.int64), np.zeros((3, 2, BLOCK_NODES), np.int64)),
    ],
)
def test_arrays_of_other_shapes_are_refused(headers: np.ndarray, words: np.ndarray) -> None:
    with pytest.raises(ValueError, match="are not"):
        Publication(headers, words)


# The reference walk, where no publication is needed to say what it must find


def found(
    nodes: list[int], context: list[int], root: int = 0, limit: int = 8, vocab_size: int = 100, count: int = 0
) -> list[int]:
    header = 1 << 1 | (count or len(nodes)) << 17 | root << 25
    block = [node | 1 for node in nodes] + [0] * (BLOCK_NODES - len(nodes))
    return walk(header, block, context, len(context), limit, vocab_size).tokens


def test_a_walk_goes_along_the_context_and_then_down() -> None:
    nodes = [word(UNDER_ROOT, 5, 1), word(UNDER_ROOT, 6, 1, BEST), word(0, 7, 1, BEST), word(2, 8, 1, BEST)]
    assert found(nodes, [1, 2], 2) == [6]
    assert found(nodes, [1, 2, 5], 2) == [7, 8]
    assert found(nodes, [1, 2, 5], 2, limit=1) == [7]
    assert found(nodes, [1, 2, 5, 7, 8], 2) == []
    assert found(nodes, [1, 2, 9], 2) == []
    assert found(nodes, [1], 2) == []
    assert found(nodes, [1, 2], 2, count=129) == []


def test_no_id_outside_the_vocabulary_is_handed_out() -> None:
    nodes = [word(UNDER_ROOT, 5, 1, BEST), word(0, 7, 1, BEST), word(1, 6, 1, BEST)]
    assert found(nodes, [], vocab_size=7) == [5]
    assert found(nodes, [5, 7], vocab_size=7) == [6]


def test_words_that_go_round_lead_nowhere() -> None:
    assert found([word(1, 5, 1, BEST), word(0, 6, 1, BEST)], []) == []
    assert found([word(UNDER_ROOT, 5, 1, BEST), word(1, 6, 1, BEST), word(200, 7, 1, BEST)], []) == [5]


def test_a_root_is_followed_for_so_many_tokens_and_no_more() -> None:
    nodes = [word(index - 1 if index else UNDER_ROOT, index, 1, BEST) for index in range(MAX_FOLLOWED + 3)]
    assert found(nodes, list(range(MAX_FOLLOWED))) == [MAX_FOLLOWED, MAX_FOLLOWED + 1, MAX_FOLLOWED + 2]
    assert found(nodes, list(range(MAX_FOLLOWED + 1))) == []
