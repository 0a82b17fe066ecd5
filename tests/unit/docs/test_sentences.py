"""Sentences that have to be true whatever the figures are."""

import pytest
from pages.sentences import EVEN, UNKNOWN, beside, by_place, capital, compared, enumerated, speed, than

WITH = ("with {} stream", "with {} streams")


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([0.8, 0.99], "faster"),
        ([0.8, 1.0], EVEN),
        ([1.0, 1.3], EVEN),
        ([1.01, 1.3], "slower"),
        (None, UNKNOWN),
    ],
)
def test_an_interval_says_faster_or_slower_only_where_all_of_it_does(ends: list[float] | None, said: str) -> None:
    assert speed(ends) == said


def test_two_intervals_differ_only_where_they_do_not_overlap() -> None:
    assert beside([0.5, 0.6], [0.7, 0.8]) == "lower"
    assert beside([0.7, 0.8], [0.5, 0.6]) == "higher"
    assert beside([0.5, 0.7], [0.7, 0.8]) == beside([0.7, 0.8], [0.5, 0.7]) == EVEN


def test_prepositions() -> None:
    assert [than(word) for word in ("lower", EVEN, UNKNOWN)] == [
        "lower than",
        "indistinguishable from",
        "not measured against",
    ]


def test_figures_without_interval_are_compared_as_they_are_shown() -> None:
    assert compared(1.24, 1.2, 1) == "equal"
    assert compared(1.24, 1.2, 2) == "higher"
    assert compared(1.2, 1.24, 2) == "lower"
    assert compared(None, 1.0, 1) == compared(1.0, None, 1) == UNKNOWN


def test_verdicts_with_their_places() -> None:
    assert by_place([("less", 1)], *WITH) == "less with 1 stream"
    assert by_place([("less", 2)], *WITH) == "less with 2 streams"
    assert (
        by_place([("less", 1), ("more", 4), ("less", 2)], *WITH) == "less with 1 and 2 streams and more with 4 streams"
    )
    assert by_place([("less", 1), ("more", 4), ("same", 2)], *WITH) == (
        "less with 1 stream; more with 4 streams; same with 2 streams"
    )


def test_enumerations_and_beginnings() -> None:
    assert [enumerated(list(letters)) for letters in ("", "a", "ab", "abc")] == [
        "nothing",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert capital("with our R") == "With our R"
