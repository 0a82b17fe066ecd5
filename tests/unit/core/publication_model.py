"""All that one reader can find while one writer publishes: a search over states, not over schedules.

The writer's stores are those of a real `Publication`, taken apart; they happen one at a time, in their order, or with
the header's store anywhere among those of its publication. The reader loads the header, and then the words in any
order. A state is what memory holds and what the reader has: how it came about is forgotten, so that a few ten thousand
states cover all interleavings. That words are stored in one order takes nothing away: each can be loaded at another
time, so that a reader may have any mixture all the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vllm_wanspec.core.block import BLOCK_NODES, Publication, header_parts


class Tree(NamedTuple):
    """What is published at once: a root and words without generation."""

    root: int
    words: tuple[int, ...]


class Stores(NamedTuple):
    """What one publication stores: words by place in a block, then the header."""

    block: int
    words: tuple[int, ...]
    header: int


class _Headers(np.ndarray):
    """Headers of one slot that remember what the words were when the header was stored."""

    words: Any
    seen: Any

    def __setitem__(self, key: Any, value: Any) -> None:
        self.seen = self.words.copy()
        super().__setitem__(key, value)


def record(trees: Sequence[Tree], kind: type[Publication], generation: int) -> list[Stores]:
    """What a writer stores for a script of publications, of which ``generation`` came before."""
    headers, words = np.zeros(1, np.int64).view(_Headers), np.zeros((1, 2, BLOCK_NODES), np.int64)
    headers.words, headers.seen = words, None
    publication = kind(headers, words)
    publication._generations[0] = generation
    stores = []
    for tree in trees:
        before = words.copy()
        publication.publish(0, tree.root, array("q", tree.words))
        assert (headers.seen == words).all(), "a word is stored after the header"
        changed = (words[0] != before[0]).any(axis=1).nonzero()[0].tolist()
        which = header_parts(int(headers[0])).which
        assert changed in ([], [which])
        stores.append(Stores(which, tuple(words[0, which, : len(tree.words)].tolist()), int(headers[0])))
    return stores


class _Writer(NamedTuple):
    """How far the writer is: in which publication, how many words of it are stored, and whether its header is."""

    publication: int
    words: int
    header: bool


Loaded = tuple[int | None, ...]
Memory = tuple[int, tuple[int, ...], tuple[int, ...]]
"""The header and two blocks."""


class State(NamedTuple):
    """A writer, and a reader: the header that it loaded, and the words so far."""

    writer: _Writer
    header: int | None
    loaded: Loaded


class Found(NamedTuple):
    """What a reader may have in the end.

    Attributes:
        header: That it loaded.
        words: That it loaded, of the block that the header names.
        overtaken: Whether the writer had begun to store the publication after the next one, seen from the header's,
            when the last word was loaded.
    """

    header: int
    words: tuple[int, ...]
    overtaken: bool


@dataclass
class Search:
    """Every state of a writer and a reader.

    Attributes:
        stores: What the writer stores, in order.
        header_overtakes: Whether the header's store may come before those of its publication's words.
        states: So many there are.
        found: What the reader has in the end.
    """

    stores: list[Stores]
    header_overtakes: bool
    states: int = 0
    found: set[Found] = field(default_factory=set)
    _memories: dict[_Writer, Memory] = field(default_factory=dict)

    def run(self) -> Search:
        """Go everywhere."""
        begin = State(_Writer(0, 0, False), None, ())
        seen, open_states = {begin}, [begin]
        while open_states:
            state = open_states.pop()
            loads = self._loads(state)
            self.found.update(self._end(after) for after in loads if None not in after.loaded)
            for after in [*loads, *(state._replace(writer=writer) for writer in self._steps(state.writer))]:
                if after not in seen:
                    seen.add(after)
                    open_states.append(after)
        self.states = len(seen)
        return self

    def _loads(self, state: State) -> list[State]:
        """Where the reader is after its next load."""
        header, *blocks = self._memory(state.writer)
        if state.header is None:
            return [State(state.writer, header, (None,) * header_parts(header).nodes)]
        block = blocks[header_parts(state.header).which]
        return [
            state._replace(loaded=(*state.loaded[:place], block[place], *state.loaded[place + 1 :]))
            for place, value in enumerate(state.loaded)
            if value is None
        ]

    def _end(self, state: State) -> Found:
        numbers = [stores.header for stores in self.stores]
        # Before the first publication the header is zero.
        after_next = numbers.index(state.header) + 2 if state.header in numbers else 1
        writer = state.writer
        overtaken = writer.publication > after_next or (
            writer.publication == after_next and (writer.words > 0 or writer.header)
        )
        return Found(state.header or 0, tuple(value or 0 for value in state.loaded), overtaken)

    def _steps(self, writer: _Writer) -> list[_Writer]:
        """Where the writer is after its next store."""
        number, words, header = writer
        if number == len(self.stores):
            return []
        count = len(self.stores[number].words)
        after = []
        if words < count:
            after.append(_Writer(number, words + 1, header))
        if not header and (words == count or self.header_overtakes):
            after.append(_Writer(number, words, True))
        return [_Writer(number + 1, 0, False) if step == (number, count, True) else step for step in after]

    def _memory(self, writer: _Writer) -> Memory:
        """What the slot's memory holds then, as far as the script uses it."""
        if writer not in self._memories:
            room = max(len(each.words) for each in self.stores)
            header, blocks = 0, [[0] * room, [0] * room]
            for number, each in enumerate(self.stores[: writer.publication + 1]):
                whole = number < writer.publication
                count = len(each.words) if whole else writer.words
                blocks[each.block][:count] = each.words[:count]
                if whole or writer.header:
                    header = each.header
            self._memories[writer] = header, tuple(blocks[0]), tuple(blocks[1])
        return self._memories[writer]
