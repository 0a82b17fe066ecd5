"""The protocol of publications, in every state that one writer and one reader can come to; see `publication_model`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
from publication_model import Found, Search, Tree, record

from vllm_wanspec.core.block import (
    BEST,
    GENERATIONS,
    LOOKED_UP,
    UNDER_ROOT,
    Publication,
    header_parts,
    parts,
    walk,
    word,
)

VOCAB_SIZE = 10
LIMIT = 8
BEFORE = GENERATIONS - 4
"""So many publications came before, so that generations wrap within the script."""


def tree(root: int, *nodes: tuple[int, int, int]) -> Tree:
    """A root, and nodes as parent, token and flags; survival plays no part."""
    return Tree(root, tuple(word(parent, token, 200, flags) for parent, token, flags in nodes))


ONE = [(UNDER_ROOT, 4, BEST), (0, 5, BEST), (1, 6, BEST), (UNDER_ROOT, 7, 0), (2, 8, BEST), (3, 9, BEST)]
OTHER = [(UNDER_ROOT, 6, 0), (0, 4, BEST), (UNDER_ROOT, 5, BEST), (1, 7, BEST), (2, 4, BEST), (4, 9, BEST | LOOKED_UP)]
PRUNED = [(UNDER_ROOT, 6, BEST), (0, 8, BEST), (1, 4, 0), (1, 5, BEST), (2, 6, BEST), (3, 4, BEST)]
SCRIPT = (
    tree(3, *ONE[:2]),
    tree(3, *ONE[:4]),  # appended
    tree(3, *ONE),
    tree(5, *PRUNED[:2]),  # pruned
    tree(5, *PRUNED[:5]),
    tree(5, *PRUNED),
    tree(0),  # the request is gone,
    tree(2, *OTHER[:5]),  # and another has the slot
    tree(2, *OTHER),
    tree(3, (UNDER_ROOT, 4, BEST), (0, 9, BEST), (1, 3, BEST)),
)
SHORT = tuple(published for index, published in enumerate(SCRIPT) if index not in (1, 7))
"""Where more than one thing may be stored next, there are many more states."""
CONTEXTS = [
    *([1, 2, 3, *path] for path in ([], [4], [4, 5], [4, 5, 6], [4, 5, 6, 8], [7], [7, 9], [9])),
    *([8, 9, *path] for path in ([], [6], [6, 4], [6, 4, 7], [5], [5, 4], [5, 4, 9], [1])),
]


def plain_draft(published: Tree, context: Sequence[int]) -> list[int]:
    """The draft of one tree for a context, without any of the code under test but the words' parts."""
    nodes = [parts(value) for value in published.words]
    node = UNDER_ROOT
    if len(context) < published.root:
        return []
    for token in context[published.root :]:
        below = [index for index, each in enumerate(nodes) if (each.parent, each.token) == (node, token)]
        if not below:
            return []
        [node] = below
    draft: list[int] = []
    while below := [index for index, each in enumerate(nodes) if each.parent == node and each.best]:
        [node] = below
        draft.append(nodes[node].token)
    return draft


class Readings:
    """What a reader makes of all that it may have found, held against the trees that the headers name."""

    def __init__(self, search: Search, script: Sequence[Tree]) -> None:
        self.trees = {stores.header: published for stores, published in zip(search.stores, script, strict=True)}
        self.trees[0] = tree(0)
        self.mixed = self.shortened = self.torn_though_in_time = 0
        for found in search.found:
            self._read(found)

    def _read(self, found: Found) -> None:
        for context in CONTEXTS:
            tokens = walk(found.header, found.words, context, len(context), LIMIT, VOCAB_SIZE).tokens
            whole = plain_draft(self.trees[found.header], context)
            self.mixed += tokens != whole[: len(tokens)] or not all(0 <= token < VOCAB_SIZE for token in tokens)
            self.shortened += len(tokens) < len(whole)
            self.torn_though_in_time += tokens != whole and not found.overtaken


@cache
def search_of(
    script: tuple[Tree, ...], kind: type[Publication] = Publication, *, header_overtakes: bool = False
) -> Search:
    return Search(record(script, kind, BEFORE), header_overtakes).run()


def test_the_script_covers_what_happens() -> None:
    sizes = [len(published.words) for published in SCRIPT]
    assert (max(sizes), min(sizes)) == (6, 0)
    generations = [header_parts(stores.header).generation for stores in record(SCRIPT, Publication, BEFORE)]
    assert generations == [65533, 65534, 65535, *range(1, 8)]
    assert sum(bool(plain_draft(published, context)) for published in SCRIPT for context in CONTEXTS) > 25


@pytest.mark.parametrize(
    ("script", "header_overtakes", "least"), [(SCRIPT, False, 50_000), (SHORT, True, 50_000)], ids=["script", "short"]
)
def test_a_draft_is_of_the_tree_that_the_header_names(
    script: tuple[Tree, ...], header_overtakes: bool, least: int
) -> None:
    search = search_of(script, header_overtakes=header_overtakes)
    readings = Readings(search, script)
    print(f"{search.states} states, {len(search.found)} readings, {readings.shortened} shortened drafts")
    assert readings.mixed == 0
    assert readings.shortened > 1000  # torn blocks were among them
    assert search.states > least


def test_a_reader_that_one_publication_overtakes_finds_all() -> None:
    """And not so where a header may overtake its words, so that there is something to find."""
    assert Readings(search_of(SCRIPT), SCRIPT).torn_though_in_time == 0
    assert Readings(search_of(SHORT, header_overtakes=True), SHORT).torn_though_in_time > 100


def test_without_the_check_of_generations_drafts_are_mixed() -> None:
    search = search_of(SCRIPT)
    unchecked = set()
    for found in search.found:
        generation = header_parts(found.header).generation
        unchecked.add(found._replace(words=tuple(value >> 16 << 16 | generation for value in found.words)))
    search = replace(search, found=unchecked)
    assert Readings(search, SCRIPT).mixed > 100


class FillsTheBlockInUse(Publication):
    """Stores words where the header says that a reader may be."""

    def publish(self, slot: int, root: int, words: array[int]) -> None:
        self._which[slot] = 1 - self._which[slot]
        super().publish(slot, root, words)


def test_a_writer_that_fills_the_block_in_use_spoils_drafts() -> None:
    script = SCRIPT[:4]
    readings = Readings(search_of(script, FillsTheBlockInUse), script)
    assert readings.torn_though_in_time > 100
    assert readings.mixed == 0  # generations see to that
