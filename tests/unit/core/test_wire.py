"""The wire: round trips, golden vectors, and limits, each by one hostile frame. The fuzz is in test_fuzz."""

import math
from itertools import pairwise

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_strategies import BY_TYPE, any_message

from vllm_wanspec.core.messages import (
    MAX_COMMIT_TOKENS,
    MAX_CONTEXT_TOKENS,
    MAX_ID,
    MAX_NODES_PER_MESSAGE,
    MAX_RUNNING_BRANCHES,
    MAX_TEXT,
    MAX_TOKEN,
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
    Resumed,
    ToController,
    ToDrafter,
    Want,
    Welcome,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.wire import (
    LEVELS,
    MAX_CONTROLLERS_BYTES,
    MAX_DRAFTERS_BYTES,
    MAX_MESSAGES,
    MAX_MESSAGES_SENT,
    NATS,
    Sender,
    decode,
    encode,
    frames,
    greeting,
    level,
    pack_nodes,
    pack_tokens,
    to_wire,
    unpack_tokens,
)
from vllm_wanspec.errors import RemoteProtocolError

LIMITS = Limits(8, 64, 4, 16, 8, 1.0, 0.02, 8)


def test_every_message_type_has_a_strategy_and_a_direction() -> None:
    assert set(BY_TYPE) == set(Message.__args__) == {*ToDrafter.__args__, *ToController.__args__}
    assert len(Message.__args__) == len(ToDrafter.__args__) + len(ToController.__args__)


@pytest.mark.parametrize("kind", BY_TYPE, ids=lambda kind: kind.__name__)
def test_round_trip_of_each_type(kind: type) -> None:
    sender = Sender.CONTROLLER if kind in ToDrafter.__args__ else Sender.DRAFTER
    other = Sender.DRAFTER if sender is Sender.CONTROLLER else Sender.CONTROLLER

    @settings(max_examples=60, deadline=None)
    @given(st.lists(BY_TYPE[kind], min_size=1, max_size=5))
    def check(sent: list[Message]) -> None:
        assert decode(encode(sent), sender) == decode(encode(sent)) == sent
        with pytest.raises(RemoteProtocolError):
            decode(encode(sent), other)

    check()


@settings(max_examples=100, deadline=None)
@given(st.lists(any_message, max_size=8))
def test_round_trip_of_mixed_frames_keeps_order(sent: list[Message]) -> None:
    assert decode(encode(sent)) == sent


def test_long_refusals_are_cut_to_what_the_peer_accepts() -> None:
    [received] = decode(encode([Refuse("vocabulary", "x" * 5000)]))
    assert received == Refuse("vocabulary", "x" * MAX_TEXT)


# Golden vectors: what another implementation must give and take, byte for byte.

GOLDEN: dict[str, tuple[Message, str]] = {
    "hello": (Hello(1, "ab", "me", b"12345678", (5,)), "91 96 01 01 a2 6162 a2 6d65 c4 08 3132333435363738 91 05"),
    "welcome": (
        Welcome(1, "m", 50_000, "ab", 256, 4096, 2047, 40),
        "91 99 02 01 a1 6d cd c350 a2 6162 cd 0100 cd 1000 cd 07ff 28",
    ),
    "refuse": (
        Refuse("vocabulary", "no", 512, (b"a", None)),
        "91 95 03 aa 766f636162756c617279 a2 6e6f cd 0200 92 c4 01 61 c0",
    ),
    "open": (
        Open(7, (1, 258, 65_793), LIMITS, 3, 0.5, -1),
        "91 99 04 07 03 c4 09 010201 000101 000001"
        "98 08 40 04 10 08 cb 3ff0000000000000 cb 3f947ae147ae147b 08 cb 3fe0000000000000 ff c0 c2",
    ),
    "open that resumes": (
        Open(8, (), Limits(8, 64), 300, resumes=Resumed("me", 7), on_demand=True),
        "91 99 04 08 cd 012c c4 00 98 08 40 01 01 08 cb 0000000000000000 cb 0000000000000000 01"
        "cb 0000000000000000 00 92 a2 6d65 07 c3",
    ),
    "commit": (Commit(7, 300, (1, 70_000)), "91 94 05 07 cd 012c c4 06 0170 0011 0001"),
    "nodes": (
        Nodes(
            7,
            302,
            (
                NodeRecord(301, 0, 258, -NATS[64], NATS[96]),
                NodeRecord(302, 300, 3, -NATS[192], NATS[96]),
                NodeRecord(303, 301, 65_793, 0.0, 0.0),
            ),
        ),
        "91 96 06 07 cd 012e cd 012d c4 12 000202 020301 010001 000001 40c000 606000 91 cd 012d",
    ),
    "nothing drafted": (Nodes(7, 302, ()), "91 95 06 07 cd 012e 00 c4 00"),
    "close": (Close(7), "91 92 07 07"),
    "reject": (Reject(7, "gap"), "91 93 08 07 a3 676170"),
    "ping": (Ping(77), "91 92 09 4d"),
    "pong": (Pong(77, 150), "91 93 0a 4d cc 96"),
    "drain": (Drain(), "91 91 0b"),
    "have": (Have(8, 299), "91 93 0c 08 cd 012b"),
    "want": (Want(8, 4), "91 93 0d 08 04"),
}


def test_every_type_has_a_golden_vector() -> None:
    assert {type(message) for message, _ in GOLDEN.values()} == set(Message.__args__)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name: str) -> None:
    message, written = GOLDEN[name]
    frame = bytes.fromhex(written.replace(" ", ""))
    assert encode([message]).hex(" ") == frame.hex(" ")
    assert decode(frame) == [message]
    assert msgpack.unpackb(frame, strict_map_key=True)[0][0] == to_wire(message)[0]  # and plain msgpack reads it


