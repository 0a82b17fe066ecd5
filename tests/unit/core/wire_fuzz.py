"""Frames that nobody should send: a seeded stream of damaged, hostile and now and then valid ones, made quickly."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import msgpack

from vllm_wanspec.core.messages import (
    REJECT_CODES,
    Close,
    Commit,
    Drain,
    Have,
    Hello,
    Limits,
    Message,
    Nodes,
    Open,
    Ping,
    Pong,
    Refuse,
    Reject,
    Want,
    Welcome,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.wire import encode

BASES = 2_000
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 7, -1, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 0.5,
    -0.5, 1.0, 1.7e38, -1.7e38, 3e38, -3e38, 1e308, -1e308, math.nan, math.inf, -math.inf, "", "x", "x" * 512,
    "x" * 600, "\U0001f600", "engine", b"", b"\xff" * 9, [], [[]], [[[[[]]]]], [1] * 20, [-1], [True], {}, {"a": 1},
    {1: [2]}, msgpack.ExtType(5, b"x"), msgpack.Timestamp(1),
)  # fmt: skip
HOSTILE_HEADS = (
    b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\xd6\xff", b"\xdd\x00\x00\x10\x00", b"\xc1", b"\x81", b"\xa5\xff\xfe",
    b"\xde\x00\x05", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\x00" * 7, b"\xca\xff\x80\x00\x00",
    b"\xcb\x7f\xf8" + b"\x00" * 6,
)  # fmt: skip


def some_tokens(rng: random.Random, most: int = 12) -> tuple[int, ...]:
    return tuple(rng.randrange(50) for _ in range(rng.randint(1, most)))


def some_nodes(rng: random.Random) -> tuple[NodeRecord, ...]:
    first = rng.randint(1, 30)
    return tuple(
        NodeRecord(first + i, rng.randrange(first + i), rng.randrange(50), -rng.random(), rng.random())
        for i in range(rng.randint(0, 6))
    )


def some_limits(rng: random.Random) -> Limits:
    threshold = rng.choice((None, 0.0, 0.5, math.inf))
    width = rng.randint(1, 6), rng.randint(1, 12)
    return Limits(rng.randint(1, 40), rng.randint(8, 512), *width, 4, threshold, 0.25, rng.randint(1, 3))


def some_open(rng: random.Random) -> Open:
    tokens = some_tokens(rng)
    length = len(tokens) + rng.choice((0, 0, 5))
    asked = rng.choice((0.0, 0.7)), rng.randint(-1, 1), None, rng.random() < 0.2
    return Open(rng.randint(1, 9), tokens, some_limits(rng), length, *asked)


KINDS: tuple[Callable[[random.Random], Message], ...] = (
    lambda rng: Hello(1, "ab" * 32, "client"),
    lambda rng: Welcome(1, "model", 4096, "ab" * 32, 256, 4096, 2048, 50),
    lambda rng: Refuse("vocabulary", "other"),
    some_open,
    lambda rng: Commit(rng.randint(1, 9), rng.randint(1, 20), some_tokens(rng)),
    lambda rng: Nodes(rng.randint(1, 9), rng.randint(1, 20), some_nodes(rng)),
    lambda rng: Close(rng.randint(1, 9)),
    lambda rng: Reject(rng.randint(1, 9), rng.choice(sorted(REJECT_CODES))),
    lambda rng: Ping(rng.randint(0, 2**40)),
    lambda rng: Pong(rng.randint(0, 2**40), rng.randint(0, 300)),
    lambda rng: Drain(),
    lambda rng: Have(rng.randint(1, 9), rng.randint(0, 20)),
    lambda rng: Want(rng.randint(1, 9), rng.randint(1, 20)),
)


def replaced(rng: random.Random, frame: bytes) -> bytes:
    """One place, at any depth, holds something else, or is gone, or there is one more."""
    root = msgpack.unpackb(frame)
    value, place, index = root, root, -1
    while isinstance(value, list) and value and (place is root or rng.random() < 0.75):
        place, index = value, int(rng.random() * len(value))
        value = place[index]
    odd = ODD_VALUES[int(rng.random() * len(ODD_VALUES))]
    chance = rng.random()
    if index < 0 or chance < 0.1:
        place.append(odd)
    elif chance < 0.2:
        del place[index]
    else:
        place[index] = odd
    packed: bytes = msgpack.packb(root)
    return packed


def flipped(rng: random.Random, frame: bytes) -> bytes:
    data = bytearray(frame)
    for _ in range(1 + int(rng.random() * 3)):
        data[int(rng.random() * len(data))] ^= 1 << int(rng.random() * 8)
    return bytes(data)


def headed(rng: random.Random, frame: bytes) -> bytes:
    """A header that lies, somewhere in the frame."""
    place = int(rng.random() * (len(frame) + 1))
    return frame[:place] + HOSTILE_HEADS[int(rng.random() * len(HOSTILE_HEADS))] + frame[place:]


def nested(rng: random.Random, frame: bytes) -> bytes:
    """A value deep inside lists, maps or both, somewhere in the frame."""
    place = int(rng.random() * (len(frame) + 1))
    head = (b"\x91", b"\x92\x01", b"\x81\x01", b"\x9f", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01")[rng.randrange(6)]
    return frame[:place] + head * (1 + int(rng.random() ** 8 * 2_000)) + frame[place:]


def inserted(rng: random.Random, frame: bytes) -> bytes:
    place = int(rng.random() * (len(frame) + 1))
    return frame[:place] + rng.randbytes(1 + int(rng.random() * 4)) + frame[place:]


class Fuzz:
    """The stream of one seed."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.valid = [encode([rng.choice(KINDS)(rng) for _ in range(rng.randint(0, 4))]) for _ in range(BASES)]
        self._damages: tuple[Callable[[random.Random, bytes], bytes], ...] = (
            replaced,
            replaced,
            flipped,
            flipped,
            headed,
            nested,
            inserted,
            lambda rng, frame: frame[: int(rng.random() * len(frame))],
            lambda rng, frame: frame + self._base(),
            lambda rng, frame: frame[: int(rng.random() * len(frame))] + self._base()[int(rng.random() * 9) :],
            lambda rng, frame: rng.randbytes(int(rng.random() * 40)),
            lambda rng, frame: frame,
        )

    def frames(self, count: int) -> Iterator[bytes]:
        rng, damages = self.rng, self._damages
        for _ in range(count):
            yield damages[int(rng.random() * len(damages))](rng, self._base())

    def _base(self) -> bytes:
        return self.valid[int(self.rng.random() * len(self.valid))]


def same(one: Any, other: Any) -> bool:
    """Whether two decoded values are equal, and of the same types."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)
