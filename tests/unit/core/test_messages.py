"""The codec: round trips, limits, and a fuzz in which only RemoteProtocolError may come out."""

import contextlib
import math
import random
import struct
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_wanspec.core import messages as wire
from vllm_wanspec.core.messages import (
    MAX_COMMIT_TOKENS,
    MAX_CONTEXT_TOKENS,
    MAX_FRAME_BYTES,
    MAX_MESSAGES,
    MAX_MESSAGES_SENT,
    MAX_NODES_PER_MESSAGE,
    MAX_TEXT,
    REJECT_CODES,
    Close,
    Commit,
    Hello,
    Message,
    Nodes,
    Open,
    Ping,
    Pong,
    Refuse,
    Reject,
    Welcome,
    decode,
    encode,
    frames,
    vocabulary_fingerprint,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.errors import RemoteProtocolError

MAX_ID, MAX_TOKEN = 2**53, 2**31 - 1

ids = st.integers(0, MAX_ID)
counts = st.integers(1, MAX_TOKEN)
tokens = st.integers(0, MAX_TOKEN)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
versions = st.integers(0, 2**16)


@st.composite
def node_records(draw: st.DrawFn) -> NodeRecord:
    node = draw(st.integers(1, MAX_ID))
    return NodeRecord(
        node,
        draw(st.integers(0, node - 1)),
        draw(tokens),
        draw(st.floats(max_value=0.0, allow_nan=False, allow_infinity=False, width=32)),
        draw(st.floats(min_value=0.0, allow_nan=False, allow_infinity=False, width=32)),
    )


BY_TYPE: dict[type, st.SearchStrategy] = {
    Hello: st.builds(Hello, versions, texts, texts),
    Welcome: st.builds(Welcome, versions, texts, counts, texts, counts, counts, counts),
    Refuse: st.builds(Refuse, texts, texts),
    Open: st.builds(
        Open, ids, st.lists(tokens, min_size=1, max_size=30).map(tuple), counts, counts, st.integers(1, 64)
    ),
    Commit: st.builds(Commit, ids, ids, st.lists(tokens, min_size=1, max_size=10).map(tuple)),
    Nodes: st.builds(Nodes, ids, ids, st.lists(node_records(), max_size=10).map(tuple)),
    Close: st.builds(Close, ids),
    Reject: st.builds(Reject, ids, st.sampled_from(sorted(REJECT_CODES))),
    Ping: st.builds(Ping, ids),
    Pong: st.builds(Pong, ids),
}
any_message = st.one_of(*BY_TYPE.values())


def test_every_message_type_has_a_strategy() -> None:
    assert set(BY_TYPE) == set(wire._TO_WIRE)


@pytest.mark.parametrize("kind", BY_TYPE, ids=lambda kind: kind.__name__)
def test_round_trip_of_each_type(kind: type) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(BY_TYPE[kind], max_size=5))
    def check(sent: list[Message]) -> None:
        assert decode(encode(sent)) == sent

    check()


@settings(max_examples=100, deadline=None)
@given(st.lists(any_message, max_size=8))
def test_round_trip_of_mixed_frames_keeps_order(sent: list[Message]) -> None:
    assert decode(encode(sent)) == sent


@settings(max_examples=300, deadline=None)
@given(
    st.floats(max_value=0.0, min_value=-1e6, allow_nan=False),
    st.floats(min_value=0.0, max_value=1e6, allow_nan=False),
)
def test_log_probabilities_and_entropies_travel_as_float32(logprob: float, entropy: float) -> None:
    [received] = decode(encode([Nodes(1, 2, (NodeRecord(1, 0, 3, logprob, entropy),))]))
    assert isinstance(received, Nodes)
    [node] = received.nodes
    assert (node.logprob, node.entropy_nats) == struct.unpack("ff", struct.pack("ff", logprob, entropy))
    assert math.isclose(node.logprob, logprob, rel_tol=1e-6, abs_tol=1e-37)


def test_long_refusals_are_cut_to_what_the_peer_accepts() -> None:
    [received] = decode(encode([Refuse("vocabulary", "x" * 5000)]))
    assert received == Refuse("vocabulary", "x" * MAX_TEXT)


def test_a_frame_is_compact() -> None:
    nodes = tuple(NodeRecord(i + 1, i, 4000, -0.5, 1.5) for i in range(64))
    assert len(encode([Nodes(1, 500, nodes)])) < 64 * 21


