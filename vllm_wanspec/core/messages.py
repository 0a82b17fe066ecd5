"""The messages of protocol version 1, and what bounds them; `core.wire` has their bytes.

A message is a short array whose first item is its type. Whoever reads one from outside gets it from `core.wire` or
`from_plain`, checked for types, sizes and ranges. It must not know sessions or trees.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.vocabulary import CHUNK, DIGEST_BYTES, MAX_APART, MAX_CHUNKS, MAX_TOKEN_BYTES, token_bytes
from vllm_wanspec.errors import RemoteProtocolError

PROTOCOL_VERSION = 1
PATH = "/wanspec/v1"
MAX_TOKEN = 2**24 - 1
"""A token travels in three bytes."""
MAX_ID = 2**53
MAX_CONTEXT_TOKENS = 1024 * 1024
MAX_COMMIT_TOKENS = 4096
"""Of one message; a longer context goes on in the next one."""
MAX_NODES_PER_MESSAGE = 4096
MAX_TEXT = 512
MAX_RUNNING_BRANCHES = 1024
MAX_BRANCHES = 64
MAX_DEPTH = 4096
MAX_TEMPERATURE = 100.0

REJECT_CODES = frozenset({"unknown", "overloaded", "too_long", "vocabulary", "gap", "engine"})
"""``unknown``: no such session; ``overloaded``: too many sessions; ``too_long``: context over the draft model's
maximum; ``vocabulary``: the context has a token that the draft model lacks; ``gap``: a commit began after the known
context; ``engine``: the draft engine failed."""

Id = Annotated[int, Meta(ge=0, le=MAX_ID)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN)]
Count = Annotated[int, Meta(ge=1, le=MAX_TOKEN + 1)]
Version = Annotated[int, Meta(ge=0, le=2**16)]
Percent = Annotated[int, Meta(ge=0, le=2**16)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Digests = Annotated[bytes, Meta(max_length=MAX_CHUNKS * DIGEST_BYTES)]
Part = Annotated[bytes, Meta(max_length=MAX_TOKEN_BYTES)] | None


class Fields(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """What all messages are: arrays of the fields in their order."""


class Hello(Fields, tag=1, frozen=True):
    """Controller's first message: protocol version, vocabulary fingerprint (hex) and who it is.

    ``digests`` is of its tokens (`Tokens.digests`); empty where it does not say. The ids ``apart`` may differ: they are
    part of neither fingerprint nor digests.
    """

    version: Version
    fingerprint: Text
    client: Text
    digests: Digests = b""
    apart: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_APART)] = ()

    def __post_init__(self) -> None:
        """Hold digests against their size, also where they come from the wire."""
        if len(self.digests) % DIGEST_BYTES:
            raise ValueError(f"digests of {len(self.digests)} bytes, not of {DIGEST_BYTES} each")


class Welcome(Fields, tag=2, frozen=True):
    """Drafter's answer: it will take sessions.

    ``vocab_size`` counts the ids that its tokenizer really has; ``max_context`` is the longest context in tokens that
    its draft model takes; ``max_sessions`` and ``max_nodes`` are per connection and per session; ``load`` as in `Pong`.
    """

    version: Version
    model: Text
    vocab_size: Count
    fingerprint: Text
    max_sessions: Count
    max_nodes: Count
    max_context: Count
    load: Percent = 0


class Refuse(Fields, tag=3, frozen=True):
    """Drafter's answer: it will not serve this controller. ``code``: ``version``, ``vocabulary`` or ``protocol``.

    ``tokens`` are its own of the ids from ``first`` on, some of which differ from the controller's.
    """

    code: Text
    reason: Text
    first: TokenId = 0
    tokens: Annotated[tuple[Part, ...], Meta(max_length=CHUNK)] = ()


class Limits(Fields, frozen=True):
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
        leaves: Most probable tokens that are sent of every position, whether or not any is followed: what a sampled
            draft is drawn from.
    """

    lookahead: Count
    max_nodes: Count
    max_branches: Annotated[int, Meta(ge=1, le=MAX_BRANCHES)] = 1
    running_branches: Annotated[int, Meta(ge=1, le=MAX_RUNNING_BRANCHES)] = 1
    branch_depth: Annotated[int, Meta(ge=1, le=MAX_DEPTH)] = 8
    entropy_threshold_nats: Annotated[float, Meta(ge=0.0)] | None = 0.0
    min_probability: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    leaves: Annotated[int, Meta(ge=1, le=MAX_BRANCHES)] = 1


class Resumed(Fields, frozen=True):
    """A session of an earlier connection: its client, as `Hello` named it, and its number."""

    client: Text
    session: Id


class Open(Fields, tag=4, frozen=True):
    """Begin a session with a context of ``length`` tokens; drafting begins when all of them are there.

    On the wire ``tokens`` are the first of them, and commits bring the rest (`pieces`). They may be a list that goes on
    growing: the first ``length`` of it count.

    Attributes:
        length: 0 where it is the length of ``tokens``.
        temperature: That the target samples at; 0 is greedy.
        priority: Of the request, as vLLM has it: lower ones come first.
        resumes: Whose context to go on with, as far as the drafter still has it; it says so with `Have`.
        on_demand: Whether it is drafted for only where a `Want` asks for it.
    """

    session: Id
    tokens: tuple[TokenId, ...]
    limits: Limits
    length: Annotated[int, Meta(ge=0, le=MAX_CONTEXT_TOKENS)] = 0
    temperature: Annotated[float, Meta(ge=0.0, le=MAX_TEMPERATURE)] = 0.0
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] = 0
    resumes: Resumed | None = None
    on_demand: bool = False

    @property
    def total(self) -> int:
        """Tokens in the context."""
        return self.length or len(self.tokens)


