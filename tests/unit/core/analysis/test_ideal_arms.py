"""The ideal of each kind of arm: timelines drawn by hand, and what holds for every text.

Unless a test says otherwise: R = 20 ms, target forwards of 30 ms, draft forwards of 5 ms, at most 4 drafts a step. The
drafter gets the prompt at 10 - 30 = -20 ms, so that it has the distribution of token i at -15 + 5 i ms as long as it
knows the tokens before, and the target has the draft 10 ms later.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_wanspec.core.analysis.ideal import (
    UNLIMITED,
    TextLookup,
    Width,
    colocated_decode_ms,
    ideal_decode_ms,
    lookup_decode_ms,
    oracle_decode_ms,
    plain_decode_ms,
)
from vllm_wanspec.core.policy.lookup import Text

Ranks = Sequence[int | None]
PROMPT = (1, 2, 3, 4, 5, 6, 7, 8, 9, 1)


def per_token_ms(tokens: int) -> float:
    """1 ms more per token, but not for the prompt: the drafter is no earlier than where tokens cost nothing."""
    return 30.0 + (tokens if tokens < len(PROMPT) else 0)


def ideal(ranks: Ranks, **changes: Any) -> float:
    times: dict[str, Any] = {"rtt_ms": 20.0, "target_ms": lambda tokens: 30.0, "draft_ms": lambda tokens: 5.0}
    return ideal_decode_ms(ranks, 10, **(times | {"limit": 4} | changes))


def colocated(ranks: Ranks, gamma: int, **changes: Any) -> float:
    times: dict[str, Any] = {"target_ms": per_token_ms, "draft_ms": lambda tokens: 4.0 + tokens, "limit": 4}
    return colocated_decode_ms(ranks, **(times | {"gamma": gamma} | changes))


# The drafter across the WAN, without bounds


def test_without_a_round_trip_all_that_is_drafted_is_there() -> None:
    """Draft i is made at -25 + 5 i ms, and there at once.

    ms       -20  -15  -10   -5    0 |.. 5   10   15   20   25   30 |
    drafted    1    2    3    4    5 |   6    7    8    9   10   11 |
    step                             | 1 2 3 4, then 5              | 6 7 8 9, then 10
    """
    assert ideal((0,) * 6, rtt_ms=0.0) == 30.0
    assert ideal((0,) * 7, rtt_ms=0.0) == ideal((0,) * 11, rtt_ms=0.0) == 60.0
    # With room for eight, the five that are there make the first step, and the six up to 11 the second.
    assert ideal((0,) * 7, rtt_ms=0.0, limit=8) == 30.0
    assert ideal((0,) * 13, rtt_ms=0.0, limit=8) == 60.0
    assert ideal((0,) * 14, rtt_ms=0.0, limit=8) == 90.0


@pytest.mark.parametrize(
    ("rtt_ms", "mixed_ms", "agreed_ms"),
    [(0.0, 922.2, 286.0), (30.0, 1273.6, 321.0), (70.0, 1478.1, 356.0), (100.0, 1793.7, 391.0)],
)
def test_without_bounds_it_is_what_recorded_results_were_held_against(
    rtt_ms: float, mixed_ms: float, agreed_ms: float
) -> None:
    settings: dict[str, Any] = {
        "rtt_ms": rtt_ms,
        "target_ms": lambda tokens: 35.0 + 0.1 * tokens,
        "draft_ms": lambda tokens: 5.0 + 0.02 * tokens,
        "limit": 8,
    }
    mixed = (0, 0, None, 1, 0, 2, 0, None, 0, 0, 0, 0) * 5
    assert ideal_decode_ms(mixed, 300, **settings) == pytest.approx(mixed_ms)
    assert ideal_decode_ms((0,) * 60, 300, **settings) == pytest.approx(agreed_ms)
    assert ideal_decode_ms(mixed, 300, width=Width(8, 1, 60), **settings) == pytest.approx(mixed_ms)


# At the width and pace used


def test_a_token_beyond_the_alternatives_is_drafted_after_only_when_it_is_told() -> None:
    """Token 1 has place 3, so that it is the fourth alternative.

    ms               -10  -5   0   5 |      30      40  45  50   |        60           |       90
    4 alternatives:    1   2   3   4 | 1 wrong | 2 3 4           |
    3 alternatives:    1             | 1 wrong | nothing: 2      | 3, then 4           |
                                               told ^   2   3 (there at 55, 60)
    """
    ranks = (0, 3, 0, 0, 0)
    assert ideal(ranks, width=Width(alternatives=4)) == ideal(ranks) == 60.0
    assert ideal(ranks, width=Width(alternatives=3)) == ideal((0, None, 0, 0, 0)) == 90.0


def test_the_main_line_alone_is_a_tree_of_one_alternative() -> None:
    assert ideal((0,) * 9, width=Width(alternatives=1, depth=0)) == ideal((0,) * 9)
    assert ideal((0, 1, 0, 0, 0), width=Width(alternatives=1)) == ideal((0, None, 0, 0, 0))


def test_a_branch_rests_at_its_depth_until_the_drafter_is_told() -> None:
    """Token 1 has place 2, the text goes on as the draft model says. Its branch begins at -10 ms.

    ms         -10  -5   0   5  10 |   30     40  45  50  55  60 |              90
    no bound:    1   2   3   4   5 |  2 3 4 5, then 6           |
    depth 2:     1   2   3    rests until told ^   4   5   6    |
               (there at)          |  2 3, then 4  55  60  65   | 5, then 6    |
    depth 1:     1   2        rests until told ^   3   4   5    |
               (there at)          |  2, then 3    55  60  65   | 4, then 5    | 6
    """
    ranks = (0, 2, 0, 0, 0, 0, 0)
    assert ideal(ranks) == ideal(ranks, width=Width(depth=8)) == 60.0
    assert ideal(ranks, width=Width(depth=2)) == 90.0
    assert ideal(ranks, width=Width(depth=1)) == 120.0
    assert ideal(ranks[:6], width=Width(depth=1)) == 90.0


def test_a_branch_of_a_branch_has_a_depth_of_its_own() -> None:
    """R = 60 ms, depth 1: distribution i is drafted at 5 + 5 i ms and there 30 ms later.

    ms             0 |                 30 |      45      50       60 |                       90
    step             | nothing there: 1   | 2 is there at 45: 2      | 3 there at 50, then 4 |
    drafted: 1 at 10, 2 at 15 (branch at 1), 3 at 20 (branch at 2); 4 when it is told of 2, at 60 + 30 ms
    """
    width = Width(depth=1)
    assert ideal((0, 2, 1, 0, 0), rtt_ms=60.0, width=width) == 90.0
    # Were token 2 the most probable one, its branch would be that of token 1, and 3 beyond it: told at 60, there at 95.
    assert ideal((0, 2, 0, 0, 0), rtt_ms=60.0, width=width) == 120.0


def test_what_a_branch_has_no_more_is_not_verified_in_vain() -> None:
    """R = 60 ms: draft i of the branch at token 1 is made at 5 + 5 i ms, and there 30 ms later.

    ms          0 |            31 |            62 |
    no bound      | nothing: 1    | nothing: 2    | 3 (there at 50) is wrong; 4 and 5 (at 55, 60) went on from it
    depth 2       | nothing: 1    | nothing: 2    | 3 is wrong; 4 rests until the drafter is told of 1, at 61 ms
    """
    ranks = (0, 2, 0, 3)
    assert ideal(ranks, rtt_ms=60.0, target_ms=per_token_ms) == 31.0 + 31.0 + 34.0
    assert ideal(ranks, rtt_ms=60.0, target_ms=per_token_ms, width=Width(depth=2)) == 31.0 + 31.0 + 32.0


def test_branches_that_run_together_share_a_forward() -> None:
    """Draft forwards of 4 ms + 1 ms per token: 14 ms for the prompt, then 5 ms alone, 8 ms when four run.

    alone:  drafts 1 .. 5 made at -1, 4, 9, 14, 19 ms, there at 9 .. 29 ms: the step at 30 ms has four, up to token 5
    four:   drafts 1 .. 4 made at 2, 10, 18, 26 ms, there at 12, 20, 28, 36 ms: the step at 30 ms has tokens 2 and 3
    """
    slower: dict[str, Any] = {"draft_ms": lambda tokens: 4.0 + tokens}
    assert ideal((0,) * 7, **slower) == ideal((0,) * 7, width=Width(running=1), **slower) == 60.0
    assert ideal((0,) * 5, width=Width(running=4), **slower) == 60.0
    assert ideal((0,) * 6, width=Width(running=4), **slower) == 90.0


# Prompt lookup


def test_lookup_helps_where_the_draft_model_is_wrong() -> None:
    """Token 1 is outside the draft model's best; the text is 2 3 4 50 51 after a prompt that ends 8 9 1.

    ms     0 |                                  30 |                              60
    draft    | 1 is there, wrong                   | told at 40: nothing there     | (alone: 2; then 3 and 4 till 90)
    lookup   | 1 2 → 3 4 (right) 5 6, then 50      | 50 is new: nothing; 51        |
    """
    ranks, text = (0, None, 0, 0, 0), (2, 3, 4, 50, 51)
    lookup = TextLookup(PROMPT, text)
    assert ideal(ranks) == 90.0
    assert ideal(ranks, lookup=lookup) == lookup_decode_ms(lookup, target_ms=lambda tokens: 30.0, limit=4) == 60.0
    # The first step verifies lookup's four tokens, not the draft; the second nothing.
    assert ideal(ranks, lookup=lookup, target_ms=per_token_ms) == 35.0 + 31.0


def test_lookup_goes_on_after_drafts_that_are_right() -> None:
    """The text is 9 1 2 3 8 after 1 2 3 4 5: 9 has not been seen before, but after the draft 1 lookup finds 2 3 4.

    ms     0 |                                                 30
    draft    | token 1 is there (2 at 5 ms: too late)          |
    lookup   | 9 1 → 2 3 (right) 4, then 8 is corrected        |
    """
    ranks, text = (0,) * 5, (9, 1, 2, 3, 8)
    prompt = (1, 2, 3, 4, 5)
    lookup = TextLookup(prompt, text)
    assert lookup.at(1, 4).tokens == 0
    assert ideal(ranks) == 60.0
    assert ideal(ranks, lookup=lookup) == 30.0
    assert ideal(ranks, lookup=lookup, target_ms=per_token_ms) == 35.0  # one draft, three of lookup's, and one more
    assert ideal(ranks, lookup=lookup, limit=2) == 60.0  # one draft and the right 2, then 3; 8 is in the next step


def test_a_drafter_that_falls_behind_goes_on_from_what_it_is_told() -> None:
    """R = 0, draft forwards of 20 ms: the drafter alone would have token i at -10 + 20 i ms.

    ms      0 |              30 |           60 |           90 |            120
    step      | lookup: 1 2, 3  | 4            | 5            | 6, then 7  |
    drafted   told of 3 at 30 ^   4 at 50        5 at 70        6 at 90 (not 110)
    """
    text = (2, 3, 4, 50, 51, 52, 53, 54)
    slow: dict[str, Any] = {"rtt_ms": 0.0, "draft_ms": lambda tokens: 20.0, "lookup": TextLookup(PROMPT, text)}
    assert ideal((0,) * 8, **slow) == 120.0


def test_lookup_can_cost_more_than_it_gives() -> None:
    # After the draft 1 lookup offers 2 3 4, all wrong: a step of 1 + 4 tokens instead of 1 + 1.
    ranks, text = (0,) * 4, (9, 1, 8, 7)
    lookup = TextLookup((1, 2, 3, 4, 5), text)
    assert ideal(ranks, target_ms=per_token_ms) == 32.0 + 32.0
    assert ideal(ranks, target_ms=per_token_ms, lookup=lookup) == 35.0 + 32.0


def test_of_equally_right_drafts_the_cheaper_are_taken() -> None:
    # With R = 2 ms four drafts are there, the first one wrong, and lookup has nothing.
    empty = TextLookup((1, 2, 3), (8, 9))
    assert ideal((0, 1), rtt_ms=2.0, target_ms=per_token_ms) == 35.0
    assert ideal((0, 1), rtt_ms=2.0, target_ms=per_token_ms, lookup=empty) == 31.0


def test_lookup_is_cut_where_the_text_ends() -> None:
    # 2 → 3 4 5 6 is right as far as the text goes: two drafts, and none of its 5 and 6.
    lookup = TextLookup(PROMPT, (2, 3, 4))
    assert lookup_decode_ms(lookup, target_ms=per_token_ms, limit=4) == 33.0
    assert lookup_decode_ms(TextLookup(PROMPT, (2, 3, 9)), target_ms=per_token_ms, limit=4) == 35.0


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
def test_lookup_is_what_runs_live_after_any_right_drafts(prompt: list[int], text: list[int], data: Any) -> None:
    lookup = TextLookup(prompt, text)
    assert len(lookup) == len(text)
    begin = data.draw(st.integers(0, len(text) - 1))
    drafts = data.draw(st.integers(0, min(8, len(text) - 1 - begin)))
    live = Text()
    live.append([*prompt, *text[:begin]])
    _, guess = live.continuation(8 - drafts, text[begin : begin + drafts])
    following = text[begin + drafts :]
    right = 0
    while right < min(len(guess), len(following)) and guess[right] == following[right]:
        right += 1
    found = lookup.at(begin + drafts, 8 - drafts)
    assert found.right == right
    assert found.tokens == (right if right == len(following) else len(guess))


def test_lookup_of_another_text_is_refused() -> None:
    with pytest.raises(ValueError, match="of a text of 3 tokens, ranks are of 2"):
        ideal((0, 0), lookup=TextLookup(PROMPT, (2, 3, 4)))


# Arms without a drafter elsewhere


def test_a_draft_model_beside_the_target_delays_each_of_its_steps() -> None:
    """Two drafts of 5 ms each, then a target's forward of 30 + 3 ms.

    ms    0      10                     43     53                      86
          | d  d | 1 right, 2 corrected | d  d | 3 4 right, 5 as well  |
    """
    ranks = (0, 0, None, 0, 0, 0)
    assert colocated(ranks, 2) == 86.0
    # The text ends with token 5 or 4; what is drafted beyond is not verified.
    assert colocated((*ranks, 0), 2) == 86.0 + 10.0 + 32.0
    assert colocated(ranks[:4], 2) == 43.0 + 10.0 + 32.0
    assert colocated(ranks[:3], 2) == 43.0


def test_lookup_goes_on_behind_the_draft_model() -> None:
    """The text is 9 1 2 3 8 after 1 2 3 4 5, with two drafts and at most four in all.

    ms    0      10                                          45
          | d  d | 1 2 right, lookup 3 right 4 wrong, then 8 |    (alone: 3 after 1 2, and 8 in a second step)
    """
    ranks, lookup = (0,) * 5, TextLookup((1, 2, 3, 4, 5), (9, 1, 2, 3, 8))
    assert colocated(ranks, 2) == 43.0 + 10.0 + 32.0
    assert colocated(ranks, 2, lookup=lookup) == 10.0 + 35.0
    # Behind the wrong draft 2 it does not go on, though it would be right behind 1.
    assert colocated((0, 0, 1, 0, 0), 2, lookup=lookup) == 43.0 + 43.0
    # Behind the wrong draft 1 neither; the drafts are made in vain. Then 2 3 are right, lookup's 4 5 are wrong.
    assert colocated((0, 1, 0, 0, 0), 2, lookup=lookup) == (10.0 + 31.0) + (10.0 + 35.0)


def test_without_drafts_a_draft_model_is_plain_decoding() -> None:
    assert colocated((0, None, 3, 0), 0) == plain_decode_ms(4, target_ms=per_token_ms) == 3 * 31.0
    assert plain_decode_ms(1, target_ms=per_token_ms) == plain_decode_ms(0, target_ms=per_token_ms) == 0.0


def test_an_oracle_fills_every_step() -> None:
    # Four drafts and one more; of the last five tokens four are drafts, of the last four all.
    assert oracle_decode_ms(11, target_ms=per_token_ms, limit=4) == 70.0
    assert oracle_decode_ms(10, target_ms=per_token_ms, limit=4) == 70.0
    assert oracle_decode_ms(9, target_ms=per_token_ms, limit=4) == 35.0 + 34.0
    assert oracle_decode_ms(12, target_ms=per_token_ms, limit=4) == 70.0 + 32.0


# What holds for every text

TEXTS = st.integers(0, 2**32 - 1).map(random.Random)
RTTS_MS = st.sampled_from([0.0, 10.0, 20.0, 30.0, 50.0, 70.0, 100.0, 500.0])


def made(source: random.Random) -> tuple[Ranks, TextLookup]:
    """Ranks of any agreement, and a text that repeats its prompt more or less."""
    agreement, vocabulary = source.random(), source.choice([2, 3, 6, 20])
    prompt = [source.randrange(vocabulary) for _ in range(source.randrange(40))]
    text = [source.randrange(vocabulary) for _ in range(source.randint(1, 60))]
    if prompt and source.random() < 0.5:
        text = (prompt[source.randrange(len(prompt)) :] + text)[: len(text)]
    outside: Ranks = (None, 1, 2, 3, 4, 5, 6, 7)
    return [0 if source.random() < agreement else source.choice(outside) for _ in text], TextLookup(prompt, text)


def bounded(source: random.Random) -> Width:
    return Width(source.randint(1, 8), None, source.randint(0, 8))


@given(TEXTS, RTTS_MS, st.sampled_from([1.0, 5.0, 40.0]))
def test_the_farther_the_slower(source: random.Random, rtt_ms: float, farther_ms: float) -> None:
    (ranks, _), width = made(source), source.choice([UNLIMITED, bounded(source)])
    assert ideal(ranks, rtt_ms=rtt_ms, width=width) <= ideal(ranks, rtt_ms=rtt_ms + farther_ms, width=width)


@given(TEXTS, RTTS_MS)
def test_the_wider_the_faster_at_the_same_pace(source: random.Random, rtt_ms: float) -> None:
    (ranks, _), narrow = made(source), bounded(source)
    assert narrow.alternatives is not None and narrow.depth is not None
    wide = Width(narrow.alternatives + source.randrange(3), None, narrow.depth + source.randrange(3))
    times = [ideal(ranks, rtt_ms=rtt_ms, width=width) for width in (UNLIMITED, wide, narrow)]
    assert times == sorted(times)


@given(TEXTS, RTTS_MS)
def test_lookup_makes_no_text_slower_where_drafts_cost_nothing(source: random.Random, rtt_ms: float) -> None:
    (ranks, lookup), width = made(source), bounded(source)
    with_it = ideal(ranks, rtt_ms=rtt_ms, width=width, lookup=lookup)
    assert with_it <= ideal(ranks, rtt_ms=rtt_ms, width=width)
    assert with_it <= plain_decode_ms(len(ranks), target_ms=lambda tokens: 30.0)
    free: dict[str, Any] = {"target_ms": lambda tokens: 30.0, "draft_ms": lambda tokens: 5.0, "limit": 8, "gamma": 3}
    assert colocated_decode_ms(ranks, lookup=lookup, **free) <= colocated_decode_ms(ranks, **free)


@given(TEXTS, RTTS_MS)
def test_nothing_beats_the_oracle(source: random.Random, rtt_ms: float) -> None:
    ranks, lookup = made(source)
    least = oracle_decode_ms(len(ranks), target_ms=lambda tokens: 30.0, limit=4)
    assert least <= ideal(ranks, rtt_ms=rtt_ms, lookup=lookup)
    assert least <= lookup_decode_ms(lookup, target_ms=lambda tokens: 30.0, limit=4)


def test_a_comparison_takes_a_moment() -> None:
    """72 texts of 60 tokens after 600, nine round trips, with and without lookup, without bounds and with."""
    source = random.Random(1)
    begin = time.process_time()
    for _ in range(72):
        prompt = [source.randrange(2000) for _ in range(600)]
        text = prompt[100:140] + [source.randrange(2000) for _ in range(20)]
        ranks = [0 if source.random() < 0.8 else source.choice((None, 1, 2, 3)) for _ in text]
        lookup = TextLookup(prompt, text)
        for rtt_ms in (0.0, 10.0, 20.0, 30.0, 50.0, 70.0, 100.0, 200.0, 500.0):
            for width in (UNLIMITED, Width(4, 16, 8)):
                assert ideal(ranks, rtt_ms=rtt_ms, width=width) >= ideal(
                    ranks, rtt_ms=rtt_ms, width=width, lookup=lookup
                )
    assert time.process_time() - begin < 3.0