# frames()


def test_frames_keep_order_and_the_number_of_messages() -> None:
    sent: list[Message] = [Ping(index) for index in range(3 * MAX_MESSAGES_SENT + 5)]
    packed = list(frames(sent))
    assert [len(decode(frame)) for frame in packed] == [MAX_MESSAGES_SENT] * 3 + [5]
    assert [message for frame in packed for message in decode(frame)] == sent


def test_frames_of_nothing() -> None:
    assert list(frames([])) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(any_message, max_size=10))
def test_frames_keep_order_and_whole_contexts_travel_alone(sent: list[Message]) -> None:
    packed = [decode(frame) for frame in frames(sent)]
    assert [message for frame in packed for message in frame] == sent
    for frame in packed:
        assert frame
        assert len(frame) == 1 or not any(isinstance(message, Open) for message in frame)


@pytest.mark.parametrize(
    "largest",
    [
        Open(1, (MAX_TOKEN,) * MAX_CONTEXT_TOKENS, 8, 8, 1),
        Commit(1, MAX_ID, (MAX_TOKEN,) * MAX_COMMIT_TOKENS),
        Nodes(
            1,
            MAX_ID,
            tuple(NodeRecord(MAX_ID - i, MAX_ID - i - 1, MAX_TOKEN, -1.5, 1.5) for i in range(MAX_NODES_PER_MESSAGE)),
        ),
        Welcome(1, "\U0001f600" * MAX_TEXT, 1, "\U0001f600" * MAX_TEXT, 1, 1, 1),
    ],
    ids=lambda message: type(message).__name__,
)
def test_frames_of_the_largest_messages_keep_the_size_limit(largest: Message) -> None:
    count = 2 if isinstance(largest, Open) else MAX_MESSAGES_SENT
    sizes = [len(frame) for frame in frames([largest] * count)]
    assert max(sizes) <= MAX_FRAME_BYTES
    assert sum(sizes) > MAX_FRAME_BYTES or not isinstance(largest, Open)


# Limits, each by one hostile frame. `pack` is msgpack as a peer may write it.


def pack(value: object) -> bytes:
    return msgpack.packb(value)


