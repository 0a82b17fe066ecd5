"""The wire of protocol version 1: one WebSocket frame is a msgpack list of messages.

Whatever bytes come in, `decode` gives valid messages or raises `RemoteProtocolError`, and it refuses before it builds:
types, sizes and ranges are held against the frame while it is read, and what there is much of, tokens and nodes, comes
as bytes that stand for valid values whatever they are. It must not know sessions or trees.

Tokens travel as three planes: the lowest bytes of all of them, the middle ones, the highest ones. Nodes travel as six
planes: how many ids before its own a node's parent has (0: more than 255, see ``far``), the three of the token, the
log-probability and the entropy, both as levels of `NATS`.
"""

from array import array
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import partial
from math import sqrt
from operator import sub
from sys import byteorder
from typing import Annotated, Any

import msgpack
import msgspec
from msgspec import Meta

from vllm_wanspec.core.messages import (
    MAX_COMMIT_TOKENS,
    MAX_CONTEXT_TOKENS,
    MAX_ID,
    MAX_NODES_PER_MESSAGE,
    MAX_TEMPERATURE,
    MAX_TEXT,
    MAX_TOKEN,
    Close,
    Commit,
    Drain,
    Fields,
    Have,
    Hello,
    Id,
    Limits,
    Message,
    Nodes,
    Open,
    Ping,
    Pong,
    Refuse,
    Reject,
    Resumed,
    Want,
    Welcome,
    pieces,
    weight,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.errors import RemoteProtocolError

MAX_MESSAGES = 1024
MAX_MESSAGES_SENT = 256
MAX_CONTROLLERS_BYTES = 128 * 1024
"""Of a controller's frame: twice what it sends at a time."""
MAX_DRAFTERS_BYTES = 256 * 1024
_MAX_WEIGHT_SENT = 16384
"""Of one frame's messages, each of whose units takes six bytes and less."""

LEVELS = 256
NATS = tuple((level / 64) ** 2 for level in range(LEVELS))
"""Log-probabilities (negated) and entropies in nats: fine near 0, where they decide, and up to 15.9."""
_LOGPROBS = tuple(0.0 - nats for nats in NATS)
_node = partial(tuple.__new__, NodeRecord)
"""Makes a node without a Python call."""
_PLANES = (0, 1, 2) if byteorder == "little" else (3, 2, 1)
assert array("I").itemsize == 4

_Tokens = Annotated[bytes, Meta(max_length=3 * MAX_COMMIT_TOKENS)]


class _Open(Fields, tag=4, frozen=True):
    session: Id
    length: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS)]
    tokens: _Tokens
    limits: Limits
    temperature: Annotated[float, Meta(ge=0.0, le=MAX_TEMPERATURE)]
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)]
    resumes: Resumed | None
    on_demand: bool


class _Commit(Fields, tag=5, frozen=True):
    session: Id
    position: Id
    tokens: Annotated[bytes, Meta(min_length=3, max_length=3 * MAX_COMMIT_TOKENS)]


class _Nodes(Fields, tag=6, frozen=True):
    session: Id
    seen: Id
    first: Id
    nodes: Annotated[bytes, Meta(max_length=6 * MAX_NODES_PER_MESSAGE)]
    far: Annotated[tuple[Id, ...], Meta(max_length=MAX_NODES_PER_MESSAGE)] = ()


class Sender(Enum):
    """Whose frame it is: it bounds what may come, and how much."""

    CONTROLLER = "controller"
    DRAFTER = "drafter"
    EITHER = "either"


def _decoder(*kinds: type) -> "msgspec.msgpack.Decoder[list[Any]]":
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    return msgspec.msgpack.Decoder(Annotated[list[union], Meta(max_length=MAX_MESSAGES)])


