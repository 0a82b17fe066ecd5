"""The wire: messages of protocol version 1, their codec and their limits.

One WebSocket frame is a msgpack list of messages; a message is a short array whose first item is its type. Whatever
bytes come in, `decode` gives valid messages or raises `RemoteProtocolError`. It must not know sessions or trees.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, NamedTuple, NoReturn

import msgpack

from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.vocabulary import MAX_APART, Token, checked_chunk, checked_digests, token_bytes
from vllm_wanspec.errors import RemoteProtocolError

PROTOCOL_VERSION = 1
PATH = "/wanspec/v1"
MAX_FRAME_BYTES = 8 * 1024 * 1024
MAX_MESSAGES = 4096
MAX_MESSAGES_SENT = 256
MAX_CONTEXT_TOKENS = 1024 * 1024
MAX_COMMIT_TOKENS = 4096
MAX_NODES_PER_MESSAGE = 4096
MAX_TEXT = 512
MAX_RUNNING_BRANCHES = 1024
_MAX_WEIGHT_SENT = 65536
"""Nodes and tokens in one frame (of 33 bytes and less), so that it stays far below `MAX_FRAME_BYTES`."""
_MAX_ID = 2**53
_MAX_TOKEN = 2**31 - 1
_MAX_NATS = 2.0**127  # float32, in which they travel, has exactly this value
_node = partial(tuple.__new__, NodeRecord)
"""Makes a node without a Python call."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Controller's first message: protocol version, vocabulary fingerprint (hex) and who it is.

    ``digests`` is of its tokens (`Tokens.digests`); empty where it does not say. The ids ``apart`` may differ: they are
    part of neither fingerprint nor digests.
    """

    version: int
    fingerprint: str
    client: str
    digests: bytes = b""
    apart: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Welcome:
    """Drafter's answer: it will take sessions.

    ``vocab_size`` counts the ids that its tokenizer really has; ``max_context`` is the longest context in tokens that
    its draft model takes; ``max_sessions`` and ``max_nodes`` are per connection and per session.
    """

    version: int
    model: str
    vocab_size: int
    fingerprint: str
    max_sessions: int
    max_nodes: int
    max_context: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Drafter's answer: it will not serve this controller. ``code``: ``version``, ``vocabulary`` or ``protocol``.

    ``tokens`` are its own of the ids from ``first`` on, some of which differ from the controller's.
    """

    code: str
    reason: str
    first: int = 0
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """How far and how wide a session is drafted.

    Attributes:
        lookahead: Tokens drafted beyond the last commit.
        max_nodes: Live nodes.
        max_branches: Most probable tokens followed at a position, the most probable one included; 1 is the main line.
        running_branches: Engine requests at a time, the main line's included; the drafter may allow fewer.
        branch_depth: Tokens that a branch is extended by, its first one not counted.
        entropy_threshold_nats: Entropy from which on a position branches; None: adapts to measured agreement.
        min_probability: Below this an alternative is not sent, nor is a branch started whose calibrated path
            probability, from the last commit on, is below it.
    """

    lookahead: int
    max_nodes: int
    max_branches: int = 1
    running_branches: int = 1
    branch_depth: int = 8
    entropy_threshold_nats: float | None = 0.0
    min_probability: float = 0.0


@dataclass(frozen=True, slots=True)
class Open:
    """Begin a session with its full context."""

    session: int
    tokens: tuple[int, ...]
    limits: Limits