NODE = [1, 0, 5, -0.5, 1.0]
HOSTILE = {
    "empty": b"",
    "not a list": pack(1),
    "a map": pack({"a": 1}),
    "a map inside": pack([{1: 2}]),
    "two values": pack([]) + pack([]),
    "message is no list": pack([1]),
    "message is empty": pack([[]]),
    "unknown type": pack([[99]]),
    "type is true": pack([[True, 1]]),
    "type is a float": pack([[7.0, 1]]),
    "type is a list": pack([[[7], 1]]),
    "type is text": pack([["7", 1]]),
    "too few fields": pack([[7]]),
    "too many fields": pack([[7, 1, 2]]),
    "negative session": pack([[7, -1]]),
    "session over 2**53": pack([[7, MAX_ID + 1]]),
    "session over 2**64": b"\x91\x92\x07\xcf" + b"\xff" * 8,
    "session is true": pack([[7, True]]),
    "session is nil": pack([[7, None]]),
    "session is NaN": pack([[7, math.nan]]),
    "long text": pack([[1, 1, "x" * (MAX_TEXT + 1), ""]]),
    "binary for text": pack([[1, 1, b"x", ""]]),
    "broken UTF-8": b"\x91\x94\x01\x01\xa2\xff\xfe\xa0",
    "version over 2**16": pack([[1, 2**16 + 1, "", ""]]),
    "welcome without vocabulary": pack([[2, 1, "m", 0, "f", 1, 1, 1]]),
    "open without context": pack([[4, 1, [], 1, 1, 1]]),
    "open without lookahead": pack([[4, 1, [1], 0, 1, 1]]),
    "open with 65 alternatives": pack([[4, 1, [1], 1, 1, 65]]),
    "open with context too long": pack([[4, 1, [0] * (MAX_CONTEXT_TOKENS + 1), 1, 1, 1]]),
    "open with a negative token": pack([[4, 1, [1, -1], 1, 1, 1]]),
    "open with a token over 2**31": pack([[4, 1, [2**31], 1, 1, 1]]),
    "open with true as token": pack([[4, 1, [True], 1, 1, 1]]),
    "open with text as context": pack([[4, 1, "abc", 1, 1, 1]]),
    "commit of nothing": pack([[5, 1, 1, []]]),
    "commit too long": pack([[5, 1, 1, [0] * (MAX_COMMIT_TOKENS + 1)]]),
    "nodes is no list": pack([[6, 1, 1, 7]]),
    "too many nodes": pack([[6, 1, 1, [NODE] * (MAX_NODES_PER_MESSAGE + 1)]]),
    "node with four fields": pack([[6, 1, 1, [NODE[:4]]]]),
    "node is no list": pack([[6, 1, 1, [1]]]),
    "node id 0": pack([[6, 1, 1, [[0, 0, 5, -0.5, 1.0]]]]),
    "node below itself": pack([[6, 1, 1, [[3, 3, 5, -0.5, 1.0]]]]),
    "node below a later one": pack([[6, 1, 1, [[3, 4, 5, -0.5, 1.0]]]]),
    "node below a negative one": pack([[6, 1, 1, [[3, -1, 5, -0.5, 1.0]]]]),
    "node with a negative token": pack([[6, 1, 1, [[1, 0, -5, -0.5, 1.0]]]]),
    "node with a positive log-probability": pack([[6, 1, 1, [[1, 0, 5, 0.5, 1.0]]]]),
    "node with NaN log-probability": pack([[6, 1, 1, [[1, 0, 5, math.nan, 1.0]]]]),
    "node with -inf log-probability": pack([[6, 1, 1, [[1, 0, 5, -math.inf, 1.0]]]]),
    "node with negative entropy": pack([[6, 1, 1, [[1, 0, 5, -0.5, -1.0]]]]),
    "node with NaN entropy": pack([[6, 1, 1, [[1, 0, 5, -0.5, math.nan]]]]),
    "node with infinite entropy": pack([[6, 1, 1, [[1, 0, 5, -0.5, math.inf]]]]),
    "node with integer log-probability": pack([[6, 1, 1, [[1, 0, 5, -1, 1.0]]]]),
    "reject with an unknown code": pack([[8, 1, "because"]]),
    "reject with a list as code": pack([[8, 1, []]]),
    "a timestamp": pack([[7, msgpack.Timestamp(1)]]),
    "an extension": pack([[7, msgpack.ExtType(5, b"x")]]),
    "deep nesting": b"\x91" * 100_000 + b"\xc0",
    "deep nesting in a field": b"\x91\x92\x07" + b"\x91" * 5000 + b"\x01",
    "a list that claims 2**32-1 items": b"\xdd\xff\xff\xff\xff",
    "text that claims 2**32-1 bytes": b"\x91\xdb\xff\xff\xff\xff",
    "nested lists that claim much": (b"\xdd\x00\x00\xff\xff" * 500).ljust(70_000, b"\xc0"),
    "too many messages": pack([[7, 1]] * (MAX_MESSAGES + 1)),
    "too large": pack([[9, 1]]).ljust(MAX_FRAME_BYTES + 1, b"\xc0"),
}


