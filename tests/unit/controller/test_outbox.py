"""Outbox: what goes when. Each session's own order, short before long, contexts in turn, and no more than is needed."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import limits

from vllm_wanspec.controller import outbox as outbox_module
from vllm_wanspec.controller.outbox import Outbox
from vllm_wanspec.core.messages import MAX_COMMIT_TOKENS, Close, Commit, Have, Message, Open, Ping, Resumed, weight
from vllm_wanspec.errors import RemoteProtocolError

PIECE = MAX_COMMIT_TOKENS
LIMITS = limits(8, 64)


def opened(number: int, length: int) -> Open:
    return Open(number, tuple(range(length)), LIMITS)


def drained(outbox: Outbox) -> list[list[Message]]:
    """All that can be sent, round by round."""
    rounds = []
    while outbox:
        rounds.append(outbox.take())
    return rounds


def flat(rounds: list[list[Message]]) -> list[Message]:
    return [message for batch in rounds for message in batch]


def test_short_contexts_go_at_once_and_in_order() -> None:
    outbox = Outbox()
    for number in (1, 2, 3):
        outbox.put(opened(number, 5))
        outbox.put(Commit(number, 5, (9,)))
    outbox.put(Ping(7))
    [batch] = drained(outbox)
    assert batch[0] == Ping(7)
    for number in (1, 2, 3):
        mine = [message for message in batch if getattr(message, "session", 0) == number]
        assert [type(message) for message in mine] == [Open, Commit]
    assert not outbox
    outbox.put(Commit(2, 6, (8,)))
    assert outbox.take() == [Commit(2, 6, (8,))]


def test_others_speak_between_the_pieces_of_a_long_context() -> None:
    outbox = Outbox()
    outbox.put(opened(1, 3))
    outbox.take()
    outbox.put(opened(2, 10 * PIECE))
    outbox.put(Commit(1, 3, (4,)))
    first = outbox.take()
    assert first[0] == Commit(1, 3, (4,))
    assert sum(map(weight, first)) <= 2 + PIECE + 1
    outbox.put(Commit(1, 4, (5,)))
    assert outbox.take()[0] == Commit(1, 4, (5,))


def test_what_a_session_says_waits_for_its_context() -> None:
    outbox = Outbox()
    outbox.put(opened(2, 3 * PIECE))
    outbox.put(Commit(2, 3 * PIECE, (4,)))
    outbox.take()
    outbox.put(Commit(2, 3 * PIECE + 1, (5,)))
    sent = flat(drained(outbox))
    assert [(type(message), message.position) for message in sent if isinstance(message, Commit)] == [
        (Commit, PIECE),
        (Commit, 2 * PIECE),
        (Commit, 3 * PIECE),
        (Commit, 3 * PIECE + 1),
    ]


def test_long_contexts_take_turns() -> None:
    outbox = Outbox()
    for number in (1, 2, 3):
        outbox.put(opened(number, 4 * PIECE))
    sent = [message.session for message in flat(drained(outbox))]  # type: ignore[union-attr]
    assert sorted(sent[:3]) == sorted(sent[3:6]) == [1, 2, 3]
    assert len(sent) == 12


def test_a_session_that_is_over_before_it_began_is_never_sent() -> None:
    outbox = Outbox()
    outbox.put(opened(1, 5))
    outbox.put(Commit(1, 5, (9,)))
    outbox.put(Close(1))
    assert outbox.context_tokens == 0
    assert flat(drained(outbox)) == []


def test_a_session_that_is_over_in_the_middle_of_its_context_is_closed() -> None:
    outbox = Outbox()
    outbox.put(opened(1, 5 * PIECE))
    outbox.take()
    outbox.put(Commit(1, 5 * PIECE, (9,)))
    outbox.put(Close(1))
    assert flat(drained(outbox)) == [Close(1)]
    assert outbox.context_tokens == 0
    outbox.put(Commit(1, 5 * PIECE + 1, (9,)))
    assert flat(drained(outbox)) == []


def test_what_waited_for_another_connection_is_forgotten() -> None:
    outbox = Outbox()
    outbox.put(opened(1, 5))
    outbox.take()
    outbox.put(opened(2, 5 * PIECE))
    outbox.take()
    outbox.clear()
    outbox.put(Commit(1, 5, (9,)))
    outbox.put(Commit(2, 5, (9,)))
    assert flat(drained(outbox)) == []


@pytest.mark.parametrize("known", [0, 1, PIECE, 2 * PIECE + 5])
def test_one_that_resumes_goes_on_where_the_drafter_says(known: int) -> None:
    length = 2 * PIECE + 5
    outbox = Outbox()
    outbox.put(Open(4, tuple(range(length)), LIMITS, resumes=Resumed("me", 2)))
    outbox.put(Commit(4, length, (9,)))
    [first] = flat(drained(outbox))
    assert isinstance(first, Open)
    assert (first.tokens, first.length) == ((), length)
    assert not outbox  # nothing can be sent until it answers
    outbox.resume(Have(4, known))
    sent = flat(drained(outbox))
    assert all(isinstance(message, Commit) for message in sent)
    assert [token for message in sent for token in message.tokens] == [*range(known, length), 9]  # type: ignore[union-attr]
    assert [message.position for message in sent] == [*range(known, length, PIECE), length]  # type: ignore[union-attr]


def test_what_no_drafter_can_have() -> None:
    outbox = Outbox()
    outbox.put(Open(4, (1, 2, 3), LIMITS, resumes=Resumed("me", 2)))
    outbox.put(opened(5, 3))
    outbox.take()
    drained(outbox)
    with pytest.raises(RemoteProtocolError, match="has 4 tokens of session 4's 3"):
        outbox.resume(Have(4, 4))
    with pytest.raises(RemoteProtocolError, match="does not resume"):
        outbox.resume(Have(5, 1))
    outbox.resume(Have(9, 1))  # closed meanwhile
    outbox.resume(Have(4, 3))
    with pytest.raises(RemoteProtocolError, match="session 4"):
        outbox.resume(Have(4, 3))


@pytest.mark.parametrize("length", [5, 5 * PIECE])
def test_nothing_more_is_sent_of_a_session_that_was_rejected(length: int) -> None:
    outbox = Outbox()
    outbox.put(opened(1, length))
    outbox.take()
    outbox.forget(1)
    outbox.put(Commit(1, length, (9,)))
    assert flat(drained(outbox)) == []
    assert (outbox.context_tokens, outbox._served) == (0, set())


def test_it_says_when_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_WAITING", 10)
    outbox = Outbox()
    outbox.extend([Commit(1, index, (1,)) for index in range(10)])
    assert not outbox.overflows
    outbox.put(Ping(1))
    assert outbox.overflows


operations = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(1, 3 * PIECE)),
        st.tuples(st.just("commit"), st.integers(0, 5)),
        st.tuples(st.just("close"), st.integers(0, 5)),
        st.tuples(st.just("take"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(operations)
def test_every_session_s_text_arrives_whole_and_in_order(script: list[tuple[str, int]]) -> None:
    outbox, texts, live, sent = Outbox(), {}, [], []
    for name, value in script:
        if name == "open":
            number = len(texts) + 1
            texts[number] = list(range(value))
            live.append(number)
            outbox.put(opened(number, value))
        elif name == "take":
            sent += outbox.take()
        elif live:
            number = live[value % len(live)]
            if name == "close":
                live.remove(number)
                outbox.put(Close(number))
            else:
                outbox.extend([Commit(number, len(texts[number]), (7,))])
                texts[number].append(7)
    sent += flat(drained(outbox))
    arrived: dict[int, list[int]] = defaultdict(list)
    closed = set()
    for message in sent:
        assert message.session not in closed
        match message:
            case Open(session=number):
                assert number not in arrived
                arrived[number] += message.tokens
            case Commit(session=number):
                assert number in arrived
                assert message.position == len(arrived[number])
                arrived[number] += message.tokens
            case Close(session=number):
                assert number in arrived
                closed.add(number)
    for number in live:
        assert arrived[number] == texts[number]
    assert closed <= set(texts) - set(live)
    assert set(arrived) - closed == set(live)
