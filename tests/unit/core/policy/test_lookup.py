"""Prompt lookup: what is found in a text, against a plain search; what guesses are worth; the session's use of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.draft import NO_DRAFT
from vllm_wanspec.core.messages import Limits, Nodes
from vllm_wanspec.core.policy import lookup
from vllm_wanspec.core.policy.lookup import LENGTHS, WINDOW_TOKENS, LookupRates, Text
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.turnaround import Turnaround


def text_of(tokens: list[int]) -> Text:
    text = Text()
    text.append(tokens)
    assert text.length == len(tokens)
    return text


def sought(text: list[int], limit: int) -> tuple[int, list[int]]:
    """Token by token, from the end."""
    for length in LENGTHS:
        last = text[-length:]
        for begin in range(len(text) - length - 1, -1, -1):
            if len(text) > length and text[begin : begin + length] == last:
                return length, text[begin + length : begin + length + limit]
    return 0, []


@given(st.lists(st.sampled_from([0, 1, 2, 256, 65536, 16777216]), max_size=40), st.integers(0, 9))
def test_it_finds_what_a_plain_search_finds(tokens: list[int], limit: int) -> None:
    assert text_of(tokens).continuation(limit) == sought(tokens, limit)


@given(
    st.lists(st.integers(0, 3), max_size=20),
    st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=4),
    st.lists(st.integers(0, 3), max_size=4),
)
def test_tokens_may_come_in_pieces_and_drafts_only_count_for_once(
    prompt: list[int], pieces: list[list[int]], drafted: list[int]
) -> None:
    text = text_of(prompt)
    for piece in pieces:
        text.append(piece)
    whole = prompt + [token for piece in pieces for token in piece]
    assert text.continuation(8, drafted) == sought(whole + drafted, 8)
    assert text.continuation(8) == sought(whole, 8)


def test_the_longest_match_wins_and_of_equal_ones_the_latest() -> None:
    assert text_of([1, 2, 3, 4, 9, 3, 5, 1, 2, 3]).continuation(2) == (3, [4, 9])
    assert text_of([1, 2, 7, 1, 2, 8, 1, 2]).continuation(1) == (2, [8])


def test_a_loop_goes_on() -> None:
    assert text_of([5, 6, 5, 6, 5]).continuation(8) == (3, [6, 5])


def test_what_lies_too_far_back_is_not_sought() -> None:
    assert text_of([7, 8, *range(10, 10 + WINDOW_TOKENS), 7]).continuation(2) == (0, [])
    assert text_of([7, 8, *range(10, 7 + WINDOW_TOKENS), 7]).continuation(1) == (1, [8])


def test_rates_are_learnt_per_length_and_per_token() -> None:
    rates = LookupRates()
    assert rates.chance[2] == 0.5
    assert rates.saw(2, [1, 2, 3], [1, 2, 4]) == 2
    assert rates.chance[2] == pytest.approx((1 + 2) / (2 + 3))
    assert rates.saw(2, [1, 2, 3], [1]) == 1  # of the others nothing is known
    assert rates.chance[2] == pytest.approx((1 + 3) / (2 + 4))
    assert rates.chance[3] == 0.5


def test_a_session_without_a_link_guesses_from_its_own_text() -> None:
    shared = Shared()
    session = ControllerSession([1, 2, 3, 4, 5, 1, 2, 3], shared)
    assert session.draft(8, 0.0, 0.0) == NO_DRAFT
    guess = session.fall_back(NO_DRAFT, 2, 0.0, 0.0)
    assert (guess.tokens, guess.expected) == ([4, 5], pytest.approx(0.5 + 0.25))
    session.commit([4, 9], 1.0, guess)
    assert (shared.counters.fallback_tokens, shared.counters.fallback_hits) == (2, 1)
    assert shared.lookup.chance[3] == pytest.approx((1 + 1) / (2 + 2))
    assert session.draft(8, 0.0, 1.0) == NO_DRAFT
    assert session.fall_back(NO_DRAFT, 8, 0.0, 1.0) == NO_DRAFT


def test_a_guess_ends_where_it_is_hardly_ever_taken() -> None:
    session = ControllerSession([1, 2, 3, 4, 5, 1, 2, 3], Shared())
    assert session.fall_back(NO_DRAFT, 8, 0.2, 0.0).tokens == [4, 5]  # 0.5, 0.25, 0.125
    assert session.fall_back(NO_DRAFT, 8, 0.6, 0.0).tokens == []


def prove_right(session: ControllerSession, shared: Shared) -> None:
    """The draft model turns out to be right, of such tokens as the session's next; the tree hears of it as ever."""
    tree = session.tree
    assert tree is not None
    for _ in range(400):
        shared.calibration.saw(tree._buckets[tree.best_path(1)[0]], True)
    tree._lay_path()


def test_a_draft_that_promises_little_gives_way_to_a_lookup_that_promises_more() -> None:
    shared = Shared()
    session = ControllerSession([1, 2, 3, 4, 5, 1, 2, 3], shared)
    session.open(1, Limits(8, 64, 2, 2, 4, 1.0, 0.0), 0.0, vocab_size=99, turnaround=Turnaround())
    unsure, sure = (NodeRecord(1, 0, 9, -5.0, 3.0), NodeRecord(2, 1, 1, -0.01, 0.1))
    session.receive(Nodes(1, 8, (unsure,)), 0.0)
    poor = session.draft(8, 0.0, 0.0)
    assert poor.tokens == [9]
    better = session.fall_back(poor, 2, 0.0, 0.0)
    assert (better.tokens, better.expected) == ([4, 5], pytest.approx(0.75))
    assert better.drafted == []
    session.receive(Nodes(1, 8, (sure,)), 0.0)
    prove_right(session, shared)
    good = session.draft(1, 0.0, 0.0)
    assert good.tokens == [9]
    assert good.expected > 0.9
    assert session.fall_back(good, 1, 0.0, 0.0) == good


def test_a_short_draft_is_lengthened() -> None:
    shared = Shared()
    session = ControllerSession([1, 2, 3, 4, 5, 6, 1, 2], shared)
    session.open(1, Limits(8, 64, 2, 2, 4, 1.0, 0.0), 0.0, vocab_size=99, turnaround=Turnaround())
    session.receive(Nodes(1, 8, (NodeRecord(1, 0, 3, -0.01, 0.1),)), 0.0)
    prove_right(session, shared)
    short = session.draft(8, 0.0, 0.0)
    alone = short.expected
    longer = session.fall_back(short, 3, 0.0, 0.0)
    assert longer.tokens == [3, 4, 5]
    assert (longer.drafted, longer.guess) == ([3], (4, 5))
    assert longer.expected == pytest.approx(alone + alone * 0.5 + alone * 0.25, rel=1e-3)
    session.commit([3, 4, 9], 1.0, longer)
    assert (shared.counters.fallback_tokens, shared.counters.fallback_hits, shared.counters.hits) == (2, 1, 0)


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=30), st.integers(1, 9))
def test_of_a_long_context_no_more_is_kept_than_is_sought_in(prompt: list[int], more: list[int], window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "WINDOW_TOKENS", window)
        followed, whole = Text(), Text()
        whole.append(prompt + more)
        followed.follow(prompt)
        assert len(followed._bytes) <= 4 * window
        followed.follow(prompt + more)
        assert followed.length == whole.length == len(prompt) + len(more)
        assert followed.continuation(8) == whole.continuation(8)
