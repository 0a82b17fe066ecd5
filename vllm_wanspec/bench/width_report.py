"""The width bench's result: its figures, their JSON form, tables on the console and a Markdown page."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_wanspec.bench import machine
from vllm_wanspec.bench.pacing import Pacing
from vllm_wanspec.bench.trees_result import git_commit
from vllm_wanspec.bench.width_measure import COMMIT_INTERVAL_S, CONTEXT_TOKENS, LONGEST_LEAD, NEAR, Load, Row, medians
from vllm_wanspec.errors import WanspecError

__all__ = ["BAR_RATIO", "BAR_WIDTH", "Arm", "WidthResult", "markdown", "print_report", "write_json", "write_markdown"]

#: So many running branches may take so many times the step of one.
BAR_WIDTH = 32
BAR_RATIO = 2.5
#: Above this share of the drafter's core other programs disturbed the measurement.
MAX_OTHERS = 0.10

_Column = tuple[str, Callable[[Row, float], str]]
#: Titles, and texts of a row and its ratio to width 1.
COLUMNS: tuple[_Column, ...] = (
    ("width", lambda row, ratio: f"{row.width}"),
    ("running", lambda row, ratio: f"{row.running:.1f}" + ("" if row.is_near else " (!)")),
    ("step ms", lambda row, ratio: f"{row.step_ms:.2f}"),
    ("÷ width 1", lambda row, ratio: f"{ratio:.2f}"),
    ("events/s", lambda row, ratio: f"{row.events_per_s:,.0f}"),
    ("gap ms", lambda row, ratio: f"{row.gap_ms:.2f}"),
    ("first ms", lambda row, ratio: f"{row.first_ms:.1f}"),
    ("starts/s", lambda row, ratio: f"{row.starts_per_s:,.0f}"),
    ("commits/s", lambda row, ratio: f"{row.committed_per_s:.0f}"),
    ("kB/s", lambda row, ratio: f"{row.bytes_per_s / 1e3:,.0f}"),
    ("API CPU", lambda row, ratio: f"{row.api_cpu:.0%}"),
    ("engine CPU", lambda row, ratio: f"{row.engine_cpu:.0%}"),
    ("others", lambda row, ratio: f"{row.others_cpu:.0%}"),
)


@dataclass(frozen=True)
class Arm:
    """One drafter's windows.

    Args:
        pace: Of its forwards; None is as fast as they are.
        windows: In the order in which they were taken.
        profile: Shares of samples by process and group; empty where none was taken.
    """

    pace: Pacing | None
    windows: tuple[Row, ...]
    profile: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"paced to {self.pace}" if self.pace else "as fast as it is"

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """Medians per width, rising."""
        widths = sorted({row.width for row in self.windows})
        return tuple(medians([row for row in self.windows if row.width == width]) for width in widths)

    def ratio(self, row: Row) -> float:
        """A row's step time divided by that of width 1."""
        return _ratio(row.step_ms, self.rows[0].step_ms)

    @property
    def held(self) -> bool | None:
        """Whether the bar's width keeps the bar; None where it was not measured or fewer branches ran."""
        row = next((row for row in self.rows if row.width == BAR_WIDTH), None)
        return None if row is None or not row.is_near else self.ratio(row) <= BAR_RATIO

    def as_json(self) -> dict[str, Any]:
        """Return medians, windows and profile."""
        return {
            "pace": self.pace.setting if self.pace else None,
            "held": self.held,
            "widths": [row.as_json() | {"ratio": round(self.ratio(row), 4)} for row in self.rows],
            "windows": [row.as_json() for row in self.windows],
            "profile": {
                process: {name: round(share, 4) for name, share in groups.items()}
                for process, groups in self.profile.items()
            },
        }


@dataclass(frozen=True)
class WidthResult:
    """Everything that a run found.

    Args:
        arms: One per pace.
        load: What the session asked for and committed.
        repeats: Windows per width.
        window_s: Seconds of a window.
        seconds: Duration of the whole run.
    """

    arms: tuple[Arm, ...]
    load: Load
    repeats: int
    window_s: float
    seconds: float

    @property
    def held(self) -> bool:
        """Whether every arm is known to keep the bar."""
        return bool(self.arms) and all(arm.held for arm in self.arms)

    def as_json(self) -> dict[str, Any]:
        """Return the result file's content."""
        return {
            "held": self.held,
            "bar": {"width": BAR_WIDTH, "ratio": BAR_RATIO},
            "arms": [arm.as_json() for arm in self.arms],
            "load": asdict(self.load) | {"commit_interval_s": COMMIT_INTERVAL_S, "context_tokens": CONTEXT_TOKENS},
            "repeats": self.repeats,
            "window_s": self.window_s,
            "seconds": round(self.seconds, 1),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "commit": git_commit(),
            "command": command_line(),
        }


def _ratio(value: float, one: float) -> float:
    return value / one if one else float("nan")


