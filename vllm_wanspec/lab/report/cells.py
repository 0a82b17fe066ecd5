"""What the cells of the benches' tables say, on the console as in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_wanspec.lab.stats import Interval

UNKNOWN = "–"
#: Which arms schedule ahead, where nobody looked into the processes.
AHEAD = "as vLLM has it, in no arm on its CPU build and never beside a custom proposer"
#: Whether a bar holds; None: this run cannot tell.
MARKS = {True: "✓", False: "✗", None: UNKNOWN}


def number(value: float | None, digits: int = 0) -> str:
    """Return a number with ``digits`` decimals."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """Return a share of 1 in per cent."""
    return UNKNOWN if value is None else f"{value:.0%}"


def interval(value: Interval | None) -> str:
    """Return a ratio with its interval."""
    return UNKNOWN if value is None else f"{value.value:.3f} ({value.low:.3f}–{value.high:.3f})"


def ratio(value: Interval | None) -> str:
    """Return a ratio alone."""
    return UNKNOWN if value is None else f"{value.value:.3f}"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the lowest and the highest of some figures."""
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}" if values else UNKNOWN
