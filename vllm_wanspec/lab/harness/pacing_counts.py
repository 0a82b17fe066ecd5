"""How well servers kept their pace: forwards that took longer than they were stretched to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vllm_wanspec.emulate.pacing import STATS_INTERVAL_S
from vllm_wanspec.errors import WanspecError

#: Above this share of overruns a paced run does not show what it claims to (design, section 10).
MAX_OVERRUN_SHARE = 0.01
#: What the forwards of a draft model beside the target are called; its target writes them down with its own.
DRAFTS = "draft_model drafts"
#: After a forward the counts of it stand in the file.
STATS_SETTLE_S = STATS_INTERVAL_S + 0.25


class Paced(NamedTuple):
    """Paced forwards of one server, and how many of them took longer than their pace."""

    steps: int
    overruns: int

    def since(self, earlier: Paced) -> Paced:
        """Return what came after an earlier count."""
        return Paced(self.steps - earlier.steps, self.overruns - earlier.overruns)

    @property
    def share(self) -> float:
        """Overruns per forward; 0 without any."""
        return self.overruns / self.steps if self.steps else 0.0


def read_paced(stats: Mapping[str, Path]) -> dict[str, Paced]:
    """Return what each server has paced so far, by name; one that has paced nothing yet is absent.

    Args:
        stats: Pacing statistics file per server.
    """
    found: dict[str, Paced] = {}
    for name, path in stats.items():
        with contextlib.suppress(OSError, ValueError, KeyError):
            counts = json.loads(path.read_text("utf-8"))
            found[name] = Paced(int(counts["steps"]), int(counts["overruns"]))
            if "draft_steps" in counts:
                found[DRAFTS] = Paced(int(counts["draft_steps"]), int(counts["draft_overruns"]))
    return found


def paced_since(stats: Mapping[str, Path], before: Mapping[str, Paced]) -> dict[str, Paced]:
    """Return what each server has paced since ``before``; nothing where that was never read."""
    if not before:
        return {}
    return {name: now.since(before.get(name, Paced(0, 0))) for name, now in read_paced(stats).items()}


def check_paced(stats: Mapping[str, Path], paced: Mapping[str, Paced]) -> None:
    """Raise WanspecError if a server paces nothing, so that its figures mean nothing."""
    unpaced = [name for name in stats if name not in paced]
    if unpaced:
        reason = "vLLM did not load our general plugin; is vllm-wanspec installed beside it?"
        raise WanspecError(f"{', '.join(unpaced)}: no model forward was paced: {reason}")
