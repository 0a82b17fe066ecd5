"""What servers ran and how well they kept their pace, as the processes that run the forwards count it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vllm_wanspec.errors import WanspecError

#: Above this share of overruns a paced run does not show what it claims to (design, section 10).
MAX_OVERRUN_SHARE = 0.01
#: Added to a target's name: the forwards of the draft model beside it, which the target writes down with its own.
DRAFTS = " drafts"
#: A text that is just being written is read again this often, and after this long.
READ_ATTEMPTS = 20
READ_PAUSE_S = 0.001


@dataclass(frozen=True, slots=True)
class PacingCounts:
    """Forwards of one process so far.

    Attributes:
        steps: Forwards of its model; at a target that speculates, one per step.
        overruns: Those whose work took longer than their pace; none where nothing is paced.
        paced_ms_total: Sum of their paces, milliseconds; 0 where nothing is paced.
        work_ms_total: Sum of their real work, milliseconds.
        draft_steps: Forwards of a draft model that vLLM loads beside the model; 0 where it loads none.
        draft_overruns: Overruns among those.
        draft_paced_ms_total: Sum of their paces, milliseconds; 0 where they are only counted.
        draft_work_ms_total: Sum of their real work, milliseconds.
        async_scheduling: Whether the model's runner schedules ahead.
        num_spec_tokens: Draft tokens per step that the runner is made for; 0 without speculation.
    """

    steps: int
    overruns: int
    paced_ms_total: float
    work_ms_total: float
    draft_steps: int
    draft_overruns: int
    draft_paced_ms_total: float
    draft_work_ms_total: float
    async_scheduling: bool | None
    num_spec_tokens: int | None

    @classmethod
    def of(cls, text: str) -> PacingCounts:
        """Read the text of a statistics file.

        Raises:
            ValueError: It is not JSON, or lacks a count.
        """
        values = json.loads(text)
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or not values.keys() >= set(names):
            raise ValueError(f"not the counts of a pacer: {text[:80]!r}")
        return cls(**{name: values[name] for name in names})


def read_counts(path: Path) -> PacingCounts | None:
    """Return the counts in a statistics file now; None where there is no file, or not one that counts.

    Its process may write while it is read, so two equal texts in a row are waited for, some 20 ms at most.
    """
    for _ in range(READ_ATTEMPTS):
        try:
            text, again = path.read_text("utf-8", "replace"), path.read_text("utf-8", "replace")
        except OSError:
            return None
        if text == again:
            with contextlib.suppress(ValueError):
                return PacingCounts.of(text)
        time.sleep(READ_PAUSE_S)
    return None


class Paced(NamedTuple):
    """Paced forwards of one server, and how many of them took longer than their pace."""

    steps: int
    overruns: int

    def plus(self, more: Paced) -> Paced:
        """Return the sum."""
        return Paced(self.steps + more.steps, self.overruns + more.overruns)

    @property
    def share(self) -> float:
        """Overruns per forward; 0 without any."""
        return self.overruns / self.steps if self.steps else 0.0


def check_counted(stats: Mapping[str, Path]) -> None:
    """Raise WanspecError if a server counts no forwards, so that its figures mean nothing.

    Args:
        stats: Pacing statistics file per server.
    """
    uncounted = [name for name, path in stats.items() if read_counts(path) is None]
    if uncounted:
        reason = "vLLM did not load our general plugin; is vllm-wanspec installed beside it?"
        raise WanspecError(f"{', '.join(uncounted)}: no model forward was paced: {reason}")