@pytest.mark.parametrize("frame", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_frames(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(frame)
    assert len(str(caught.value)) < 200


def test_the_most_messages_that_are_allowed() -> None:
    assert len(decode(pack([[7, 1]] * MAX_MESSAGES))) == MAX_MESSAGES


# Fuzz


def valid_frame(rng: random.Random) -> bytes:
    def some_tokens() -> tuple[int, ...]:
        return tuple(rng.randrange(50_000) for _ in range(rng.randint(1, 12)))

    def some_nodes() -> tuple[NodeRecord, ...]:
        first = rng.randint(1, 1000)
        return tuple(
            NodeRecord(first + i, rng.randrange(first + i), rng.randrange(50_000), -rng.random(), rng.random())
            for i in range(rng.randint(0, 8))
        )

    kinds: list[Callable[[], Message]] = [
        lambda: Hello(1, "ab" * 32, "client"),
        lambda: Welcome(1, "model", 4096, "ab" * 32, 256, 4096, 2048),
        lambda: Refuse("vocabulary", "other"),
        lambda: Open(rng.randint(1, 99), some_tokens(), 32, 512, 4),
        lambda: Commit(rng.randint(1, 99), rng.randint(1, 999), some_tokens()),
        lambda: Nodes(rng.randint(1, 99), rng.randint(1, 999), some_nodes()),
        lambda: Close(rng.randint(1, 99)),
        lambda: Reject(rng.randint(1, 99), rng.choice(sorted(REJECT_CODES))),
        lambda: Ping(rng.randint(0, 2**40)),
        lambda: Pong(rng.randint(0, 2**40)),
    ]
    return encode([rng.choice(kinds)() for _ in range(rng.randint(0, 4))])


ODD_VALUES = [
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 1e308, -1e308,
    math.nan, math.inf, -math.inf, "", "x", "x" * 600, b"", b"\xff" * 9, [], [[]], [[[[[]]]]], [1] * 20, [-1], {},
    {"a": 1}, "engine",
]  # fmt: skip


def damaged_object(rng: random.Random, frame: bytes) -> bytes:
    """A valid frame of which one place, at any depth, holds something else."""
    root = msgpack.unpackb(frame)
    place, value = [root], root
    index = 0
    while isinstance(value, list) and value and rng.random() < 0.85:
        place, index = value, rng.randrange(len(value))
        value = place[index]
    odd = rng.choice(ODD_VALUES)
    if place and rng.random() < 0.8:
        place[index] = odd
    elif rng.random() < 0.5:
        place.append(odd)
    elif place:
        del place[index]
    return pack(root)


def damaged_bytes(rng: random.Random, frame: bytes) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def spliced(rng: random.Random, frame: bytes) -> bytes:
    other = valid_frame(rng)
    return frame[: rng.randint(0, len(frame))] + other[rng.randint(0, len(other)) :]


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    damaged_object,
    damaged_object,
    damaged_bytes,
    damaged_bytes,
    spliced,
    lambda rng, frame: frame[: rng.randint(0, len(frame))],
    lambda rng, frame: frame + rng.randbytes(rng.randint(1, 4)),
    lambda rng, frame: rng.randbytes(rng.randint(0, 60)),
    lambda rng, frame: bytes([0x90 + rng.randrange(16)] * rng.randint(1, 30)) + rng.randbytes(rng.randint(0, 30)),
    lambda rng, frame: frame,
]


def test_fuzz_of_the_decoder() -> None:
    rng = random.Random(20260)
    accepted = refused = 0
    for _ in range(5_500):
        frame = valid_frame(rng)
        for mutate in MUTATIONS:
            mutant = mutate(rng, frame)
            try:
                received = decode(mutant)
            except RemoteProtocolError:
                refused += 1
                continue
            accepted += 1
            with contextlib.suppress(OverflowError):  # a double, which the format allows, over float32's range
                assert decode(encode(received)) == received
    assert accepted + refused >= 50_000
    assert accepted >= 5_000
    assert refused >= 20_000


# The vocabulary's fingerprint


def test_fingerprint_does_not_depend_on_order() -> None:
    vocabulary = {f"t{index}": index for index in range(300)}
    shuffled = list(vocabulary.items())
    random.Random(1).shuffle(shuffled)
    assert vocabulary_fingerprint(dict(shuffled)) == vocabulary_fingerprint(vocabulary)
    assert len(vocabulary_fingerprint(vocabulary)) == 64


@pytest.mark.parametrize(
    "other",
    [
        {"a": 0, "b": 1},
        {"a": 0, "b": 1, "c": 3},
        {"a": 0, "b": 1, "d": 2},
        {"b": 0, "a": 1, "c": 2},
        {"a": 0, "b": 1, "c": 2, "d": 3},
        {"a": 0, "b": 1, "c ": 2},
        {"a\n1\tb": 0, "c": 2},
        {},
    ],
)
def test_fingerprint_is_sensitive(other: dict[str, int]) -> None:
    assert vocabulary_fingerprint(other) != vocabulary_fingerprint({"a": 0, "b": 1, "c": 2})


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.integers(0, 20), max_size=6))
def test_fingerprint_takes_any_text(vocabulary: dict[str, int]) -> None:
    assert vocabulary_fingerprint(vocabulary) == vocabulary_fingerprint(dict(reversed(vocabulary.items())))


def test_fingerprint_takes_lone_surrogates() -> None:
    assert vocabulary_fingerprint({"\ud800": 0}) != vocabulary_fingerprint({"\ud801": 0})
