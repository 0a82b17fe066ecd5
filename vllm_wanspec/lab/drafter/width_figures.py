"""The width bench's figures: those of a window, their medians by width, and how they stand to the bar."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.drafter.loads import COMMIT_INTERVAL_S, CONTEXT_TOKENS, ChurningLoad, SteadyLoad
from vllm_wanspec.lab.harness.cpu import CORE
from vllm_wanspec.lab.harness.launch import DRAFT_PACE

#: So many running branches may take so many times the step of one.
BAR_WIDTH = 32
BAR_RATIO = 2.5
NEAR = 0.9
#: Above this share of the drafter's core other programs disturbed the measurement.
MAX_OTHERS = 0.10
STEADY, CHURNING = "steady", "churning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One window's figures, or their medians.

    Attributes:
        width: Running branches asked for.
        running: Running branches, mean.
        step_ms: Time that a branch takes for a token.
        events_per_s: Tokens drafted.
        starts_per_s: Branches started.
        api_cpu: Seconds per second used by the API server process.
        engine_cpu: The same of the engine process.
        others_cpu: The same of everything else on the drafter's core; 0 where it has none of its own.
    """

    width: int
    running: float
    step_ms: float
    events_per_s: float
    starts_per_s: float
    api_cpu: float
    engine_cpu: float
    others_cpu: float = 0.0

    @property
    def is_near(self) -> bool:
        """Whether about as many branches ran as were asked for."""
        return self.running >= NEAR * self.width

    def as_json(self) -> dict[str, float | bool]:
        """Return the rounded figures."""
        return {name: round(value, 4) for name, value in asdict(self).items()} | {"near_width": self.is_near}


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyRow(Row):
    """A window of the steady load: only the time while about all branches ran; steps without a branch's start.

    Attributes:
        rounds: Sessions, one after another.
        measured_s: Seconds of the window in which about all branches ran.
    """

    rounds: float
    measured_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnRow(Row):
    """A window of the churning load: all of its time; steps with their branches' starts and stops.

    Attributes:
        gap_ms: Time between two tokens of a branch, by vLLM's own count.
        first_ms: Time to a branch's first token, by vLLM's own count.
        bytes_per_s: Received by the controller.
        committed_per_s: Tokens committed.
    """

    gap_ms: float
    first_ms: float
    bytes_per_s: float
    committed_per_s: float


AnyRow = TypeVar("AnyRow", bound=Row)


def medians(rows: Sequence[AnyRow]) -> AnyRow:
    """The medians of one width's windows, figure by figure."""
    columns = {name: statistics.median(asdict(row)[name] for row in rows) for name in asdict(rows[0])}
    return replace(rows[0], **{**columns, "width": rows[0].width})


def cpu_shares(used_s: Mapping[str, float], seconds: float) -> dict[str, float]:
    """A row's figures of processor time, from seconds that the drafter's processes and all programs on its core used.

    All are 0 where no time has passed.
    """
    api, engine, core = (used_s.get(name, 0.0) / seconds if seconds else 0.0 for name in ("api", "engine", CORE))
    return {"api_cpu": api, "engine_cpu": engine, "others_cpu": max(0.0, core - api - engine)}


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


@dataclass(frozen=True, slots=True)
class WidthOptions:
    """The width bench's settings, as its command explains them; a pace of None is as fast as the model can."""

    widths: tuple[int, ...] = (1, 8, 16, 32, 64)
    paces: tuple[Pacing | None, ...] = (None, DRAFT_PACE)
    loads: tuple[str, ...] = (STEADY, CHURNING)
    steady: SteadyLoad = field(default_factory=SteadyLoad)
    churning: ChurningLoad = field(default_factory=ChurningLoad)
    repeats: int = 3
    window_s: float = 4.0
    warm_up_s: float = 1.0
    profile_s: int = 8
    seed: int = 0
    models: Path | None = None

    def __post_init__(self) -> None:
        if 1 not in self.widths:
            raise ConfigError("--widths: 1 is missing, which all others are compared with")


@dataclass(frozen=True, slots=True)
class WidthResult:
    """Everything that a run found: the judged load's arms, one per pace, and the other load's."""

    options: WidthOptions
    steady: Sequence[Arm]
    churning: Sequence[Arm]

    @property
    def held(self) -> bool:
        """Whether every steady arm is known to keep the bar."""
        return bool(self.steady) and all(arm.held for arm in self.steady)

    def as_json(self) -> dict[str, Any]:
        """Return what the result file has beside where it comes from."""
        options = self.options
        churning = asdict(options.churning) | {"commit_interval_s": COMMIT_INTERVAL_S}
        return {
            "held": self.held,
            "bar": {"width": BAR_WIDTH, "ratio": BAR_RATIO},
            "steady": [arm.as_json() | {"held": arm.held} for arm in self.steady],
            "churning": [arm.as_json() for arm in self.churning],
            "loads": {STEADY: asdict(options.steady), CHURNING: churning, "context_tokens": CONTEXT_TOKENS},
            "repeats": options.repeats,
            "window_s": options.window_s,
        }