# Tokens and nodes


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, MAX_TOKEN), max_size=40))
def test_tokens_take_three_bytes_each(tokens: list[int]) -> None:
    planes = pack_tokens(tokens)
    assert len(planes) == 3 * len(tokens)
    assert unpack_tokens(planes) == tokens


@pytest.mark.parametrize("token", [-1, MAX_TOKEN + 1, 2**32, 2**70])
def test_a_token_that_does_not_fit_is_never_sent(token: int) -> None:
    with pytest.raises(ValueError, match="token id"):
        pack_tokens([1, token])


@pytest.mark.parametrize("ids", [(1, 3), (2, 1), (1, 1), (1, 3, 2, 4)])
def test_nodes_whose_ids_do_not_follow_one_another_are_never_sent(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not successive"):
        pack_nodes([NodeRecord(number, 0, 5, -0.5, 1.0) for number in ids])


@settings(max_examples=300, deadline=None)
@given(st.floats(0.0, 1e6, allow_nan=False))
def test_log_probabilities_and_entropies_travel_at_the_nearest_level(nats: float) -> None:
    [received] = decode(encode([Nodes(1, 2, (NodeRecord(1, 0, 3, 0.0 - nats, nats),))]))
    assert isinstance(received, Nodes)
    [node] = received.nodes
    assert node.logprob == 0.0 - node.entropy_nats
    if nats <= NATS[-1]:
        place = level(nats)
        step = NATS[min(place + 1, LEVELS - 1)] - NATS[max(place - 1, 0)]
        assert abs(node.entropy_nats - nats) <= step / 2
        assert abs(node.entropy_nats - nats) <= 0.0001 + 0.016 * math.sqrt(nats)
    else:
        assert node.entropy_nats == NATS[-1]


def test_levels_keep_the_order_of_probabilities() -> None:
    assert all(fine < coarse for fine, coarse in pairwise(NATS))
    assert [level(nats) for nats in NATS] == list(range(LEVELS))


def test_a_node_of_a_large_vocabulary_takes_six_bytes() -> None:
    nodes = tuple(NodeRecord(i + 1, i, 128_000 + i, -0.5, 1.5) for i in range(64))
    assert len(encode([Nodes(1, 500, nodes)])) <= 64 * 6 + 16


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
def test_frames_keep_order(sent: list[Message]) -> None:
    packed = [decode(frame) for frame in frames(sent)]
    assert all(packed)
    assert [message for frame in packed for message in frame] == sent


LARGEST: list[tuple[Sender, Message]] = [
    (Sender.CONTROLLER, Hello(1, "\U0001f600" * MAX_TEXT, "\U0001f600" * MAX_TEXT, b"x" * 32_768, (MAX_TOKEN,) * 256)),
    (Sender.CONTROLLER, Open(1, (MAX_TOKEN,) * MAX_CONTEXT_TOKENS, LIMITS)),
    (Sender.CONTROLLER, Commit(1, MAX_ID, (MAX_TOKEN,) * MAX_COMMIT_TOKENS)),
    (
        Sender.DRAFTER,
        Nodes(
            1,
            MAX_ID,
            tuple(NodeRecord(2**50 + i, i, MAX_TOKEN, -1.5, 1.5) for i in range(MAX_NODES_PER_MESSAGE)),
        ),
    ),
    (Sender.DRAFTER, Welcome(1, "\U0001f600" * MAX_TEXT, 1, "\U0001f600" * MAX_TEXT, 1, 1, 1)),
    (Sender.DRAFTER, Refuse("vocabulary", "\U0001f600" * MAX_TEXT, 1, (b"x" * 48,) * 512)),
]


@pytest.mark.parametrize(("sender", "largest"), LARGEST, ids=lambda value: type(value).__name__)
def test_frames_of_the_largest_messages_keep_the_size_limit(sender: Sender, largest: Message) -> None:
    count = 1 if isinstance(largest, Hello | Welcome | Refuse) else 2 if isinstance(largest, Open) else 20
    packed = list(frames([largest] * count))
    most = MAX_CONTROLLERS_BYTES if sender is Sender.CONTROLLER else MAX_DRAFTERS_BYTES
    assert max(map(len, packed)) <= most
    for frame in packed[:3]:
        assert decode(frame, sender)


# The first message of any version


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (encode([Hello(1, "f", "c")]), (1, 1)),
        (encode([Welcome(1, "m", 1, "f", 1, 1, 1)]), (2, 1)),
        (encode([Refuse("version", "no")]), (3, None)),
        (msgpack.packb([[1, 2, {"whatever": 2}, [[1]]]]), (1, 2)),
        (msgpack.packb([[2, 9, None]]), (2, 9)),
    ],
)
def test_the_version_of_a_greeting_is_read_whatever_follows(frame: bytes, expected: tuple[int, int | None]) -> None:
    assert greeting(frame) == expected


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb([[]]),
        msgpack.packb([[1]]),
        msgpack.packb([["1", 1]]),
        msgpack.packb([[1, "1"]]),
        msgpack.packb([[1, 1], [9, 1]]),
        msgpack.packb({1: 2}),
        b"\xdd\x00\x10\x00\x00" + b"\x90" * 2**20,
        b"\x91\xdd\x00\x01\x00\x00" + b"\x01" * 2**16,
        b"\x91" * 5000,
    ],
)
def test_what_is_no_greeting(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        greeting(frame)


# Limits, each by one hostile frame. `pack` is msgpack as a peer may write it.


def pack(value: object) -> bytes:
    return msgpack.packb(value)


def opened(**changes: object) -> bytes:
    """An open as a peer may write it."""
    bounds = {
        "lookahead": 1,
        "max_nodes": 1,
        "max_branches": 1,
        "running_branches": 1,
        "branch_depth": 1,
        "threshold": 0.0,
        "probability": 0.0,
        "leaves": 1,
    }
    right = {"session": 1, "length": 1, "tokens": b"\x01\x00\x00", "limits": 0, "temperature": 0.0, "priority": 0}
    fields = {name: changes.get(name, value) for name, value in right.items()}
    if "limits" not in changes:
        fields["limits"] = [changes.get(name, value) for name, value in bounds.items()]
    return pack([[4, *fields.values(), changes.get("resumes"), changes.get("on_demand", False)]])


def drafted(first: object = 1, planes: object = b"\x01\x05\x00\x00\x10\x10", far: object = ()) -> bytes:
    """Nodes as a peer may write them."""
    return pack([[6, 1, 1, first, planes, far]])


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
    "type is a float": pack([[7.5, 1]]),
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
    "long text": pack([[1, 1, "x" * (MAX_TEXT + 1), "", b"", []]]),
    "binary for text": pack([[1, 1, b"x", "", b"", []]]),
    "broken UTF-8": b"\x91\x96\x01\x01\xa2\xff\xfe\xa0\xc4\x00\x90",
    "version over 2**16": pack([[1, 2**16 + 1, "", "", b"", []]]),
    "digests that are cut off": pack([[1, 1, "", "", b"1234567", []]]),
    "digests of too many chunks": pack([[1, 1, "", "", b"12345678" * 4097, []]]),
    "too many ids apart": pack([[1, 1, "", "", b"", [1] * 257]]),
    "an id apart that is no token": pack([[1, 1, "", "", b"", [-1]]]),
    "welcome without vocabulary": pack([[2, 1, "m", 0, "f", 1, 1, 1, 0]]),
    "welcome with a vocabulary that does not fit": pack([[2, 1, "m", MAX_TOKEN + 2, "f", 1, 1, 1, 0]]),
    "welcome with a negative load": pack([[2, 1, "m", 1, "f", 1, 1, 1, -1]]),
    "refuse with long tokens": pack([[3, "", "", 0, [b"x" * 49]]]),
    "refuse with too many tokens": pack([[3, "", "", 0, [None] * 513]]),
    "open without context": opened(tokens=b""),
    "open without length": opened(length=0),
    "open with context too long": opened(length=MAX_CONTEXT_TOKENS + 1),
    "open with more context than it says": opened(tokens=b"\x01\x01\x00\x00\x00\x00"),
    "open with a piece too long": opened(length=5000, tokens=b"\x00" * 3 * (MAX_COMMIT_TOKENS + 1)),
    "open with part of a token": opened(tokens=b"\x01\x00"),
    "open with a list as context": opened(tokens=[1]),
    "open with text as context": opened(tokens="abc"),
    "open of an earlier kind": pack([[4, 1, [1], 1, 1, 1, 1, 1, 0.0, 0.0]]),
    "open without lookahead": opened(lookahead=0),
    "open without nodes": opened(max_nodes=0),
    "open without branches": opened(max_branches=0),
    "open with 65 branches": opened(max_branches=65),
    "open without running branches": opened(running_branches=0),
    "open with too many running branches": opened(running_branches=MAX_RUNNING_BRANCHES + 1),
    "open with branches of no depth": opened(branch_depth=0),
    "open with a negative threshold": opened(threshold=-0.5),
    "open with NaN as threshold": opened(threshold=math.nan),
    "open with a probability over 1": opened(probability=1.5),
    "open with a negative probability": opened(probability=-0.1),
    "open with NaN as probability": opened(probability=math.nan),
    "open with nil as probability": opened(probability=None),
    "open without leaves": opened(leaves=0),
    "open with half of what limits must have": opened(limits=[1]),
    "open with a negative temperature": opened(temperature=-1.0),
    "open with NaN as temperature": opened(temperature=math.nan),
    "open with a huge priority": opened(priority=2**40),
    "open that resumes a number": opened(resumes=7),
    "open that resumes half": opened(resumes=["me"]),
    "open on a demand that is a number": opened(on_demand=1),
    "want of nothing": pack([[13, 1, 0]]),
    "commit of nothing": pack([[5, 1, 1, b""]]),
    "commit of part of a token": pack([[5, 1, 1, b"1234"]]),
    "commit of a list": pack([[5, 1, 1, [1]]]),
    "commit too long": pack([[5, 1, 1, b"\x00" * 3 * (MAX_COMMIT_TOKENS + 1)]]),
    "nodes is a list": drafted(planes=[1]),
    "nodes that are cut off": drafted(planes=b"\x01\x05\x00\x00\x10"),
    "too many nodes": drafted(planes=b"\x01" * 6 * (MAX_NODES_PER_MESSAGE + 1)),
    "node id 0": drafted(first=0),
    "node below none": drafted(planes=b"\x02\x05\x00\x00\x10\x10"),
    "node id over 2**53": drafted(first=MAX_ID),
    "a far parent is missing": drafted(first=500, planes=b"\x00\x05\x00\x00\x10\x10"),
    "a far parent too many": drafted(far=[300]),
    "a far parent that is near": drafted(first=500, planes=b"\x00\x05\x00\x00\x10\x10", far=[255]),
    "a far parent before all": drafted(first=500, planes=b"\x00\x05\x00\x00\x10\x10", far=[501]),
    "reject with an unknown code": pack([[8, 1, "because"]]),
    "reject with a list as code": pack([[8, 1, []]]),
    "pong with a load over all bounds": pack([[10, 1, 2**17]]),
    "a timestamp": pack([[7, msgpack.Timestamp(1)]]),
    "an extension": pack([[7, msgpack.ExtType(5, b"x")]]),
    "deep nesting": b"\x91" * 100_000 + b"\xc0",
    "deep nesting in a field": b"\x91\x92\x07" + b"\x91" * 5000 + b"\x01",
    "a list that claims 2**32-1 items": b"\xdd\xff\xff\xff\xff",
    "text that claims 2**32-1 bytes": b"\x91\xdb\xff\xff\xff\xff",
    "nested lists that claim much": (b"\xdd\x00\x00\xff\xff" * 500).ljust(70_000, b"\xc0"),
    "too many messages": pack([[7, 1]] * (MAX_MESSAGES + 1)),
    "too large": pack([[9, 1]]).ljust(MAX_DRAFTERS_BYTES + 1, b"\xc0"),
}


