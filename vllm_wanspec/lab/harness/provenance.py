"""Where a result comes from: machine, versions, commit, command, duration; asked once, when a run begins."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_wanspec.lab.harness import machine

GIT_TIMEOUT_S = 10.0
#: What runs write themselves: no code, and an interrupted run that has written there must be able to go on.
RESULTS = "docs/results"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a result comes from.

    Attributes:
        machine: Processor, cores, memory and system.
        versions: Of Python and of the packages that a measurement depends on.
        commit: The checkout's, with ``-dirty`` where files other than results had changed; None outside a checkout.
        command: What was run.
        seconds: Duration of the whole run.
    """

    machine: str
    versions: dict[str, str]
    commit: str | None
    command: str
    seconds: float

    @classmethod
    def of_this_run(cls, program: str) -> Provenance:
        """Ask this machine; when a run begins, before its results, or anybody else, change the checkout.

        Args:
            program: What stands before the arguments, such as ``wanspec``.
        """
        command = f"{program} {shlex.join(sys.argv[1:])}".strip()
        return cls(machine.describe(), machine.versions(), git_commit(), command, 0.0)

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Provenance:
        """Return what `as_json` gave."""
        return cls(**{one.name: data[one.name] for one in fields(cls)})

    def after(self, seconds: float) -> Provenance:
        """Return the same with the duration of the whole run."""
        return replace(self, seconds=seconds)

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        commit = self.commit or "unknown"
        return f"`{self.command}`; {self.machine}; {packages}; commit {commit}; {self.seconds:,.0f} s."

    def as_json(self) -> dict[str, Any]:
        """Return the end of every result file."""
        return {
            "seconds": round(self.seconds, 1),
            "machine": self.machine,
            "versions": self.versions,
            "commit": self.commit,
            "command": self.command,
        }


def git_commit() -> str | None:
    """Return the checkout's commit; None outside a checkout.

    With ``-dirty`` where tracked files have changed, those in `RESULTS` excepted.
    """
    commit = _git("describe", "--always", "--exclude=*")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RESULTS}")
    if not commit or changed is None:
        return None
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str | None:
    """What a git command says of the checkout; None where it fails."""
    argv = ["git", "--no-optional-locks", "-C", str(machine.checkout()), *arguments]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()
