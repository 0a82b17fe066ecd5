"""The tree bench's result: everything that a run found, judged, and as JSON."""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_wanspec.lab.compare.demo_report import Divergence
from vllm_wanspec.lab.compare.trees_figures import ROW_COLUMNS, ArmFigures, Row, arm_figures
from vllm_wanspec.lab.compare.trees_measure import Reference
from vllm_wanspec.lab.compare.trees_setup import DEFAULT_ARM, MAIN_LINE, TreesOptions
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.models import MIN_CUT
from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE, Paced
from vllm_wanspec.lab.stats import rounded

__all__ = ["MAX_RATIO", "MIN_PROMPTS", "TARGET", "TreesResult", "command_line", "git_commit"]

#: What redundancy has to buy: time per token of the default arm divided by the main line's alone …
MAX_RATIO = 0.93
#: … with this many prompts at least.
MIN_PROMPTS = 32
NEAR_FASTEST = 1.01
TARGET = "wanspec"
GIT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class TreesResult:
    """Everything that a run found.

    Args:
        options: The bench's settings.
        references: All prompts with their plain texts, those that are too short included.
        rows: The requests of complete rounds.
        differences: Arm and place of each output that differs from the plain one.
        paced: Forwards that each server paced.
        seconds: Duration of the whole run.
        ended_by: What ended the run before its end; None if nothing did.
    """

    options: TreesOptions
    references: Sequence[Reference]
    rows: Sequence[Row]
    differences: Sequence[tuple[str, Divergence]]
    paced: Mapping[str, Paced]
    seconds: float
    ended_by: str | None = None

    @functools.cached_property
    def figures(self) -> tuple[ArmFigures, ...]:
        """Each arm's figures, in the order of the arms."""
        plain = {reference.index: reference.plain for reference in self.references}
        options = self.options
        return tuple(arm_figures(arm, self.rows, options.baseline, plain, options.seed) for arm in options.arms)

    @property
    def measured_prompts(self) -> int:
        """Prompts with at least one complete round."""
        return len({row.prompt for row in self.rows})

    @property
    def short_prompts(self) -> int:
        """Prompts that were dropped because their plain text ends or repeats itself too early."""
        return sum(not reference.is_usable for reference in self.references)

    @property
    def errors(self) -> list[tuple[str, Divergence]]:
        """Outputs that differ where there is no floating-point tie."""
        return [(arm, found) for arm, found in self.differences if not found.tie]

    @property
    def is_valid(self) -> bool:
        """Whether the target kept its pace; where nothing is known of it, the figures say nothing."""
        paced = self.paced.get(TARGET)
        return paced is not None and paced.share <= MAX_OVERRUN_SHARE

    @property
    def held(self) -> bool | None:
        """Whether trees buy what they have to; None where this run cannot tell."""
        default = next((one for one in self.figures if one.arm.name == DEFAULT_ARM), None)
        if default is None or default.ratio is None or self.options.baseline != MAIN_LINE:
            return None
        sound = self.ended_by is None and self.is_valid and not self.errors and self.measured_prompts >= MIN_PROMPTS
        return default.ratio.value <= MAX_RATIO if sound else None

    @property
    def frugal(self) -> ArmFigures | None:
        """Of the arms within 1 % of the fastest one, that which has the draft model compute the fewest tokens."""
        known = [
            (pace, cost, place)
            for place, one in enumerate(self.figures)
            if one.arm.drafts
            and (pace := one.timed.per_token_ms) is not None
            and (cost := one.counters.get("drafted_tokens")) is not None
        ]
        if not known:
            return None
        fastest = min(known)[0]
        return self.figures[min((cost, place) for pace, cost, place in known if pace <= fastest * NEAR_FASTEST)[1]]

    def as_json(self) -> dict[str, Any]:
        """Return the result file's content."""
        options = self.options
        frugal = self.frugal
        return {
            "complete": self.ended_by is None,
            "ended_by": self.ended_by,
            "valid": self.is_valid,
            "bars": {"ratio_to_main_line": MAX_RATIO, "prompts": MIN_PROMPTS},
            "held": self.held,
            "rtt_ms": options.rtt_ms,
            "pacing": {"target": options.target_pace.setting, "draft": options.draft_pace.setting},
            "prompts": {
                "sent": len(self.references),
                "too_short": self.short_prompts,
                "shortest_tokens": MIN_CUT,
                "measured": self.measured_prompts,
            },
            "max_tokens": options.max_tokens,
            "repeats": options.repeats,
            "speculative_tokens": options.speculative_tokens,
            "seed": options.seed,
            "baseline": options.baseline,
            "frugal_arm": frugal and frugal.arm.name,
            "arms": [one.as_json() for one in self.figures],
            "ties": len(self.differences) - len(self.errors),
            "differences": [f"{arm}: {found}" for arm, found in self.errors],
            "overruns": {name: rounded(paced.share) for name, paced in self.paced.items()},
            "paced_forwards": {name: paced.steps for name, paced in self.paced.items()},
            "references": [_reference_json(reference) for reference in self.references],
            "row_columns": list(ROW_COLUMNS),
            "rows": [row.as_json() for row in self.rows],
            "seconds": round(self.seconds, 1),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "commit": git_commit(),
            "command": command_line(),
        }


def _reference_json(reference: Reference) -> dict[str, Any]:
    return {
        "prompt": reference.index,
        "module": reference.prompt.module,
        "generated": reference.generated,
        "cut": reference.cut,
        "off_ms_per_token": rounded(reference.plain.per_token_ms),
    }


def command_line() -> str:
    """Return the command that runs this bench, as given."""
    return shlex.join(["python", "-m", "vllm_wanspec.lab.compare.trees", *sys.argv[1:]])


def git_commit() -> str | None:
    """Return the checkout's commit, with ``-dirty`` where files have changed; None outside a checkout."""
    argv = ["git", "-C", str(machine.checkout()), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