def command_line() -> str:
    """Return the command that runs this bench, as given."""
    return shlex.join(["python", "-m", "vllm_wanspec.bench.width", *sys.argv[1:]])


def _grid(arm: Arm) -> tuple[list[str], list[list[str]]]:
    return [title for title, _ in COLUMNS], [[text(row, arm.ratio(row)) for _, text in COLUMNS] for row in arm.rows]


def _profile_grid(groups: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    return ["where", "share of samples"], [[name, f"{share:.0%}"] for name, share in groups.items()]


def _remarks(arm: Arm) -> list[str]:
    """Sentences on the bar, and on what the figures do not say."""
    texts = []
    row = next((row for row in arm.rows if row.width == BAR_WIDTH), None)
    if row is not None:
        verdict = {True: "held", False: "missed", None: "not decided, since fewer branches ran"}[arm.held]
        texts.append(
            f"{BAR_WIDTH} branches take {arm.ratio(row):.2f} × the step of one; at most {BAR_RATIO} is asked for: "
            f"{verdict}. Without starts and stops, between two tokens of a branch, it is "
            f"{_ratio(row.gap_ms, arm.rows[0].gap_ms):.2f} ×."
        )
    few = [str(row.width) for row in arm.rows if not row.is_near]
    if few:
        texts.append(
            f"(!) Width {', '.join(few)}: fewer than {NEAR:.0%} of the branches asked for ran, because the text had "
            "too few probable alternatives or they were ruled out too soon."
        )
    busy = max(row.others_cpu for row in arm.rows)
    if busy > MAX_OTHERS:
        texts.append(f"DISTURBED: other programs took up to {busy:.0%} of the drafter's core: measure again.")
    return texts


def _explanation(result: WidthResult) -> str:
    load = result.load
    return (
        f"One session at a real `wanspec drafter` with the demo's draft model, context from {CONTEXT_TOKENS} tokens "
        f"on, every position branching into up to {load.max_branches} tokens, branches of up to {load.branch_depth} "
        f"tokens; a played target commits up to {load.commit_tokens} drafted "
        f"token{'s' * (load.commit_tokens > 1)} every {COMMIT_INTERVAL_S * 1e3:.0f} ms (more where the draft is "
        f"{LONGEST_LEAD} tokens ahead), drawn from the tree by the draft model's probabilities. Medians of "
        f"{result.repeats} windows of {result.window_s:g} s, the widths in changing order. API server and engine of "
        "the drafter share one core where the machine has no GPU. `running`: branches, mean. `step`: time that "
        "branches ran divided by the tokens that they gave, starts and stops included. `gap` between two tokens of a "
        "branch and `first` token are vLLM's own means. `commits/s`: tokens. CPU: seconds per second; `others`: other "
        "programs on the drafter's core."
    )


def _provenance(result: WidthResult) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    return f"{machine.describe()}; {packages}; commit {git_commit() or 'unknown'}; {result.seconds:,.0f} s."


def print_report(result: WidthResult, console: Console) -> None:
    """Print tables and remarks."""
    for arm in result.arms:
        console.print(_rich_table(f"drafter {arm.name}", *_grid(arm)))
        for text in _remarks(arm):
            console.print(escape(text), style="bold" if arm.held else "bold yellow", highlight=False)
        for process, groups in arm.profile.items():
            console.print(_rich_table(f"{process} process at {BAR_WIDTH} branches", *_profile_grid(groups)))
    console.print(escape(_explanation(result)), highlight=False)
    console.print(escape(_provenance(result)), style="dim", highlight=False)


def _rich_table(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in titles:
        table.add_column(name, justify="left" if name == "where" else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---" if name == "where" else "---:" for name in titles], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(result: WidthResult) -> str:
    """Return the Markdown page."""
    parts = ["# What running branches cost the drafter"]
    for arm in result.arms:
        parts += [f"## Drafter {arm.name}", _markdown_table(*_grid(arm)), *_remarks(arm)]
        if arm.profile:
            parts.append(f"Profile at {BAR_WIDTH} branches, waiting threads left out:")
        for process, groups in arm.profile.items():
            parts += [f"### {process} process", _markdown_table(*_profile_grid(groups))]
        if arm.pace is None and not arm.profile:
            parts.append("No profile: py-spy is not installed, may not look into processes here, or was not asked.")
    parts += ["## How it was measured", _explanation(result), f"`{command_line()}`; {_provenance(result)}"]
    return "\n\n".join(parts) + "\n"


def write_json(result: WidthResult, path: Path) -> None:
    """Write the result file.

    Raises:
        WanspecError: It cannot be written.
    """
    _write(path, "--json", json.dumps(result.as_json(), indent=1, ensure_ascii=False) + "\n")


def write_markdown(result: WidthResult, path: Path) -> None:
    """Write the Markdown page.

    Raises:
        WanspecError: It cannot be written.
    """
    _write(path, "--markdown", markdown(result))


def _write(path: Path, option: str, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise WanspecError(f"{option}: cannot write {path}: {error.strerror}") from error
