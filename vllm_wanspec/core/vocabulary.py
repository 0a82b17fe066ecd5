"""Vocabularies by id: to find where two of them differ, and to name what does, with few bytes on the wire.

Ids are taken in chunks. One side sends a digest of each of its chunks; the other, which finds the first that differs,
sends its own tokens of that one.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

CHUNK = 512
"""Ids that one digest stands for."""
DIGEST_BYTES = 8
MAX_CHUNKS = 4096
MAX_APART = 256
MAX_TOKEN_BYTES = 48
"""Of a token on the wire; longer ones are cut off there."""
_SHOWN = 3
_SHOWN_CHARACTERS = 24

Token = bytes | None
"""None: no token has that id."""


class Tokens:
    """A vocabulary's tokens by id; those of the ids ``apart`` are left out wherever vocabularies are compared."""

    def __init__(self, tokens: Sequence[Token] = (), apart: Collection[int] = ()) -> None:
        """Take the token of each id, from 0 on."""
        self.by_id = tokens
        self.apart = frozenset(apart)

    @classmethod
    def of(cls, vocabulary: Mapping[Any, int], apart: Collection[int] = ()) -> "Tokens":
        """Those of a map from token (text or bytes) to id, as tokenizers give it (``get_vocab()``)."""
        tokens: list[Token] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in sorted(vocabulary.items(), key=lambda item: token_bytes(item[0])):
            known, own = tokens[index], token_bytes(token)
            tokens[index] = own if known is None else known + b"\n" + own
        return cls(tokens, apart)

    @property
    def fingerprint(self) -> str:
        """As `vocabulary_fingerprint`, of what is compared."""
        compared = enumerate(self._compared(0, len(self.by_id)))
        lines = (b"%d\t%d\t%s\n" % (index, len(token), token) for index, token in compared if token is not None)
        return hashlib.sha256(b"".join(lines)).hexdigest()

    @cached_property
    def digests(self) -> bytes:
        """`DIGEST_BYTES` for each chunk."""
        count = min(MAX_CHUNKS, -(-len(self.by_id) // CHUNK))
        return b"".join(self._digest(chunk * CHUNK) for chunk in range(count))

    def first_difference(self, digests: bytes) -> int | None:
        """The first id of the first chunk that differs from another vocabulary's; None where none is known to."""
        if not digests or not self.by_id:
            return None
        for place in range(0, max(len(digests), len(self.digests)), DIGEST_BYTES):
            if self.digests[place : place + DIGEST_BYTES] != digests[place : place + DIGEST_BYTES]:
                return place // DIGEST_BYTES * CHUNK
        return None

    def chunk(self, first: int) -> tuple[Token, ...]:
        """The tokens of the chunk from id ``first`` on, cut off at `MAX_TOKEN_BYTES`."""
        return tuple(token and token[:MAX_TOKEN_BYTES] for token in self._compared(first, CHUNK))

    def named(self, first: int, theirs: Sequence[Token]) -> str:
        """The first ids whose tokens differ from another vocabulary's chunk, with both tokens, escaped and short."""
        ours = self.chunk(first)
        different: list[str] = []
        for place in range(max(len(ours), len(theirs))):
            here = ours[place] if place < len(ours) else None
            there = theirs[place] if place < len(theirs) else None
            if here == there:
                continue
            if len(different) == _SHOWN:
                return "; ".join([*different, "and more"])
            different.append(f"{first + place}: {_shown(here)} here, {_shown(there)} there")
        return "; ".join(different) or f"among ids {first} to {first + CHUNK - 1}, in long tokens"

    def _compared(self, first: int, count: int) -> list[Token]:
        tokens = enumerate(self.by_id[first : first + count], first)
        return [None if index in self.apart else token for index, token in tokens]

    def _digest(self, first: int) -> bytes:
        chunk = self._compared(first, CHUNK)
        lines = b"".join(b"-" if token is None else b"%d\t%s\n" % (len(token), token) for token in chunk)
        return hashlib.sha256(lines).digest()[:DIGEST_BYTES]


def token_bytes(token: str | bytes) -> bytes:
    """A token as bytes, whatever its tokenizer has it as."""
    return token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")


def _shown(token: Token) -> str:
    if token is None:
        return "nothing"
    text = token.decode("utf-8", "backslashreplace")
    return repr(text[:_SHOWN_CHARACTERS]) + ("…" if len(text) > _SHOWN_CHARACTERS else "")
