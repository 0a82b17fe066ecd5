"""Blocks: what a device reads of the draft trees, and the plain walk that every faster one is held against.

Each request slot of the target has two blocks of 64-bit words, one word a node, and a header. One writer fills the
block that the header does not name, whole, and then stores the header: whoever loads the header once and the words
after it, in any order and while the writer goes on, has a tree that was published, or a part of one. No fence and no
atomic is needed: a word is stored and loaded whole, and words of another generation than the header's are dropped, so
that a reader that was overtaken can only find less. Ids are inside the vocabulary before they are written.

==========  =====================================================================================================
header      which block 1 bit, generation 16, nodes 8, length of the context that the root stands for 32
word        generation 16 bits, parent 8 (`UNDER_ROOT` or the index of an earlier word), token 24, survival 8,
            `BEST` 1, `LOOKED_UP` 1
==========  =====================================================================================================

Survival is the chance that the target's text comes by a node, counted from the root, as `survival_level` writes it.
(Own derivation; the sequence lock that needs no second look.)
"""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK_NODES = 128
"""Nodes of a request that a device can know of."""
UNDER_ROOT = 255
"""Parent of the nodes that follow the root's context."""
MAX_FOLLOWED = 32
"""So many tokens that came after the root a walk follows: the writer has put the root further on by then."""
MAX_TOKEN = 2**24 - 1
MAX_ROOT = 2**31 - 1
GENERATIONS = 2**16
LEVELS_PER_NAT = 16
BEST = 1 << 56
"""The most probable child of its parent: a walk goes on there."""
LOOKED_UP = 1 << 57
"""Made by prompt lookup, and not by a drafter."""

_TOKEN_SHIFT, _PARENT_SHIFT, _SURVIVAL_SHIFT = 24, 16, 48
_COUNT_SHIFT, _ROOT_SHIFT = 17, 25

Words = npt.NDArray[np.int64]


def word(parent: int, token: int, survival: int, flags: int = 0) -> int:
    """A node's word, without its generation.

    Args:
        parent: Index of an earlier word, or `UNDER_ROOT`.
        token: At most `MAX_TOKEN`.
        survival: See `survival_level`.
        flags: `BEST`, `LOOKED_UP`, both or none.
    """
    return parent << _PARENT_SHIFT | token << _TOKEN_SHIFT | survival << _SURVIVAL_SHIFT | flags


def survival_level(nats: float) -> int:
    """The 8 bits for a chance of e^-nats: 255 for certain, 1 for all that is hardly possible."""
    return max(1, 255 - int(nats * LEVELS_PER_NAT + 0.5))


class Node(NamedTuple):
    """A word taken apart."""

    generation: int
    parent: int
    token: int
    survival: int
    best: bool
    looked_up: bool


def parts(value: int) -> Node:
    """The fields of a word."""
    return Node(
        value & 0xFFFF,
        value >> _PARENT_SHIFT & 0xFF,
        value >> _TOKEN_SHIFT & MAX_TOKEN,
        value >> _SURVIVAL_SHIFT & 0xFF,
        bool(value & BEST),
        bool(value & LOOKED_UP),
    )


class Header(NamedTuple):
    """A header taken apart."""

    which: int
    generation: int
    nodes: int
    root: int


def header_parts(value: int) -> Header:
    """The fields of a header."""
    return Header(value & 1, value >> 1 & 0xFFFF, value >> _COUNT_SHIFT & 0xFF, value >> _ROOT_SHIFT & MAX_ROOT)


class Publication:
    """The writer's side of all slots; one thread at a time may call it.

    The arrays may be memory that a device reads meanwhile. Nothing here waits for a reader.
    """

    def __init__(self, headers: Words, words: Words) -> None:
        """Write into these arrays, zero in the beginning.

        Args:
            headers: [slots].
            words: [slots, 2, BLOCK_NODES].
        """
        if headers.dtype != np.int64 or words.dtype != np.int64 or words.shape != (len(headers), 2, BLOCK_NODES):
            raise ValueError(f"headers {headers.shape} and words {words.shape} are not [slots] and [slots, 2, 128]")
        self._headers = headers
        self._blocks = [(slot[0], slot[1]) for slot in words]
        self._generations = [0] * len(headers)
        self._which = [0] * len(headers)

    def publish(self, slot: int, root: int, words: "array[int]") -> None:
        """Replace a slot's tree.

        Args:
            slot: Of the request.
            root: Length in tokens of the context that the nodes follow.
            words: As `word` makes them, at most `BLOCK_NODES`, parents first.

        Raises:
            ValueError: More words than a block holds; what was published before stays.
        """
        generation, which, count = self._generations[slot] + 1, 1 - self._which[slot], len(words)
        if generation == GENERATIONS:
            generation = 1  # 0 is that of memory that was never written
        if count > BLOCK_NODES:
            raise ValueError(f"{count} words are more than the {BLOCK_NODES} of a block")
        if count:
            np.bitwise_or(np.frombuffer(words, np.int64), generation, out=self._blocks[slot][which][:count])
        self._headers[slot] = which | generation << 1 | count << _COUNT_SHIFT | root << _ROOT_SHIFT
        self._generations[slot], self._which[slot] = generation, which

    def clear(self, slot: int) -> None:
        """Have nothing in a slot: its request is gone."""
        self.publish(slot, 0, _NOTHING)


_NOTHING: "array[int]" = array("q")


class Walked(NamedTuple):
    """The draft that a walk found: token ids, and how many of them, at the end, prompt lookup made."""

    tokens: list[int]
    looked_up: int


def walk(header: int, words: Sequence[int], context: Any, length: int, limit: int, vocab_size: int) -> Walked:
    """The draft for a context: along what was verified since the root, then down the most probable children.

    The reference for kernels, and what runs where the device is the processor itself. It looks at each word once.

    Args:
        header: Loaded before the words.
        words: [BLOCK_NODES] of the block that the header names.
        context: Token ids by position.
        length: How many of them there are.
        limit: Most tokens to draft.
        vocab_size: Ids are below this; no other is handed out, whatever the words say.
    """
    _, generation, count, root = header_parts(header)
    if not 0 < count <= BLOCK_NODES or not root <= length <= root + MAX_FOLLOWED:
        return NO_WALK
    children: dict[tuple[int, int], int] = {}
    best: dict[int, int] = {}
    for index, value in enumerate(words[:count]):
        if value & 0xFFFF == generation:
            parent, token = value >> _PARENT_SHIFT & 0xFF, value >> _TOKEN_SHIFT & MAX_TOKEN
            children[parent, token] = index
            if value & BEST and token < vocab_size:
                best[parent] = index
    cursor = UNDER_ROOT
    for position in range(root, length):
        found = children.get((cursor, int(context[position])))
        if found is None:
            return NO_WALK
        cursor = found
    tokens: list[int] = []
    looked_up = 0
    while len(tokens) < limit and cursor in best:
        cursor = best[cursor]
        node = parts(words[cursor])
        tokens.append(node.token)
        looked_up += node.looked_up
    return Walked(tokens, looked_up)


NO_WALK = Walked([], 0)
