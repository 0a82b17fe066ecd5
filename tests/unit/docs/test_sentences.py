"""Sentences that have to be true whatever the figures are."""

import pytest
from pages.sentences import UNKNOWN, UNKNOWN_TIME, beside, by_place, capital, compared, enumerated, time_taken

WITH = ("with {} stream", "with {} streams")


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([0.8, 0.99], "less time"),
        ([0.8, 1.0], "within the interval the same time"),
        ([1.0, 1.3], "within the interval the same time"),
        ([1.01, 1.3], "more time"),
        (None, UNKNOWN_TIME),
    ],
)
def test_an_interval_says_less_or_more_only_where_all_of_it_does(ends: list[float] | None, said: str) -> None:
    assert time_taken(ends) == said


def test_two_intervals_differ_only_where_they_do_not_overlap() -> None:
    assert beside([0.5, 0.6], [0.7, 0.8]) == "less than"
    assert beside([0.7, 0.8], [0.5, 0.6]) == "more than"
    assert beside([0.5, 0.7], [0.7, 0.8]) == beside([0.7, 0.8], [0.5, 0.7]) == "within the intervals the same as"


def test_figures_without_interval_are_compared_as_they_are_shown() -> None:
    words = ("fewer", "more", "as many")
    assert compared(1.24, 1.2, 1, words) == "as many"
    assert compared(1.24, 1.2, 2, words) == "more"
    assert compared(1.2, 1.24, 2, words) == "fewer"
    assert compared(None, 1.0, 1, words) == compared(1.0, None, 1, words) == UNKNOWN


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
