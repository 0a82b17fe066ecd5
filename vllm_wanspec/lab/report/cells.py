"""What the cells of the benches' tables say, on the console as in Markdown."""

from __future__ import annotations

from vllm_wanspec.lab.compare.trees_figures import Interval

__all__ = ["UNKNOWN", "interval", "number", "share"]

UNKNOWN = "–"


def number(value: float | None, digits: int = 0) -> str:
    """Return a number with ``digits`` decimals."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """Return a share of 1 in per cent."""
    return UNKNOWN if value is None else f"{value:.0%}"


def interval(value: Interval | None) -> str:
    """Return a ratio with its interval."""
    return UNKNOWN if value is None else f"{value.value:.3f} ({value.low:.3f}–{value.high:.3f})"