_CONTROLLERS = (Hello, _Open, _Commit, Close, Ping, Want)
_DRAFTERS = (Welcome, Refuse, _Nodes, Reject, Pong, Drain, Have)
_DECODERS = {
    Sender.CONTROLLER: (_decoder(*_CONTROLLERS), MAX_CONTROLLERS_BYTES),
    Sender.DRAFTER: (_decoder(*_DRAFTERS), MAX_DRAFTERS_BYTES),
    Sender.EITHER: (_decoder(*_CONTROLLERS, *_DRAFTERS), MAX_DRAFTERS_BYTES),
}
_GREETING = msgspec.msgpack.Decoder(
    Annotated[list[Annotated[list[msgspec.Raw], Meta(max_length=16)]], Meta(max_length=1)]
)


def decode(frame: bytes, sender: Sender = Sender.EITHER) -> list[Message]:
    """The messages of one frame, each checked for types, sizes and ranges.

    Raises:
        RemoteProtocolError: The frame is not what protocol version 1 allows of its sender.
    """
    decoder, most = _DECODERS[sender]
    if len(frame) > most:
        raise RemoteProtocolError(f"frame of {len(frame)} bytes, over {most}")
    try:
        items = decoder.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"frame is not of protocol version 1: {error}"[:150]) from error
    return [_UNPACK[type(item)](item) if type(item) in _UNPACK else item for item in items]


def greeting(frame: bytes) -> tuple[int, int | None]:
    """The type of a connection's first message, and the version that a hello or a welcome begins with.

    Every version's first message begins so; what follows is its own.

    Raises:
        RemoteProtocolError: It is no frame of any version.
    """
    if len(frame) > MAX_DRAFTERS_BYTES:
        raise RemoteProtocolError(f"frame of {len(frame)} bytes, over {MAX_DRAFTERS_BYTES}")
    try:
        [[kind, first, *_]] = _GREETING.decode(frame)
        kind_number = msgspec.msgpack.decode(kind, type=int)
        greets = kind_number in {1, 2}
        return kind_number, msgspec.msgpack.decode(first, type=int) if greets else None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError("the first message is not hello, welcome or refuse") from error


def encode(messages: Sequence[Message]) -> bytes:
    """One frame from messages, in order; of an `Open` the whole context, which must fit."""
    packed: bytes = msgpack.packb([to_wire(message) for message in messages])
    return packed


def frames(messages: Sequence[Message]) -> Iterator[bytes]:
    """Messages as frames that keep the limits, all in order; long contexts in pieces."""
    batch: list[Message] = []
    total = 0
    for message in _in_pieces(messages):
        added = weight(message)
        if batch and (total + added > _MAX_WEIGHT_SENT or len(batch) == MAX_MESSAGES_SENT):
            yield encode(batch)
            batch, total = [], 0
        batch.append(message)
        total += added
    if batch:
        yield encode(batch)


def _in_pieces(messages: Sequence[Message]) -> Iterator[Message]:
    for message in messages:
        if isinstance(message, Open):
            yield from pieces(message)
        else:
            yield message