class Commit(NamedTuple):
    """Verified tokens from absolute ``position`` on (tokens in the context before them): idempotent.

    A named tuple, since it is made on the serving path.
    """

    session: int
    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Nodes:
    """Drafted nodes; ``seen`` is the committed length that the drafter knew when it sent them."""

    session: int
    seen: int
    nodes: tuple[NodeRecord, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """The session's request has finished or was aborted."""

    session: int


@dataclass(frozen=True, slots=True)
class Reject:
    """The drafter has no such session any more, or takes none: one of `REJECT_CODES`."""

    session: int
    code: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Round trip probe; ``sent_us`` is the sender's own clock in microseconds and comes back unread."""

    sent_us: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer to `Ping` with its ``sent_us``."""

    sent_us: int


REJECT_CODES = frozenset({"unknown", "overloaded", "too_long", "vocabulary", "gap", "engine"})
"""``unknown``: no such session; ``overloaded``: too many sessions; ``too_long``: context over the draft model's
maximum; ``vocabulary``: the context has a token that the draft model lacks; ``gap``: a commit began after the known
context; ``engine``: the draft engine failed."""

Message = Hello | Welcome | Refuse | Open | Commit | Nodes | Close | Reject | Ping | Pong


def vocabulary_fingerprint(vocabulary: Mapping[Any, int]) -> str:
    """SHA-256 (hex) of an id-to-token map over its real entries: equal where both sides mean the same by each id.

    Args:
        vocabulary: Token (text or bytes) to id, as tokenizers give it (``get_vocab()``); padding of the model's
            embedding is not part of it.
    """
    entries = sorted((index, token_bytes(token)) for token, index in vocabulary.items())
    lines = b"".join(b"%d\t%d\t%s\n" % (index, len(token), token) for index, token in entries)
    return hashlib.sha256(lines).hexdigest()


def frames(messages: Sequence[Message]) -> Iterator[bytes]:
    """Messages as frames that keep the limits: whole contexts travel alone, the rest together, all in order."""
    batch: list[Message] = []
    weight = 0
    for message in messages:
        added = _weight(message)
        if batch and (weight + added > _MAX_WEIGHT_SENT or len(batch) == MAX_MESSAGES_SENT):
            yield encode(batch)
            batch, weight = [], 0
        batch.append(message)
        weight += added
    if batch:
        yield encode(batch)


def _weight(message: Message) -> int:
    """How much of a frame a message takes: its nodes and tokens; a whole context fills one."""
    match message:
        case Nodes():
            return 1 + len(message.nodes)
        case Commit():
            return 1 + len(message.tokens)
        case Open():
            return _MAX_WEIGHT_SENT
        case _:
            return 1


def to_wire(message: Message) -> list[Any]:
    """The short array that stands for a message."""
    return _TO_WIRE[type(message)](message)


def from_wire(item: object) -> Message:
    """The message that a short array stands for.

    Raises:
        RemoteProtocolError: It is not what protocol version 1 allows.
    """
    return _decode_one(item)


def encode(messages: Sequence[Message]) -> bytes:
    """One frame from messages, in order."""
    packed: bytes = msgpack.packb([to_wire(message) for message in messages], use_single_float=True)
    return packed


def decode(frame: bytes) -> list[Message]:
    """The messages of one frame, each checked for types, sizes and ranges.

    Raises:
        RemoteProtocolError: The frame is not what protocol version 1 allows.
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise RemoteProtocolError(f"frame of {len(frame)} bytes, over {MAX_FRAME_BYTES}")
    try:
        items = msgpack.unpackb(frame, raw=False, strict_map_key=True, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"frame is not msgpack: {type(error).__name__}") from error
    if not isinstance(items, list) or len(items) > MAX_MESSAGES:
        raise RemoteProtocolError(f"frame is not a list of at most {MAX_MESSAGES} messages")
    return [_decode_one(item) for item in items]


def _decode_one(item: object) -> Message:
    if not isinstance(item, list) or not item or type(item[0]) is not int or item[0] not in _FROM_WIRE:
        raise RemoteProtocolError("message without a known type")
    fields, build = _FROM_WIRE[item[0]]
    if len(item) - 1 != len(fields):
        raise RemoteProtocolError(f"message of type {item[0]} has {len(item) - 1} fields, not {len(fields)}")
    return build(*[check(value) for check, value in zip(fields, item[1:], strict=True)])


def _shown(value: Any) -> str:
    """A wrong value for an error's text: a list's own could be long, or too deep to be made."""
    if isinstance(value, str | bytes):
        value = value[:40]
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else f"{value!r:.40}"


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise RemoteProtocolError(f"{_shown(value)} is not an integer in {low}..{high}")
        return value

    return check


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise RemoteProtocolError(f"{_shown(value)} is not a text of at most {MAX_TEXT} characters")
    return value


def _tokens(low: int, high: int) -> Callable[[Any], tuple[int, ...]]:
    def check(value: Any) -> tuple[int, ...]:
        if type(value) is not list or not low <= len(value) <= high:
            raise RemoteProtocolError(f"not a list of {low} to {high} tokens")
        for token in value:
            if type(token) is not int or not 0 <= token <= _MAX_TOKEN:
                raise RemoteProtocolError(f"{_shown(token)} is not a token id")
        return tuple(value)

    return check


def _nodes(value: Any) -> tuple[NodeRecord, ...]:
    """Checked in one loop: nearly everything that a controller receives is nodes."""
    if type(value) is not list or len(value) > MAX_NODES_PER_MESSAGE:
        raise RemoteProtocolError(f"not a list of at most {MAX_NODES_PER_MESSAGE} nodes")
    for item in value:
        if type(item) is not list or len(item) != 5:
            raise RemoteProtocolError("a node is not an array of five")
        node, parent, token, logprob, entropy = item
        if not (
            type(node) is type(parent) is type(token) is int
            and type(logprob) is type(entropy) is float
            and 0 <= parent < node <= _MAX_ID
            and 0 <= token <= _MAX_TOKEN
            and -_MAX_NATS <= logprob <= 0.0 <= entropy <= _MAX_NATS
        ):
            _refuse_node(item)
    return tuple(map(_node, value))


def _refuse_node(item: list[Any]) -> NoReturn:
    node, parent, token, logprob, entropy = item
    if not type(node) is type(parent) is type(token) is int:
        raise RemoteProtocolError("a node's id, parent or token is not an integer")
    if not type(logprob) is type(entropy) is float:
        raise RemoteProtocolError(f"node {node} has a log-probability or entropy that is not a float")
    if not (0 <= parent < node <= _MAX_ID and 0 <= token <= _MAX_TOKEN):
        raise RemoteProtocolError(f"node {node} below {parent} with token {token} is out of range")
    raise RemoteProtocolError(f"node {node} has log-probability {logprob}, entropy {entropy}")


def _probability(value: Any) -> float:
    if type(value) is not float or not 0.0 <= value <= 1.0:
        raise RemoteProtocolError(f"{_shown(value)} is not a probability")
    return value


def _threshold(value: Any) -> float | None:
    if value is not None and (type(value) is not float or not (0.0 <= value <= _MAX_NATS or value == inf)):
        raise RemoteProtocolError(f"{_shown(value)} is not an entropy")
    return value


def _build_open(session: int, tokens: tuple[int, ...], *limits: Any) -> Open:
    return Open(session, tokens, Limits(*limits))


def _reject_code(value: Any) -> str:
    if type(value) is not str or value not in REJECT_CODES:
        raise RemoteProtocolError(f"{_shown(value)} is not a reject code")
    return value


_ID = _integer(0, _MAX_ID)
_COUNT = _integer(1, _MAX_TOKEN)

_FROM_WIRE: dict[int, tuple[tuple[Callable[[Any], Any], ...], Callable[..., Message]]] = {
    1: ((_integer(0, 2**16), _text, _text, checked_digests, _tokens(0, MAX_APART)), Hello),
    2: ((_integer(0, 2**16), _text, _COUNT, _text, _COUNT, _COUNT, _COUNT), Welcome),
    3: ((_text, _text, _integer(0, _MAX_TOKEN), checked_chunk), Refuse),
    4: (
        (
            _ID,
            _tokens(1, MAX_CONTEXT_TOKENS),
            _COUNT,
            _COUNT,
            _integer(1, 64),
            _integer(1, MAX_RUNNING_BRANCHES),
            _integer(1, 4096),
            _threshold,
            _probability,
        ),
        _build_open,
    ),
    5: ((_ID, _ID, _tokens(1, MAX_COMMIT_TOKENS)), Commit),
    6: ((_ID, _ID, _nodes), Nodes),
    7: ((_ID,), Close),
    8: ((_ID, _reject_code), Reject),
    9: ((_ID,), Ping),
    10: ((_ID,), Pong),
}


def _limits_to_wire(limits: Limits) -> list[Any]:
    return [getattr(limits, field) for field in Limits.__slots__]


_TO_WIRE: dict[type[Message], Callable[[Any], list[Any]]] = {
    Hello: lambda m: [1, m.version, m.fingerprint, m.client, m.digests, m.apart],
    Welcome: lambda m: [2, m.version, m.model, m.vocab_size, m.fingerprint, m.max_sessions, m.max_nodes, m.max_context],
    Refuse: lambda m: [3, m.code[:MAX_TEXT], m.reason[:MAX_TEXT], m.first, m.tokens],
    Open: lambda m: [4, m.session, m.tokens, *_limits_to_wire(m.limits)],
    Commit: lambda m: [5, m.session, m.position, m.tokens],
    Nodes: lambda m: [6, m.session, m.seen, m.nodes],
    Close: lambda m: [7, m.session],
    Reject: lambda m: [8, m.session, m.code],
    Ping: lambda m: [9, m.sent_us],
    Pong: lambda m: [10, m.sent_us],
}
