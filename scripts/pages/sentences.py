"""Sentences that are true whatever the figures are: what intervals and counts allow to say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

UNKNOWN_TIME = "a time that has not been measured"
UNKNOWN = "not measured"


def capital(text: str) -> str:
    """Return a text that begins a sentence."""
    return text[:1].upper() + text[1:]


def enumerated(parts: Sequence[str]) -> str:
    """Return ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else "nothing"


def time_taken(ends: Sequence[float] | None) -> str:
    """Return which time a ratio of times speaks of, by the ends of its interval."""
    if ends is None:
        return UNKNOWN_TIME
    return "less time" if ends[1] < 1.0 else "more time" if ends[0] > 1.0 else "within the interval the same time"


def beside(ends: Sequence[float], others: Sequence[float]) -> str:
    """Return how an interval lies to another, to be followed by a clause such as *at R = 0 ms*."""
    if ends[1] < others[0]:
        return "less than"
    return "more than" if ends[0] > others[1] else "within the intervals the same as"


def compared(value: float | None, other: float | None, digits: int, words: tuple[str, str, str]) -> str:
    """Compare figures without intervals, as they are shown.

    Args:
        value: The one.
        other: What it is held against.
        digits: Decimals with which both are shown.
        words: For a lower value, a higher one, and the same.
    """
    if value is None or other is None:
        return UNKNOWN
    first, second = round(value, digits), round(other, digits)
    return words[0] if first < second else words[1] if first > second else words[2]


def by_place(found: Iterable[tuple[str, float]], one: str, many: str) -> str:
    """Return verdicts with where each holds: ``less time with 1 and 2 streams, more time with 16 streams``.

    Args:
        found: Verdict and place, in order.
        one: How one place is named, with ``{}`` for its number.
        many: How several are.
    """
    places: dict[str, list[str]] = {}
    for verdict, place in found:
        places.setdefault(verdict, []).append(f"{place:g}")
    parts = [
        f"{verdict} {(one if len(where) == 1 and where[0] == '1' else many).format(enumerated(where))}"
        for verdict, where in places.items()
    ]
    return enumerated(parts) if len(parts) < 3 else f"{'; '.join(parts)}"
