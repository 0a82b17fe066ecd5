"""The result files of the repository, and how their figures are written: cells, tables, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pages.blocks import RESULTS

NOT_MEASURED = "not measured"
INVALID = "**This run is incomplete or invalid.**"
CO_LOCATED, CO_LOCATED_LOOKUP = "draft_model", "draft_model_lookup"
NO_LOOKUP, WITH_LOOKUP = "wanspec_no_lookup", "wanspec"

MAX_OVERRUN_SHARE = 0.01
"""A row with more forwards than this that were slower than their pace is named, as the run's own page does."""

Row = dict[str, Any]


class Side(NamedTuple):
    """Remote drafting and a co-located draft model that have the same prompt lookup.

    Attributes:
        text: What they have.
        remote: The one's arm.
        co_located: The other's.
        ratio: The rows' key of time per token ÷ the co-located model's.
        interval: That of its interval.
    """

    text: str
    remote: str
    co_located: str
    ratio: str
    interval: str


SIDES = (
    Side("without lookup on either side", NO_LOOKUP, CO_LOCATED, "ratio_to_draft_model", "ratio_ci"),
    Side("with our lookup on both sides", WITH_LOOKUP, CO_LOCATED_LOOKUP, "ratio_to_draft_model_lookup", "lookup_ci"),
)


class Results:
    """The files of one folder, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read from ``folder``."""
        self._folder = folder
        self._read: dict[str, Any] = {}

    def has(self, file: str) -> bool:
        """Whether there is a file, such as ``capacity.json``."""
        return (self._folder / file).is_file()

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
        void = "" if counts(self[name]) else ", **incomplete or invalid**"
        return f"[{name}.json]({RESULTS}{name}.json), commit {self[name]['commit']}{void}"

    def bench_row(self, arm: str, rtt_ms: float | None = None, streams: int = 1) -> Row:
        """Return a row of the comparison; an empty one where it was not measured."""
        return row_of(self["bench"], arm, rtt_ms, concurrency=streams)

    def rtts(self, *arms: str) -> list[float]:
        """Return the round trips in ms at which one of the arms ran as a single stream, rising."""
        rows = self["bench"]["rows"]
        return sorted({row["rtt_ms"] for row in rows if row["arm"] in arms and row["concurrency"] == 1})

    def has_lookup_apart(self) -> bool:
        """Whether the comparison tells remote drafting from prompt lookup; runs before it did mix them."""
        return bool(self.rtts(NO_LOOKUP))

    def whole(self, page: str, picture: str = "") -> str:
        """Return where the whole tables of a run are, and its picture, as far as there are any: a paragraph."""
        said = [f"Whole tables: [{page}]({RESULTS}{page})."] if self.has(page) else []
        said += [f"![{picture}]({RESULTS}{plot})"] if picture and self.has(plot := f"{page[:-3]}.png") else []
        return "".join(f"\n\n{part}" for part in said)

    def conditions(self) -> str:
        """Return how the comparison was measured, in sentences."""
        data = self["bench"]
        versions = data["versions"]
        target, draft = pace(data["pacing"]["target"]), pace(data["pacing"]["draft"])
        said = [] if counts(data) else [why_not(data)]
        said += [
            f"Real vLLM ({versions['vllm']}) in every arm on {data['machine']}; model forwards paced by sleeping to "
            f"{target} (target) and {draft} (draft), the WAN emulated by a proxy.",
        ]
        if data["time_scale"] != 1:
            said.append(f"{scaled(data)}.")
        if slow := [_name(row) for row in data["rows"] if _slowest(row) > MAX_OVERRUN_SHARE]:
            said.append(f"**Doubtful, since more than 1 % of their forwards were too slow: {', '.join(slow)}.**")
        said.append(
            f"{prompts(data)}, up to {data['options']['max_tokens']} tokens each, greedy; intervals: 95 %, over "
            "prompts."
        )
        gammas = [self.bench_row(arm).get("gamma") for arm in (CO_LOCATED, CO_LOCATED_LOOKUP)]
        if None not in gammas:
            said.append(f"Co-located: vLLM's own draft model at its best γ, {gammas[0]} ({gammas[1]} with lookup).")
        elif gammas[0] is not None:
            said.append(f"Co-located: vLLM's own draft model at its best γ, {gammas[0]}.")
        if "cpu" in versions["vllm"]:
            said.append("No arm has async scheduling: vLLM's CPU build has none.")
        return " ".join(said)


def row_of(data: dict[str, Any], arm: str, rtt_ms: float | None = None, **load: float | None) -> Row:
    """Return the row of a comparison's arm, round trip and load, the rest of its keys; an empty one if there is none.

    Args:
        data: A result file of the comparison.
        arm: Name of the arm.
        rtt_ms: Round trip; None for an arm without one.
        load: ``concurrency``, ``rate``.
    """
    wanted = {"arm": arm, "rtt_ms": rtt_ms} | load
    rows: list[Row] = data["rows"]
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), {})


def counts(data: dict[str, Any]) -> bool:
    """Whether a run came to its end, was valid, and had no wrong output."""
    return bool(data.get("valid", True) and data.get("complete", True) and not data.get("differences"))


def why_not(data: dict[str, Any]) -> str:
    """Say that a run does not count, and why."""
    reasons = [*data.get("faults", ()), *([] if data.get("complete", True) else ["it did not come to its end"])]
    reasons += ["there are wrong outputs"] if data.get("differences") else []
    return f"**This run counts as invalid: {'; '.join(reasons)}.**" if reasons else INVALID


def prompts(data: dict[str, Any]) -> str:
    """Return how many prompts a run measured, and how often: ``64 prompts once``."""
    repeats = data["options"]["repeats"]
    count = len(data.get("references", ())) or data["options"]["count"]
    return f"{count} prompts {'once' if repeats == 1 else f'{repeats} times'}"


def scaled(data: dict[str, Any]) -> str:
    """Return what the time scale does, without a full stop."""
    scale = data["time_scale"]
    return f"Paces and round trips alike are × {scale:g}, times are as measured (R = 30 ms took {30 * scale:g} ms)"


def not_yet(command: str, file: str) -> str:
    """Return the sentence that stands where a file is missing."""
    return f"This has not been measured yet: `make {command}` writes `docs/results/{file}`."


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


def percent(share: float, digits: int = 0) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.{digits}f} %"


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
