"""The codec: round trips, and limits, each by one hostile frame. The fuzz is in test_fuzz."""

import math
import random
import struct

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
    MAX_RUNNING_BRANCHES,
    MAX_TEXT,
    REJECT_CODES,
    Close,
    Commit,
    Hello,
    Limits,
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
    from_wire,
    to_wire,
    vocabulary_fingerprint,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.errors import RemoteProtocolError

MAX_ID, MAX_TOKEN, MAX_NATS = 2**53, 2**31 - 1, 2.0**127

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
        draw(st.floats(-MAX_NATS, 0.0, width=32)),
        draw(st.floats(0.0, MAX_NATS, width=32)),
    )


session_limits = st.builds(
    Limits,
    counts,
    counts,
    st.integers(1, 64),
    st.integers(1, MAX_RUNNING_BRANCHES),
    st.integers(1, 4096),
    st.none() | st.just(math.inf) | st.floats(0.0, MAX_NATS, width=32),
    st.floats(0.0, 1.0, width=32),
)

BY_TYPE: dict[type, st.SearchStrategy] = {
    Hello: st.builds(Hello, versions, texts, texts),
    Welcome: st.builds(Welcome, versions, texts, counts, texts, counts, counts, counts),
    Refuse: st.builds(Refuse, texts, texts),
    Open: st.builds(Open, ids, st.lists(tokens, min_size=1, max_size=30).map(tuple), session_limits),
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
        Open(1, (MAX_TOKEN,) * MAX_CONTEXT_TOKENS, Limits(8, 8)),
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


def opened(**changes: object) -> bytes:
    """An open as a peer may write it."""
    right = {
        "tokens": [1],
        "lookahead": 1,
        "max_nodes": 1,
        "max_branches": 1,
        "running_branches": 1,
        "branch_depth": 1,
        "threshold": 0.0,
        "probability": 0.0,
    }
    return pack([[4, 1, *(right | changes).values()]])


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
    "open without context": opened(tokens=[]),
    "open with context too long": opened(tokens=[0] * (MAX_CONTEXT_TOKENS + 1)),
    "open with a negative token": opened(tokens=[1, -1]),
    "open with a token over 2**31": opened(tokens=[2**31]),
    "open with true as token": opened(tokens=[True]),
    "open with text as context": opened(tokens="abc"),
    "open of an earlier kind": pack([[4, 1, [1], 1, 1, 1]]),
    "open without lookahead": opened(lookahead=0),
    "open without nodes": opened(max_nodes=0),
    "open without branches": opened(max_branches=0),
    "open with 65 branches": opened(max_branches=65),
    "open without running branches": opened(running_branches=0),
    "open with too many running branches": opened(running_branches=MAX_RUNNING_BRANCHES + 1),
    "open with branches of no depth": opened(branch_depth=0),
    "open with a negative threshold": opened(threshold=-0.5),
    "open with an integer as threshold": opened(threshold=1),
    "open with NaN as threshold": opened(threshold=math.nan),
    "open with a probability over 1": opened(probability=1.5),
    "open with a negative probability": opened(probability=-0.1),
    "open with NaN as probability": opened(probability=math.nan),
    "open with nil as probability": opened(probability=None),
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


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5, math.inf])
def test_thresholds_that_are_allowed(threshold: float | None) -> None:
    [message] = decode(opened(threshold=threshold))
    assert isinstance(message, Open)
    assert message.limits.entropy_threshold_nats == threshold


@settings(max_examples=50, deadline=None)
@given(any_message)
def test_a_message_alone_travels_as_a_short_array(message: Message) -> None:
    packed = msgpack.unpackb(msgpack.packb(to_wire(message), use_single_float=True))
    assert from_wire(packed) == message


@pytest.mark.parametrize("item", [None, [], [7], {"a": 1}, (7, 1), [7, "1"]])
def test_what_stands_for_no_message(item: object) -> None:
    with pytest.raises(RemoteProtocolError):
        from_wire(item)


def test_the_most_messages_that_are_allowed() -> None:
    assert len(decode(pack([[7, 1]] * MAX_MESSAGES))) == MAX_MESSAGES


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
