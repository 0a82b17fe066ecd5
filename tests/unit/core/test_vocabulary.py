"""Vocabularies: their fingerprints, and where two of them differ."""

import random

import msgpack
import pytest

from vllm_wanspec.core.messages import Hello, Refuse, vocabulary_fingerprint
from vllm_wanspec.core.vocabulary import CHUNK, DIGEST_BYTES, MAX_CHUNKS, MAX_TOKEN_BYTES, Tokens
from vllm_wanspec.core.wire import MAX_CONTROLLERS_BYTES, decode, encode
from vllm_wanspec.errors import RemoteProtocolError


def test_tokens_of_bytes_have_a_fingerprint() -> None:
    texts = {"a": 0, "ä": 1}
    raw = {token.encode(): index for token, index in texts.items()}
    assert vocabulary_fingerprint(raw) == vocabulary_fingerprint(texts)
    assert vocabulary_fingerprint({b"\xff": 0}) != vocabulary_fingerprint({b"\xfe": 0})
    assert vocabulary_fingerprint({b"a": 0, "b": 1}) == vocabulary_fingerprint({"a": 0, "b": 1})


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_one_id_that_differs_is_found_wherever_it_is(size: int) -> None:
    rng = random.Random(size)
    ours = {f"t{index}": index for index in range(size)}
    for index in {0, size - 1, rng.randrange(size)}:
        theirs = {"<x>" if place == index else token: place for token, place in ours.items()}
        here, there = Tokens.of(ours), Tokens.of(theirs)
        first = there.first_difference(here.digests)
        assert first == index // CHUNK * CHUNK
        assert here.named(first, there.chunk(first)) == f"{index}: 't{index}' here, '<x>' there"
    assert Tokens.of(ours).first_difference(Tokens.of(dict(reversed(ours.items()))).digests) is None


@pytest.mark.parametrize("more", [1, CHUNK, CHUNK + 1])
def test_a_longer_vocabulary_differs_where_the_other_ends(more: int) -> None:
    short = {f"t{index}": index for index in range(CHUNK)}
    long = {f"t{index}": index for index in range(CHUNK + more)}
    for here, there, says in ((short, long, "nothing here, 't512' there"), (long, short, "'t512' here, nothing there")):
        first = Tokens.of(there).first_difference(Tokens.of(here).digests)
        assert first == CHUNK
        assert Tokens.of(here).named(first, Tokens.of(there).chunk(first)).startswith(f"512: {says}")


def test_gaps_and_tokens_that_share_an_id_count() -> None:
    base = {"a": 0, "c": 2}
    for other in ({"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 2, "d": 2}, {"a": 0}):
        assert Tokens.of(other).first_difference(Tokens.of(base).digests) == 0
    assert Tokens.of({"d": 2, "c": 2}).digests == Tokens.of({"c": 2, "d": 2}).digests
    assert Tokens.of({}).digests == b""


def test_what_is_named_is_short_and_escaped() -> None:
    ours = Tokens.of({"x" * 1000 + str(index): index for index in range(9)})
    theirs = Tokens.of({"\x1b[2J\n\u202e" + "y" * 1000 + str(index): index for index in range(9)})
    line = ours.named(0, theirs.chunk(0))
    assert line.isprintable()
    assert len(line) < 400
    assert line.endswith("; and more")
    same_start = Tokens.of({"x" * 1000 + str(index) + "z": index for index in range(9)})
    assert ours.named(0, same_start.chunk(0)) == "among ids 0 to 511, in long tokens"
    assert "'\\\\xff' here" in Tokens.of({b"\xff": 0}).named(0, (b"a",))


def test_who_says_nothing_is_told_nothing() -> None:
    assert Tokens.of({"a": 0}).first_difference(b"") is None
    assert Tokens().first_difference(b"12345678") is None


def test_the_largest_vocabulary_travels() -> None:
    tokens = Tokens([b"t" * 100] * (CHUNK * (MAX_CHUNKS + 5)))
    hello, refuse = Hello(1, "ab" * 32, "c", tokens.digests), Refuse("vocabulary", "other", 512, tokens.chunk(512))
    assert len(hello.digests) == MAX_CHUNKS * DIGEST_BYTES
    for message in (hello, refuse):
        frame = encode([message])
        assert decode(frame) == [message]
        assert len(frame) < MAX_CONTROLLERS_BYTES


@pytest.mark.parametrize(
    "message",
    [
        [1, 1, "f", "c", b"1234567"],
        [1, 1, "f", "c", "12345678"],
        [1, 1, "f", "c", b"x" * (DIGEST_BYTES * (MAX_CHUNKS + 1))],
        [3, "vocabulary", "r", 0, b"x"],
        [3, "vocabulary", "r", 0, ["x"]],
        [3, "vocabulary", "r", 0, [b"x" * (MAX_TOKEN_BYTES + 1)]],
        [3, "vocabulary", "r", 0, [b"x"] * (CHUNK + 1)],
        [3, "vocabulary", "r", -1, []],
    ],
)
def test_what_is_no_vocabulary_is_a_breach_of_the_protocol(message: list[object]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(msgpack.packb([message]))
