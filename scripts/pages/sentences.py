"""Sentences that are true whatever the figures are: what intervals and counts allow to say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

UNKNOWN, EVEN = "not measured", "indistinguishable"
PREPOSITIONS = {UNKNOWN: "against", EVEN: "from"}


def capital(text: str) -> str:
    """Return a text that begins a sentence."""
    return text[:1].upper() + text[1:]


def enumerated(parts: Sequence[str]) -> str:
    """Return ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else "nothing"


def speed(ends: Sequence[float] | None) -> str:
    """Return what a ratio of times says, by the ends of its interval: an adjective."""
    if ends is None:
        return UNKNOWN
    return "faster" if ends[1] < 1.0 else "slower" if ends[0] > 1.0 else EVEN


def beside(ends: Sequence[float], others: Sequence[float]) -> str:
    """Return how an interval lies to another: an adjective."""
    return "lower" if ends[1] < others[0] else "higher" if ends[0] > others[1] else EVEN


def than(adjective: str) -> str:
    """Return an adjective with its preposition."""
    return f"{adjective} {PREPOSITIONS.get(adjective, 'than')}"


def compared(value: float | None, other: float | None, digits: int) -> str:
    """Compare figures without intervals as they are shown, with so many decimals: an adjective."""
    if value is None or other is None:
        return UNKNOWN
    first, second = round(value, digits), round(other, digits)
    return "lower" if first < second else "higher" if first > second else "equal"


def by_place(found: Iterable[tuple[str, float]], one: str, many: str) -> str:
    """Return verdicts with where each holds: ``faster with 1 and 2 streams and slower with 16 streams``.

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
    return enumerated(parts) if len(parts) < 3 else "; ".join(parts)
