"""The result files of the repository, and how their figures are written: cells, tables, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pages.blocks import RESULTS

NOT_MEASURED = "not measured"
INVALID = "**This run is incomplete or invalid.**"
CO_LOCATED, CO_LOCATED_LOOKUP = "draft_model", "draft_model_lookup"
NO_LOOKUP, WITH_LOOKUP = "wanspec_no_lookup", "wanspec"

MAX_OVERRUN_SHARE = 0.01
"""A row with more forwards than this that were slower than their pace is named, as the run's own page does."""

Row = dict[str, Any]


class Results:
    """The files of one folder, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read from ``folder``."""
        self._folder = folder
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        """Return what ``NAME.json`` holds.

        Raises:
            FileNotFoundError: There is none.
        """
        if name not in self._read:
            self._read[name] = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
        data: dict[str, Any] = self._read[name]
        return data

    def source(self, name: str) -> str:
        """Return which file, of which commit, has a figure, and whether its run counts: in every block there is one."""
        void = "" if self.counts(name) else ", **incomplete or invalid**"
        return f"[{name}.json]({RESULTS}{name}.json), commit {self[name]['commit']}{void}"

    def counts(self, name: str) -> bool:
        """Whether a run came to its end, was valid, and had no wrong output."""
        data = self[name]
        return bool(data.get("valid", True) and data.get("complete", True) and not data.get("differences"))

    def bench_row(self, arm: str, rtt_ms: float | None = None, streams: int = 1) -> Row:
        """Return a row of the comparison; an empty one where it was not measured."""
        for row in self["bench"]["rows"]:
            if (row["arm"], row["rtt_ms"], row["concurrency"]) == (arm, rtt_ms, streams):
                found: Row = row
                return found
        return {}

    def rtts(self, *arms: str) -> list[float]:
        """Return the round trips in ms at which one of the arms ran as a single stream, rising."""
        rows = self["bench"]["rows"]
        return sorted({row["rtt_ms"] for row in rows if row["arm"] in arms and row["concurrency"] == 1})

    def has_lookup_apart(self) -> bool:
        """Whether the comparison tells remote drafting from prompt lookup; runs before it did mix them."""
        return bool(self.rtts(NO_LOOKUP))

    def conditions(self) -> str:
        """Return how the comparison was measured, in sentences."""
        data = self["bench"]
        options, scale, versions = data["options"], data["time_scale"], data["versions"]
        target, draft = pace(data["pacing"]["target"]), pace(data["pacing"]["draft"])
        said = [] if self.counts("bench") else [INVALID]
        said += [
            f"Real vLLM ({versions['vllm']}) in every arm on {data['machine']}; model forwards paced by sleeping to "
            f"{target} "
            f"(target) and {draft} (draft), the WAN emulated by a proxy.",
        ]
        if scale != 1:
            said.append(
                f"Paces and round trips alike are × {scale:g}, times are as measured (R = 30 ms took {30 * scale:g} "
                "ms)."
            )
        if slow := [_name(row) for row in data["rows"] if _slowest(row) > MAX_OVERRUN_SHARE]:
            said.append(f"**Doubtful, since more than 1 % of their forwards were too slow: {', '.join(slow)}.**")
        repeats = "once" if options["repeats"] == 1 else f"{options['repeats']} times"
        said.append(
            f"{options['count']} prompts {repeats}, up to {options['max_tokens']} tokens each, greedy; intervals: 95 "
            "%, over "
            "prompts."
        )
        gamma = self.bench_row(CO_LOCATED).get("gamma")
        if gamma is not None:
            said.append(f"Co-located: vLLM's own draft model at its best γ, {gamma} for one stream.")
        if "cpu" in versions["vllm"]:
            said.append("No arm has async scheduling: vLLM's CPU build has none.")
        return " ".join(said)


def _slowest(row: Row) -> float:
    """The share of forwards slower than their pace, of the side that has most of them."""
    return max(float(row.get(f"{side}_overruns") or 0.0) for side in ("target", "drafter", "local_draft"))


def _name(row: Row) -> str:
    trip = "" if row["rtt_ms"] is None else f" at R = {row['rtt_ms']:g} ms"
    return f"`{row['arm']}`{trip}, {row['concurrency']} at a time"


def pace(text: str) -> str:
    """Return a pace such as ``35.0+0.1`` in words."""
    base, _, per_token = text.partition("+")
    return f"{float(base):g} ms + {float(per_token or 0):g} ms per token"


def number(value: float | None, digits: int = 0) -> str:
    """Return a cell with a number."""
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}"


def ratio(row: Row, key: str, interval: str) -> str:
    """Return a cell with a ratio and its interval."""
    value, ends = row.get(key), row.get(interval)
    if value is None or ends is None:
        return NOT_MEASURED
    return f"{value:.3f} ({ends[0]:.3f}–{ends[1]:.3f})"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a table; the first ``words`` columns are flush left."""
    rule = ["---"] * words + ["---:"] * (len(titles) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in (titles, rule, *rows))


def used(row: Row) -> float | None:
    """Return how many of a drafter's tokens the target took, prompt lookup's left out; None where they were mixed."""
    main_line, branch = row.get("accepted_main_line"), row.get("accepted_branch")
    return None if main_line is None or branch is None else float(main_line + branch)


def quotient(above: float | None, below: float | None) -> float | None:
    """Return a quotient; None where a part is not known or there is nothing to divide by."""
    return above / below if above is not None and below else None
