"""Slots of all kinds for a walk: sound trees, blocks torn between publications, lying words, garbage."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_wanspec.core.block import (
    BEST,
    BLOCK_NODES,
    LOOKED_UP,
    MAX_FOLLOWED,
    UNDER_ROOT,
    Walked,
    header_parts,
    parts,
    walk,
    word,
)

VOCAB_SIZE = 6
TOKENS = 8
"""Words have tokens below this: some are outside the vocabulary."""
LIMIT = 5
CAPACITY = 96
"""Positions of a request."""
FILLER = 3
COUNTED = 60
"""Slots of which dropped words are counted: the last ones."""


Kind = Callable[[random.Random, int], list[int]]


@dataclass(frozen=True)
class Slots:
    """What a walk reads, for a number of slots."""

    headers: np.ndarray  # int64 [slots]
    words: np.ndarray  # int64 [slots, 2, BLOCK_NODES]
    token_ids: np.ndarray  # int32 [slots, CAPACITY]
    total_len: np.ndarray  # int32 [slots]

    def expected(self, slot: int) -> Walked:
        """What the reference finds."""
        header = int(self.headers[slot])
        block = self.words[slot, header & 1].tolist()
        return walk(header, block, self.token_ids[slot], int(self.total_len[slot]), LIMIT, VOCAB_SIZE)

    def followed(self, slot: int) -> int:
        """How many tokens a walk follows before it drafts."""
        return int(self.total_len[slot]) - header_parts(int(self.headers[slot])).root

    def dropped(self, slot: int) -> int:
        """How many words a walk drops, where it looks at them."""
        _, generation, count, _ = header = header_parts(int(self.headers[slot]))
        if not 0 < count <= BLOCK_NODES or not 0 <= self.followed(slot) <= MAX_FOLLOWED:
            return 0
        return sum(parts(int(value)).generation != generation for value in self.words[slot, header.which, :count])


def request_states(slots: Slots) -> Any:
    """vLLM's request states, as far as a walk knows them, on the CPU."""
    import torch

    count = len(slots.headers)
    return SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=torch.tensor(slots.token_ids)),
        total_len=SimpleNamespace(gpu=torch.tensor(slots.total_len)),
        last_sampled_tokens=torch.full((count, 1), FILLER, dtype=torch.int64),
        # One column more than a walk may write.
        draft_tokens=torch.full((count, LIMIT + 1), -1, dtype=torch.int64),
    )


def random_slots(count: int, rng: random.Random) -> Slots:
    """Slots of all kinds, in turn."""
    slots = Slots(
        np.zeros(count, np.int64),
        np.zeros((count, 2, BLOCK_NODES), np.int64),
        np.zeros((count, CAPACITY), np.int32),
        np.zeros(count, np.int32),
    )
    for slot in range(count):
        kind = (sound, sound, lying, garbage)[slot % 4]
        _fill(slots, slot, kind, rng, torn=slot % 4 == 1 or slot % 8 == 2)
    return slots


def sound(rng: random.Random, size: int) -> list[int]:
    """The words of a tree, without a generation."""
    made: list[int] = []
    taken: set[tuple[int, int]] = set()
    favoured: set[int] = set()
    for index in range(size):
        parent = (
            index - 1 if index and rng.random() < 0.8 else rng.choice([UNDER_ROOT, *range(max(0, index - 4), index)])
        )
        free = [token for token in range(TOKENS) if (parent, token) not in taken]
        if not free:
            parent, free = index - 1, list(range(TOKENS))
        token = min(rng.choice(free), rng.choice(free))
        taken.add((parent, token))
        best = parent not in favoured and rng.random() < 0.95
        if best:
            favoured.add(parent)
        flags = (BEST if best else 0) | (LOOKED_UP if rng.random() < 0.3 else 0)
        made.append(word(parent, token, rng.randrange(256), flags))
    return made


def lying(rng: random.Random, size: int) -> list[int]:
    """Words with parents anywhere, themselves and places outside the block among them."""
    return [
        word(
            rng.choice([UNDER_ROOT, index - 1 if index else UNDER_ROOT, rng.randrange(size), rng.randrange(256)]),
            min(rng.randrange(TOKENS), rng.randrange(TOKENS)),
            rng.randrange(256),
            rng.choice([0, BEST, BEST, BEST | LOOKED_UP]),
        )
        for index in range(size)
    ]


def garbage(rng: random.Random, size: int) -> list[int]:
    """Any 64 bits, but that no lower 16 are set: the generation comes there."""
    return [rng.randrange(-(2**47), 2**47) << 16 for _ in range(size)]


def _fill(slots: Slots, slot: int, kind: Kind, rng: random.Random, *, torn: bool) -> None:
    size = BLOCK_NODES if rng.random() < 0.1 else rng.randint(0, 40)
    # A count that no block has, of words which are all right otherwise.
    count = rng.randint(BLOCK_NODES + 1, 255) if size == BLOCK_NODES and rng.random() < 0.5 else size
    generation, which, root = rng.randrange(2**16), rng.randrange(2), rng.randint(0, CAPACITY - MAX_FOLLOWED - 4)
    block = [value | generation for value in kind(rng, size)]
    for index in range(size):
        if torn and rng.random() < 0.1:
            block[index] ^= rng.randrange(1, 2**16)
    slots.words[slot] = np.frombuffer(rng.randbytes(2 * 8 * BLOCK_NODES), np.int64).reshape(2, BLOCK_NODES)
    slots.words[slot, which, :size] = block
    header = which | generation << 1 | count << 17 | root << 25
    if kind is garbage and rng.random() < 0.5:
        header = rng.randrange(-(2**63), 2**63)
    slots.headers[slot] = header
    context = [rng.randrange(TOKENS) for _ in range(root)] + _way_down(block, rng)
    if rng.random() < 0.1:
        context = context[: root // 2] if rng.random() < 0.5 else [*context, *[0] * (MAX_FOLLOWED + 1)]
    if rng.random() < 0.1:
        context.append(rng.choice([-1, TOKENS, 2**24, 2**31 - 1]))
    slots.token_ids[slot, : len(context)] = context[:CAPACITY]
    slots.total_len[slot] = min(len(context), CAPACITY)


def _way_down(block: list[int], rng: random.Random) -> list[int]:
    """Tokens that lead from the root some way into the words, whatever their generation."""
    way: list[int] = []
    cursor = UNDER_ROOT
    for _ in range(rng.choice([0, 0, 1, 2, 3, 6])):
        below = [(index, parts(value).token) for index, value in enumerate(block) if parts(value).parent == cursor]
        if not below:
            break
        cursor, token = rng.choice(below)
        way.append(token)
    return way
