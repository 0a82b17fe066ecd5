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

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.lab.drafter.width_measure import (
    COMMIT_INTERVAL_S,
    CONTEXT_TOKENS,
    LONGEST_LEAD,
    MAX_NODES,
    NEAR,
    Load,
    Row,
    medians,
)
from vllm_wanspec.lab.drafter.width_steady import LOOKAHEAD, SteadyLoad
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.provenance import git_commit
from vllm_wanspec.lab.harness.running import write_output

__all__ = ["BAR_RATIO", "BAR_WIDTH", "Arm", "WidthResult", "markdown", "print_report", "write_json", "write_markdown"]

#: So many running branches may take so many times the step of one.
BAR_WIDTH = 32
BAR_RATIO = 2.5
#: Above this share of the drafter's core other programs disturbed the measurement.
MAX_OTHERS = 0.10

#: A figure's title and how it is written; the ratio to width 1 follows the step.
_FORMATS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "width": ("width", "{:.0f}".format),
    "running": ("running", "{:.1f}".format),
    "step_ms": ("step ms", "{:.2f}".format),
    "events_per_s": ("events/s", "{:,.0f}".format),
    "gap_ms": ("gap ms", "{:.2f}".format),
    "first_ms": ("first ms", "{:.1f}".format),
    "starts_per_s": ("starts/s", "{:,.0f}".format),
    "committed_per_s": ("commits/s", "{:.0f}".format),
    "bytes_per_s": ("bytes/s", "{:,.0f}".format),
    "api_cpu": ("API CPU", "{:.0%}".format),
    "engine_cpu": ("engine CPU", "{:.0%}".format),
    "others_cpu": ("others", "{:.0%}".format),
    "rounds": ("rounds", "{:.0f}".format),
    "measured_s": ("measured s", "{:.1f}".format),
}