def to_wire(message: Message) -> list[Any]:
    """The short array that stands for a message."""
    fields: tuple[Any, ...]
    match message:
        case Open(limits=limits, resumes=resumes):
            tokens = pack_tokens(message.tokens[: message.total])
            bounds = msgspec.structs.astuple(limits)
            resumed = resumes and msgspec.structs.astuple(resumes)
            asked = message.temperature, message.priority, resumed, message.on_demand
            fields = message.session, message.total, tokens, bounds, *asked
        case Commit():
            fields = message.session, message.position, pack_tokens(message.tokens)
        case Nodes():
            first, planes, far = pack_nodes(message.nodes)
            fields = message.session, message.seen, first, planes, *([far] if far else ())
        case Refuse():
            fields = message.code[:MAX_TEXT], message.reason[:MAX_TEXT], message.first, message.tokens
        case _:
            fields = msgspec.structs.astuple(message)
    return [message.__struct_config__.tag, *fields]


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as planes of bytes.

    Raises:
        ValueError: An id is over `MAX_TOKEN` or negative.
    """
    try:
        words = array("I", tokens).tobytes()
    except OverflowError as error:
        raise ValueError("a token id does not fit into three bytes") from error
    if any(words[3 - _PLANES[0] :: 4]):
        raise ValueError(f"a token id is over {MAX_TOKEN}")
    return b"".join([words[plane::4] for plane in _PLANES])


def unpack_tokens(planes: bytes) -> list[int]:
    """The token ids of planes of bytes; their number is divisible by three."""
    count = len(planes) // 3
    words = bytearray(4 * count)
    for index, plane in enumerate(_PLANES):
        words[plane::4] = planes[index * count : (index + 1) * count]
    return memoryview(words).cast("I").tolist()


def level(nats: float) -> int:
    """The nearest level of `NATS`, 0 to 255."""
    return min(LEVELS - 1, int(64.0 * sqrt(nats) + 0.5))


def pack_nodes(nodes: Sequence[NodeRecord]) -> tuple[int, bytes, list[int]]:
    """The first node's id, the planes, and the distances to parents that no byte holds.

    Raises:
        ValueError: Ids are not successive, or a value is out of range.
    """
    if not nodes:
        return 0, b"", []
    ids, parents, tokens, logprobs, entropies = zip(*nodes, strict=True)
    first = ids[0]
    if ids != tuple(range(first, first + len(ids))):
        raise ValueError("the ids of a message's nodes are not successive")
    distances = list(map(sub, ids, parents))
    far: list[int] = []
    if max(distances) >= LEVELS:
        far = [distance for distance in distances if distance >= LEVELS]
        distances = [0 if distance >= LEVELS else distance for distance in distances]
    planes = [
        bytes(distances),
        pack_tokens(tokens),
        bytes([level(0.0 - logprob) for logprob in logprobs]),
        bytes(map(level, entropies)),
    ]
    return first, b"".join(planes), far


def _unpack_nodes(packed: _Nodes) -> Nodes:
    planes, first = packed.nodes, packed.first
    count, left = divmod(len(planes), 6)
    if left:
        raise RemoteProtocolError(f"nodes of {len(planes)} bytes, not of six each")
    distances: Sequence[int] = planes[:count]
    if packed.far or 0 in distances:
        distances = _with_far(distances, packed.far)
    ids = range(first, first + count)
    parents = list(map(sub, ids, distances))
    if count and (first < 1 or min(parents) < 0 or first + count > MAX_ID):
        raise RemoteProtocolError(f"a node among {first} to {first + count - 1} hangs below none that could be")
    tokens = unpack_tokens(planes[count : 4 * count])
    logprobs = map(_LOGPROBS.__getitem__, planes[4 * count : 5 * count])
    entropies = map(NATS.__getitem__, planes[5 * count :])
    nodes = tuple(map(_node, zip(ids, parents, tokens, logprobs, entropies, strict=True)))
    return Nodes(packed.session, packed.seen, nodes)


def _with_far(distances: Sequence[int], far: Sequence[int]) -> list[int]:
    """Distances, with those that no byte holds in the places of the zeros."""
    rest = iter(far)
    known = [distance or next(rest, 0) for distance in distances]
    if 0 in known or next(rest, None) is not None or any(distance < LEVELS for distance in far):
        raise RemoteProtocolError("the far parents of nodes are not as many as their places, or not far")
    return known


def _unpack_tokens(planes: bytes) -> tuple[int, ...]:
    if len(planes) % 3:
        raise RemoteProtocolError(f"tokens of {len(planes)} bytes, not of three each")
    return tuple(unpack_tokens(planes))


def _unpack_commit(packed: _Commit) -> Commit:
    return Commit(packed.session, packed.position, _unpack_tokens(packed.tokens))


def _unpack_open(packed: _Open) -> Open:
    tokens = _unpack_tokens(packed.tokens)
    if len(tokens) > packed.length or (not tokens and packed.resumes is None):
        raise RemoteProtocolError(f"a context of {packed.length} tokens begins with {len(tokens)}")
    asked = packed.temperature, packed.priority, packed.resumes, packed.on_demand
    return Open(packed.session, tokens, packed.limits, packed.length, *asked)


_UNPACK: dict[type, Any] = {_Open: _unpack_open, _Commit: _unpack_commit, _Nodes: _unpack_nodes}
