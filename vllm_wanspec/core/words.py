"""The words of a draft tree: what of it a device reads, kept beside the tree as it changes; see `core.block`."""

import heapq
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from vllm_wanspec.core.block import (
    BEST,
    BLOCK_NODES,
    LOOKED_UP,
    MAX_FOLLOWED,
    MAX_TOKEN,
    UNDER_ROOT,
    survival_level,
    word,
)
from vllm_wanspec.core.flat import NONE, FlatTree

RENEWED_AFTER = 4
"""Tokens of text after which words that had no room for all nodes are made anew, so that others come in."""


class TreeWords:
    """The words of one tree, as its slot's block has them: what has arrived is added, dead ones go now and then.

    Attributes:
        root: Length of the context that the words follow.
    """

    def __init__(self, tree: FlatTree) -> None:
        """Begin with the tree as it is."""
        self._tree = tree
        self.root = 0
        self._words = array("q")
        self._places: dict[int, int] = {}
        self._favourites: dict[int, int] = {}
        self._next = self._version = 0
        self._root_reach = 0.0
        self._left_out = False
        self._renew()

    @property
    def tree(self) -> FlatTree:
        """The tree that they are of."""
        return self._tree

    def current(self, guess: "Guess | None" = None) -> "array[int]":
        """The words for all that the tree holds by now, as far as a block has room; not to be changed.

        Args:
            guess: Tokens that prompt lookup goes on with; left out where something has been drafted in their place.
        """
        if self.outdated() or (self._left_out and self._tree.position - self.root >= RENEWED_AFTER):
            self._renew()
        else:
            self._extend()
        return self._words if guess is None else self._with(guess)

    def outdated(self) -> bool:
        """Whether the text has gone on so far, or to such a place, that walks cannot follow it much longer."""
        tree = self._tree
        return (
            tree.version != self._version
            or tree.cursor not in self._places
            or tree.position - self.root > MAX_FOLLOWED // 2
        )

    def _renew(self) -> None:
        """Begin at the cursor."""
        tree, cursor = self._tree, self._tree.cursor
        self.root, self._version = tree.position, tree.version
        self._words = array("q")
        self._places = {cursor: UNDER_ROOT}
        self._favourites = {}
        self._left_out = False
        self._root_reach = tree._reaches[cursor]
        if len(tree._index) - 1 <= BLOCK_NODES:
            self._next = cursor + 1
            self._extend()
            return
        self._next = len(tree._ids)
        self._left_out = True
        # The most probable ones: no child is more probable than its parent, so that none comes before it.
        heap = [(-tree._reaches[kid], kid) for kid in tree._kids[cursor] or ()]
        heapq.heapify(heap)
        while heap and len(self._words) < BLOCK_NODES:
            _, node = heapq.heappop(heap)
            self._add(node)
            for kid in tree._kids[node] or ():
                heapq.heappush(heap, (-tree._reaches[kid], kid))

    def _extend(self) -> None:
        """Add what has come."""
        tree, places = self._tree, self._places
        parents = tree._parents
        for node in range(self._next, len(tree._ids)):
            if parents[node] in places:
                if len(self._words) == BLOCK_NODES:
                    self._left_out = True
                    break
                self._add(node)
        self._next = len(tree._ids)

    def _add(self, node: int) -> None:
        tree = self._tree
        parent = self._places[tree._parents[node]]
        token = tree._tokens[node]
        if token > MAX_TOKEN:
            return
        place = self._places[node] = len(self._words)
        flags = 0
        if tree._best[tree._parents[node]] == node:
            before = self._favourites.get(parent)
            if before is not None:
                self._words[before] &= ~BEST
            self._favourites[parent] = place
            flags = BEST
        level = survival_level(self._root_reach - tree._reaches[node])
        self._words.append(word(parent, token, level, flags))

    def _with(self, guess: "Guess") -> "array[int]":
        """The words and a guess, as far as there is room."""
        tree = self._tree
        node = tree._index.get(guess.after, NONE)
        parent = self._places.get(node)
        if parent is None:
            return self._words
        if not tree.pending:
            return self._words if tree._best[node] >= 0 else chained(self._words, parent, guess.tokens)
        return chained(self._words, parent, [*tree.pending, *guess.tokens]) if node == tree.cursor else self._words


class Guess(NamedTuple):
    """What prompt lookup goes on with.

    Attributes:
        after: Id of the node at the end of what was drafted when it was made; the tree's cursor where nothing was.
        tokens: Behind that node, and behind the commits that were pending.
        match: Tokens of the match that it followed.
    """

    after: int
    tokens: Sequence[int]
    match: int


def chained(words: "array[int]", parent: int, tokens: Sequence[int]) -> "array[int]":
    """Words with tokens of prompt lookup, one behind the other, below ``parent``; as many as a block has room for."""
    longer = words[:]
    for token in tokens[: BLOCK_NODES - len(words)]:
        if token > MAX_TOKEN:
            break
        place = len(longer)
        longer.append(word(parent, token, 1, BEST | LOOKED_UP))
        parent = place
    return longer