@dataclass(frozen=True)
class Arm:
    """One drafter's windows under one load.

    Args:
        pace: Of its forwards; None is as fast as they are.
        windows: In the order in which they were taken, all of one kind.
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
        one = self.rows[0].step_ms
        return row.step_ms / one if one else float("nan")

    @property
    def at_bar(self) -> Row | None:
        """The bar's width, where it was measured."""
        return next((row for row in self.rows if row.width == BAR_WIDTH), None)

    @property
    def held(self) -> bool | None:
        """Whether the bar's width keeps the bar; None where it was not measured or fewer branches ran."""
        row = self.at_bar
        return None if row is None or not row.is_near else self.ratio(row) <= BAR_RATIO

    def as_json(self) -> dict[str, Any]:
        """Return medians, windows and profile."""
        return {
            "pace": self.pace.setting if self.pace else None,
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
        steady: The judged load's arms, one per pace.
        churning: The other load's.
        steady_load: What the sessions of the first asked for.
        load: What the session of the second asked for and committed.
        repeats: Windows per width.
        window_s: Seconds of a window.
        seconds: Duration of the whole run.
    """

    steady: tuple[Arm, ...]
    churning: tuple[Arm, ...]
    steady_load: SteadyLoad
    load: Load
    repeats: int
    window_s: float
    seconds: float

    @property
    def held(self) -> bool:
        """Whether every steady arm is known to keep the bar."""
        return bool(self.steady) and all(arm.held for arm in self.steady)

    def as_json(self) -> dict[str, Any]:
        """Return the result file's content."""
        churning = asdict(self.load) | {"commit_interval_s": COMMIT_INTERVAL_S}
        return {
            "held": self.held,
            "bar": {"width": BAR_WIDTH, "ratio": BAR_RATIO},
            "steady": [arm.as_json() | {"held": arm.held} for arm in self.steady],
            "churning": [arm.as_json() for arm in self.churning],
            "loads": {"steady": asdict(self.steady_load), "churning": churning, "context_tokens": CONTEXT_TOKENS},
            "repeats": self.repeats,
            "window_s": self.window_s,
            "seconds": round(self.seconds, 1),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "commit": git_commit(),
            "command": command_line(),
        }


def command_line() -> str:
    """Return the command that runs this bench, as given."""
    return shlex.join(["python", "-m", "vllm_wanspec.lab.drafter.width", *sys.argv[1:]])


def _grid(arm: Arm) -> tuple[list[str], list[list[str]]]:
    names = [name for name in _FORMATS if hasattr(arm.rows[0], name)]
    titles = [_FORMATS[name][0] for name in names]
    lines = [[_FORMATS[name][1](getattr(row, name)) for name in names] for row in arm.rows]
    place = names.index("step_ms") + 1
    for row, line in zip(arm.rows, lines, strict=True):
        line[names.index("running")] += "" if row.is_near else " (!)"
        line.insert(place, f"{arm.ratio(row):.2f}")
    titles.insert(place, "÷ width 1")
    return titles, lines


def _profile_grid(groups: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    return ["where", "share of samples"], [[name, f"{share:.0%}"] for name, share in groups.items()]


def _verdict(arm: Arm) -> list[str]:
    """Whether a steady arm keeps the bar."""
    row = arm.at_bar
    if row is None:
        return []
    word = {True: "held", False: "missed", None: "not decided, since fewer branches ran"}[arm.held]
    texts = [
        f"{BAR_WIDTH} branches take {arm.ratio(row):.2f} × the step of one; at most {BAR_RATIO} is asked for: {word}."
    ]
    engine_ms, api_ms, one_ms = _cpu_ms(row, "engine"), _cpu_ms(row, "api"), _cpu_ms(arm.rows[0], "engine")
    if one_ms:
        texts.append(
            f"Processor time in a step of {BAR_WIDTH} branches: engine {engine_ms:.2f} ms, {engine_ms / one_ms:.2f} × "
            f"its time for one; API server {api_ms:.2f} ms."
        )
    return texts


def _cpu_ms(row: Row, process: str) -> float:
    """Processor time that a process takes while each branch gets a token."""
    share: float = getattr(row, f"{process}_cpu")
    return share * row.step_ms


def _remarks(arm: Arm) -> list[str]:
    """Sentences on what the figures do not say."""
    texts = []
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


def _explanation(result: WidthResult) -> list[str]:
    steady, load = result.steady_load, result.load
    return [
        f"One session at a time at a real `wanspec drafter` with the demo's draft model, contexts of {CONTEXT_TOKENS} "
        f"tokens of held-out text. Medians of {result.repeats} windows of {result.window_s:g} s, the widths in "
        "changing order. API server and engine of the drafter share one core where the machine has no GPU. `running`: "
        "branches, mean. `events/s`: tokens drafted. CPU: seconds per second; `others`: other programs on the "
        "drafter's core.",
        f"Steady: every position branches into up to {steady.max_branches} tokens, side branches of up to "
        f"{steady.branch_depth} tokens, {LOOKAHEAD} tokens of lookahead, {MAX_NODES} nodes; nothing is committed; when "
        f"the branches have ended, the next session follows. Measured while at least {NEAR:.0%} of the branches run "
        "(`measured`: so many seconds of a window): `step` is the mean time between the arrivals of two successive "
        "tokens of a branch at the controller.",
        f"Churning: every position branches into up to {load.max_branches} tokens, branches of up to "
        f"{load.branch_depth} tokens; a played target commits up to {load.commit_tokens} drafted "
        f"token{'s' * (load.commit_tokens > 1)} every {COMMIT_INTERVAL_S * 1e3:.0f} ms (more where the draft is "
        f"{LONGEST_LEAD} tokens ahead), drawn from the tree by the draft model's probabilities. `step`: time that "
        "branches ran divided by the tokens that they gave, starts and stops included; `gap` between two tokens of a "
        "branch and `first` token are the drafter's own means; `commits/s`: tokens.",
    ]


def _provenance(result: WidthResult) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    return f"{machine.describe()}; {packages}; commit {git_commit() or 'unknown'}; {result.seconds:,.0f} s."


def print_report(result: WidthResult, console: Console) -> None:
    """Print tables and remarks."""
    for load, arms in (("steady", result.steady), ("churning", result.churning)):
        for arm in arms:
            console.print(_rich_table(f"{load} load, drafter {arm.name}", *_grid(arm)))
            for text in _verdict(arm) if load == "steady" else []:
                console.print(escape(text), style="bold" if arm.held else "bold yellow", highlight=False)
            for text in _remarks(arm):
                console.print(escape(text), style="bold yellow", highlight=False)
            for process, groups in arm.profile.items():
                console.print(_rich_table(f"{process} process at {BAR_WIDTH} branches", *_profile_grid(groups)))
    for text in _explanation(result):
        console.print(escape(text), highlight=False)
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
    if result.steady:
        parts.append("## Width: branches that all run")
        for arm in result.steady:
            parts += [f"### Drafter {arm.name}", _markdown_table(*_grid(arm)), *_verdict(arm), *_remarks(arm)]
            parts += _markdown_profile(arm)
    if result.churning:
        parts += ["## Commits: branches that are started and stopped all the time", "Not judged."]
        for arm in result.churning:
            parts += [f"### Drafter {arm.name}", _markdown_table(*_grid(arm)), *_remarks(arm), *_markdown_profile(arm)]
    if not any(arm.profile for arm in (*result.steady, *result.churning)):
        parts.append("No profile: py-spy is not installed, may not look into processes here, or was not asked.")
    parts += ["## How it was measured", *_explanation(result), f"`{command_line()}`; {_provenance(result)}"]
    return "\n\n".join(parts) + "\n"


def _markdown_profile(arm: Arm) -> list[str]:
    if not arm.profile:
        return []
    parts = [f"Profile at {BAR_WIDTH} branches, waiting threads left out:"]
    for process, groups in arm.profile.items():
        parts += [f"#### {process} process", _markdown_table(*_profile_grid(groups))]
    return parts


def write_json(result: WidthResult, path: Path) -> None:
    """Write the result file.

    Raises:
        WanspecError: It cannot be written.
    """
    write_output("--json", path, json.dumps(result.as_json(), indent=1, ensure_ascii=False) + "\n")


def write_markdown(result: WidthResult, path: Path) -> None:
    """Write the Markdown page.

    Raises:
        WanspecError: It cannot be written.
    """
    write_output("--markdown", path, markdown(result))
