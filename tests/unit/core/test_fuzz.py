"""Wire robustness: whatever bytes come, only RemoteProtocolError comes out, from the codec and from the sessions.

``WANSPEC_FUZZ_INPUTS`` sets the number of inputs; ``make fuzz`` runs a million.
"""

import asyncio
import os
import random
import time
import timeit
import tracemalloc
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

import msgpack
import pytest
from toys import FINGERPRINT, VOCAB_SIZE, draft_model, toy
from wire_fuzz import KINDS, Fuzz, same, some_limits, some_nodes, some_tokens

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.messages import (
    PROTOCOL_VERSION,
    Close,
    Commit,
    Hello,
    Limits,
    Message,
    Nodes,
    Open,
    Ping,
    Refuse,
    Reject,
    Want,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.turnaround import Turnaround
from vllm_wanspec.core.wire import MAX_DRAFTERS_BYTES, MAX_MESSAGES, decode, encode, to_wire
from vllm_wanspec.drafter.connection import Connection
from vllm_wanspec.drafter.host import StreamingHost
from vllm_wanspec.errors import RemoteProtocolError

INPUTS = int(os.environ.get("WANSPEC_FUZZ_INPUTS", "50000"))
SESSION_INPUTS = max(6_000, INPUTS // 10)
SAMPLE = 8


@pytest.mark.timeout(1200)
def test_fuzz_of_the_decoder() -> None:
    fuzz = Fuzz(20261)
    counts: Counter[str] = Counter()
    began_s = time.perf_counter()
    accepted = refused = 0
    for frame in fuzz.frames(INPUTS):
        try:
            messages = decode(frame)
        except RemoteProtocolError as error:
            refused += 1
            if refused % SAMPLE == 0:
                assert len(str(error)) < 200
            continue
        accepted += 1
        for message in messages:
            counts[type(message).__name__] += 1
        if accepted % SAMPLE == 0:
            assert same(list(map(to_wire, decode(encode(messages)))), list(map(to_wire, messages)))
    seconds = time.perf_counter() - began_s
    print(f"{accepted + refused} inputs in {seconds:.1f} s ({(accepted + refused) / seconds:.0f} per s), ", end="")
    print(f"{accepted} accepted, {refused} refused")
    assert accepted + refused == INPUTS
    assert 0.05 < accepted / INPUTS < 0.95
    assert len(counts) == len(KINDS) == 13
    assert min(counts.values()) > INPUTS / 1000


def test_an_oversized_frame_is_refused_unread() -> None:
    with pytest.raises(RemoteProtocolError, match="over"):
        decode(b"\x90".ljust(MAX_DRAFTERS_BYTES + 1, b"\xc1"))


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("depth", [2, 900, 5_000])
def test_deep_nesting_in_every_field(kind: int, depth: int) -> None:
    item = to_wire(KINDS[kind](random.Random(1)))
    for place in range(len(item)):
        fields = b"".join(msgpack.packb(value) for value in item[:place])
        rest = b"".join(msgpack.packb(value) for value in item[place + 1 :])
        deep = b"\x92\x01" * depth + b"\x01"
        with pytest.raises(RemoteProtocolError) as caught:
            decode(bytes([0x91, 0x90 + len(item)]) + fields + deep + rest)
        assert len(str(caught.value)) < 200


def peak_bytes(frame: bytes) -> int:
    """The most memory that decoding a frame takes at a time, refused or not."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with suppress(RemoteProtocolError):
        decode(frame)
    return tracemalloc.get_traced_memory()[1] - before


def full(message: Message) -> bytes:
    """As large a frame as is taken, of one kind of message."""
    size = len(encode([message])) - 1
    return encode([message] * min(MAX_MESSAGES, MAX_DRAFTERS_BYTES // size - 1))


NODE_RUN = tuple(NodeRecord(2**40 + i, 2**40 + i - 1 - i % 200, 2**23 + i, -0.5, 0.5) for i in range(4096))
FAR_RUN = tuple(NodeRecord(2**40 + i, 2**39, 2**23 + i, -0.5, 0.5) for i in range(4096))
DEAR = {
    "commits": full(Commit(1, 2**40, tuple(range(2**23, 2**23 + 4096)))),
    "nodes": full(Nodes(1, 2**40, NODE_RUN)),
    "nodes far from their parents": full(Nodes(1, 2**40, FAR_RUN)),
    "opens": full(Open(1, tuple(range(300)), Limits(8, 64))),
    "small messages": full(Ping(2**40)),
    "a hello": encode([Hello(1, "f" * 512, "c" * 512, b"x" * 32_768, tuple(range(2**20, 2**20 + 256)))]),
    "a refusal": encode([Refuse("vocabulary", "r" * 512, 0, (b"x" * 48,) * 512)]),
}
"""The dearest that is allowed."""
HOSTILE = {
    "arrays in one another": b"\x9f" * 200_000,
    "nodes as a list": (b"\x91\x96\x06\x01\x01\xdd\x00\x01\x00\x00").ljust(250_000, b"\xc0"),
    "many empty messages": b"\xdc\xff\xff".ljust(70_000, b"\x90"),
    "many empty messages, and many more claimed": b"\xdd\x00\x06\x1a\x80".ljust(250_000, b"\x90"),
    "arrays that claim much in one another": (b"\xdd\x00\x00\xff\xff" * 1_100).ljust(70_000, b"\xc0"),
}
"""What must cost next to nothing."""


@pytest.mark.parametrize("name", [*DEAR, *HOSTILE])
def test_what_a_frame_may_cost(name: str) -> None:
    """20 ms and 20 MB at most; what is refused is refused unread."""
    frame = DEAR.get(name) or HOSTILE[name]
    tracemalloc.start()
    try:
        peak = peak_bytes(frame)
    finally:
        tracemalloc.stop()
    took_s = min(timeit.repeat(lambda: decoded(frame), number=1, repeat=5))
    print(f"{name}: {len(frame):,} bytes, {took_s * 1e3:.2f} ms, {peak / 1e6:.2f} MB")
    assert (took_s, peak) <= ((0.020, 20e6) if name in DEAR else (0.001, 50_000))
    assert peak <= (20e6 if name in DEAR else 50_000)
    assert bool(decoded(frame)) is (name in DEAR)


def test_memory_is_in_proportion_to_the_frame() -> None:
    tracemalloc.start()
    try:
        for frame in Fuzz(7).frames(5_000):
            assert peak_bytes(frame) <= 20_000 + 128 * len(frame)
    finally:
        tracemalloc.stop()


def decoded(frame: bytes) -> list[Message]:
    """Its messages; none of a frame that is refused."""
    with suppress(RemoteProtocolError):
        return decode(frame)
    return []


def mostly_valid(rng: random.Random, messages: list[Message], fuzz: Fuzz) -> bytes:
    """One frame for a session: as it is, or damaged as those of the decoder's fuzz are."""
    frame = encode(messages)
    if rng.random() < 0.5:
        return frame
    fuzz.valid = [frame]
    return next(fuzz.frames(1))


def test_fuzz_of_the_controllers_session() -> None:
    rng, fuzz = random.Random(5), Fuzz(6)
    shared, session = Shared(), ControllerSession([1, 2, 3], Shared())
    refused = fed = number = 0
    limits = Limits(16, 64, 4, 8)
    for _ in range(SESSION_INPUTS):
        if session.tree is None or session.length > 400:
            number += 1
            session = ControllerSession([1, 2, 3], shared)
            session.open(number, limits, 0.0, vocab_size=VOCAB_SIZE, turnaround=Turnaround())
        assert session.tree is not None
        if rng.random() < 0.1:
            session.commit(some_tokens(rng, 3), 0.0)
        tree, seen = session.tree, rng.randint(1, session.length)
        last = tree.last_id + (max(0, seen - tree.position) if tree.pending else 0)
        records = [
            node._replace(id=last + offset, parent=_parent(rng, last, offset))
            for offset, node in enumerate(some_nodes(rng), 1)
        ]
        frame = mostly_valid(rng, [Nodes(1, seen, tuple(records))], fuzz)
        try:
            for message in decode(frame):
                if isinstance(message, Nodes | Reject):
                    fed += 1
                    session.receive(message, 0.0)
        except RemoteProtocolError:
            refused += 1
            session.link_lost(0.0)
            assert session.tree is None
            continue
        draft, expected = session.draft(8, 0.0, 0.0)[:2]
        assert len(draft) <= 8
        assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in draft)
        assert 0.0 <= expected <= len(draft)
        if session.tree is not None:
            assert session.tree.size - len(session.tree._walked) <= 2 * limits.max_nodes
    assert refused > SESSION_INPUTS / 20
    assert fed > SESSION_INPUTS / 10
    assert shared.counters.added_nodes > 100


def _parent(rng: random.Random, last: int, offset: int) -> int:
    return max(0, last + offset - rng.choice((1, 1, 1, 2, 5)))


class ShortEngine:
    """Gives each branch a few tokens, and then no more until it is stopped or ends."""

    def __init__(self) -> None:
        self.toy = toy(1)

    async def draft(self, tokens: Sequence[int], max_tokens: int) -> AsyncGenerator[list[DraftStep], None]:
        context = list(tokens)
        for _ in range(min(max_tokens, 3)):
            await asyncio.sleep(0)
            step = self.toy.step(context)
            context.append(step.token)
            yield [step]
        await asyncio.Event().wait()


def test_fuzz_of_the_drafters_connection() -> None:
    sent: list[int] = []

    async def run() -> Counter[str]:
        rng, fuzz = random.Random(8), Fuzz(9)
        seen: Counter[str] = Counter()
        host = StreamingHost(ShortEngine(), draft_model(max_sessions=8, max_context=200), running_branches=16)
        connection = None
        for _ in range(SESSION_INPUTS):
            if connection is None:
                seen["connections"] += 1
                connection = Connection(host)
                assert connection.receive(encode([Hello(PROTOCOL_VERSION, FINGERPRINT, "fuzz")]))
            try:
                connection.receive(mostly_valid(rng, [controllers_message(rng, connection)], fuzz))
                seen["taken"] += 1
            except RemoteProtocolError:
                seen["refused"] += 1
                await host.settled(connection.end())
                assert (connection.sessions, connection.running, host.running) == (0, 0, 0)
                connection = None
                continue
            for _ in range(3):  # the engine's turn
                await asyncio.sleep(0)
            sent.extend(len(decode(frame)) for frame in connection.frames())
            assert connection.sessions <= 8
            assert connection.running <= 16 + 8 * 2
        if connection is not None:
            await host.settled(connection.end())
        assert not host.connections
        seen["drafted"] = host.drafted_tokens
        return seen

    seen = asyncio.run(run())
    assert seen["refused"] > SESSION_INPUTS / 20
    assert seen["taken"] > SESSION_INPUTS / 5
    assert seen["drafted"] > 1_000
    assert sum(sent) > 1_000


def controllers_message(rng: random.Random, connection: Connection) -> Message:
    """What a controller might send now, mostly about sessions that are there."""
    last = connection._last_number
    number = rng.choice([*connection._sessions, last, last + 1])
    session = connection._sessions.get(number)
    length = session.tree.committed_length if session is not None else 3
    chance = rng.random()
    if chance < 0.2:
        return Open(last + rng.choice((1, 1, 1, 2)), some_tokens(rng), some_limits(rng))
    if chance < 0.85:
        return Commit(
            number if number <= last else 1, max(0, length + rng.choice((-2, 0, 0, 0, 1))), some_tokens(rng, 4)
        )
    if chance < 0.9:
        return Want(number, rng.randint(1, 9))
    return Close(number) if chance < 0.95 else Ping(7)