class Commit(Fields, tag=5, frozen=True):
    """Verified tokens from absolute ``position`` on (tokens in the context before them): idempotent."""

    session: Id
    position: Id
    tokens: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_COMMIT_TOKENS)]


class Nodes(Fields, tag=6, frozen=True):
    """Drafted nodes, of successive ids; ``seen`` is the committed length that the drafter knew when it drafted them."""

    session: Id
    seen: Id
    nodes: Annotated[tuple[NodeRecord, ...], Meta(max_length=MAX_NODES_PER_MESSAGE)]


class Close(Fields, tag=7, frozen=True):
    """The session's request has finished or was aborted."""

    session: Id


class Reject(Fields, tag=8, frozen=True):
    """The drafter has no such session any more, or takes none: one of `REJECT_CODES`."""

    session: Id
    code: Text

    def __post_init__(self) -> None:
        """Take no other code, also from the wire."""
        if self.code not in REJECT_CODES:
            raise ValueError("that is no reject code")


class Ping(Fields, tag=9, frozen=True):
    """Round trip probe; ``number`` is the sender's own and comes back unread."""

    number: Id


class Pong(Fields, tag=10, frozen=True):
    """Answer to `Ping` with its ``number``; ``load``: sessions in percent of the places of the engine."""

    number: Id
    load: Percent = 0


class Drain(Fields, tag=11, frozen=True):
    """The drafter takes no new sessions: it is about to end."""


class Have(Fields, tag=12, frozen=True):
    """Answer to an `Open` that resumes: so many tokens of the context are there; commits go on from ``position``."""

    session: Id
    position: Id


class Want(Fields, tag=13, frozen=True):
    """Draft up to ``tokens`` beyond the context that is known by then, for a session that is drafted for on demand."""

    session: Id
    tokens: Count


Message = Hello | Welcome | Refuse | Open | Commit | Nodes | Close | Reject | Ping | Pong | Drain | Have | Want
ToDrafter = Hello | Open | Commit | Close | Ping | Want
ToController = Welcome | Refuse | Nodes | Reject | Pong | Drain | Have


def vocabulary_fingerprint(vocabulary: Mapping[Any, int]) -> str:
    """SHA-256 (hex) of an id-to-token map over its real entries: equal where both sides mean the same by each id.

    Args:
        vocabulary: Token (text or bytes) to id, as tokenizers give it (``get_vocab()``); padding of the model's
            embedding is not part of it.
    """
    entries = sorted((index, token_bytes(token)) for token, index in vocabulary.items())
    lines = b"".join(b"%d\t%d\t%s\n" % (index, len(token), token) for index, token in entries)
    return hashlib.sha256(lines).hexdigest()


def pieces(opened: Open) -> Iterator[Open | Commit]:
    """An `Open` as it travels: with the first tokens of its context, and commits that bring the rest.

    One that resumes travels alone, and without tokens: which are missing the drafter has yet to say.
    """
    total, tokens = opened.total, opened.tokens
    first = () if opened.resumes else tuple(tokens[: min(total, MAX_COMMIT_TOKENS)])
    yield msgspec.structs.replace(opened, tokens=first, length=total)
    if not opened.resumes and len(tokens) >= total:  # one that is a first piece already has its rest elsewhere
        yield from rest_of(opened.session, tokens, len(first), total)


def rest_of(session: int, tokens: Sequence[int], position: int, total: int) -> Iterator[Commit]:
    """The commits that bring a context's first ``total`` tokens from ``position`` on."""
    for begin in range(position, total, MAX_COMMIT_TOKENS):
        yield Commit(session, begin, tuple(tokens[begin : min(total, begin + MAX_COMMIT_TOKENS)]))


def weight(message: Message) -> int:
    """How much a message takes of a frame, and of whoever takes it: one, and its nodes and tokens."""
    match message:
        case Nodes():
            return 1 + len(message.nodes)
        case Commit() | Open():
            return 1 + len(message.tokens)
        case _:
            return 1


def to_plain(message: Message) -> list[Any]:
    """A message as JSON's types, for the event log; nodes with their ids and parents."""
    if isinstance(message, Open):
        message = msgspec.structs.replace(message, tokens=tuple(message.tokens[: message.total]))
    plain: list[Any] = msgspec.to_builtins(message)
    return plain


def from_plain(item: object) -> Message:
    """The message that `to_plain` gave, also after JSON.

    Raises:
        RemoteProtocolError: It is none.
    """
    try:
        return msgspec.convert(item, Message)  # type: ignore[no-any-return]
    except (msgspec.ValidationError, RecursionError) as error:
        raise RemoteProtocolError(f"not a message: {error}"[:150]) from error
