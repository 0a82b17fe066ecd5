"""Messages: contexts in pieces, the plain form of the event log, and the vocabulary's fingerprint. Bytes: test_wire."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_strategies import any_message

from vllm_wanspec.core.messages import (
    MAX_COMMIT_TOKENS,
    Commit,
    Hello,
    Limits,
    Message,
    Nodes,
    Open,
    Reject,
    Resumed,
    from_plain,
    pieces,
    rest_of,
    to_plain,
    vocabulary_fingerprint,
    weight,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.errors import RemoteProtocolError

LIMITS = Limits(8, 64)

# Contexts in pieces


@pytest.mark.parametrize("total", [1, MAX_COMMIT_TOKENS, MAX_COMMIT_TOKENS + 1, 3 * MAX_COMMIT_TOKENS])
def test_a_context_travels_in_pieces_that_make_it_up(total: int) -> None:
    opened = Open(3, tuple(range(total)), LIMITS, temperature=0.5, priority=-2)
    first, *rest = pieces(opened)
    assert isinstance(first, Open)
    assert (first.session, first.limits, first.total, first.temperature, first.priority) == (3, LIMITS, total, 0.5, -2)
    together = list(first.tokens)
    for piece in rest:
        assert isinstance(piece, Commit)
        assert (piece.session, piece.position) == (3, len(together))
        assert 0 < len(piece.tokens) <= MAX_COMMIT_TOKENS
        together += piece.tokens
    assert together == list(range(total))


def test_a_first_piece_stays_one() -> None:
    first, *_ = pieces(Open(3, tuple(range(3 * MAX_COMMIT_TOKENS)), LIMITS))
    assert isinstance(first, Open)
    assert list(pieces(first)) == [first]


def test_what_has_been_added_since_is_no_part_of_a_context() -> None:
    growing = list(range(MAX_COMMIT_TOKENS + 10))
    parts = pieces(Open(1, growing, LIMITS, len(growing)))  # type: ignore[arg-type]
    first = next(parts)
    growing += [7] * 5000
    [rest] = parts
    assert isinstance(first, Open)
    assert isinstance(rest, Commit)
    assert (*first.tokens, *rest.tokens) == tuple(range(MAX_COMMIT_TOKENS + 10))


def test_one_that_resumes_travels_without_tokens_until_it_is_known_which_are_missing() -> None:
    [first] = pieces(Open(9, tuple(range(10_000)), LIMITS, resumes=Resumed("abc", 4)))
    assert first == Open(9, (), LIMITS, 10_000, resumes=Resumed("abc", 4))
    missing = list(rest_of(9, range(10_000), 9_000, 10_000))
    assert missing == [Commit(9, 9_000, tuple(range(9_000, 10_000)))]
    assert list(rest_of(9, range(10_000), 10_000, 10_000)) == []


def test_weights() -> None:
    node = NodeRecord(1, 0, 5, -0.5, 1.0)
    assert [weight(message) for message in (Reject(1, "gap"), Commit(1, 2, (3, 4)), Nodes(1, 2, (node,)))] == [1, 3, 2]
    assert weight(Open(1, (1, 2, 3), LIMITS)) == 4


@pytest.mark.parametrize("make", [lambda: Reject(1, "because"), lambda: Hello(1, "", "", b"x" * 9)])
def test_what_no_side_may_say_cannot_be_made(make: object) -> None:
    with pytest.raises(ValueError, match=r"reject code|digests"):
        make()  # type: ignore[operator]


# The plain form


@settings(max_examples=150, deadline=None)
@given(any_message)
def test_a_message_comes_back_from_its_plain_form_and_from_json(message: Message) -> None:
    assert from_plain(to_plain(message)) == message
    assert from_plain(json.loads(json.dumps(to_plain(message)))) == message


def test_nodes_are_plain_with_their_ids() -> None:
    message = Nodes(1, 9, (NodeRecord(4, 2, 77, -0.25, 1.5),))
    assert json.loads(json.dumps(to_plain(message))) == [6, 1, 9, [[4, 2, 77, -0.25, 1.5]]]


def test_an_open_s_plain_form_ends_where_its_context_does() -> None:
    growing = [5, 6, 7]
    opened = Open(1, growing, LIMITS, 3)  # type: ignore[arg-type]
    growing.append(8)
    assert to_plain(opened)[:3] == [4, 1, (5, 6, 7)]


@pytest.mark.parametrize("item", [None, [], [7], {"a": 1}, [7, "1"], [99, 1], ["7", 1], [8, 1, "because"], 7])
def test_what_stands_for_no_message(item: object) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        from_plain(item)
    assert len(str(caught.value)) <= 150


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