@pytest.mark.parametrize("frame", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_frames(frame: bytes) -> None:
    for sender in Sender:
        with pytest.raises(RemoteProtocolError) as caught:
            decode(frame, sender)
        assert len(str(caught.value)) < 200


def test_the_frames_that_hostile_ones_are_made_from_are_right() -> None:
    assert decode(opened(), Sender.CONTROLLER) == [Open(1, (1,), Limits(1, 1, branch_depth=1), 1)]
    assert decode(opened(limits=[1, 1]), Sender.CONTROLLER) == [Open(1, (1,), Limits(1, 1), 1)]
    assert decode(drafted(), Sender.DRAFTER) == [Nodes(1, 1, (NodeRecord(1, 0, 5, -NATS[16], NATS[16]),))]
    far = drafted(first=500, planes=b"\x00\x05\x00\x00\x10\x10", far=[500])
    assert decode(far, Sender.DRAFTER) == [Nodes(1, 1, (NodeRecord(500, 0, 5, -NATS[16], NATS[16]),))]


def test_a_controller_s_frame_is_smaller_than_a_drafter_s() -> None:
    frame = pack([[9, 1]]).ljust(MAX_CONTROLLERS_BYTES + 1, b"\xc0")
    with pytest.raises(RemoteProtocolError, match=f"over {MAX_CONTROLLERS_BYTES}"):
        decode(frame, Sender.CONTROLLER)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5, math.inf])
def test_thresholds_that_are_allowed(threshold: float | None) -> None:
    [message] = decode(opened(threshold=threshold))
    assert isinstance(message, Open)
    assert message.limits.entropy_threshold_nats == threshold


def test_the_most_messages_that_are_allowed() -> None:
    assert len(decode(pack([[7, 1]] * MAX_MESSAGES))) == MAX_MESSAGES
