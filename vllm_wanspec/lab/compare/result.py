"""The side-by-side bench's result file: rows, bars, the raw requests, and where all of it comes from."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_wanspec.lab.compare.figures import figures
from vllm_wanspec.lab.compare.measure import BenchRun
from vllm_wanspec.lab.compare.trees_result import git_commit
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.running import write_output
from vllm_wanspec.lab.records import Batch, Reference
from vllm_wanspec.lab.stats import rounded

__all__ = ["as_json", "command_line", "write_json"]

BATCH_COLUMNS = ("arm", "rtt_ms", "concurrency", "repeat", "seconds", "cpu_target", "cpu_drafter", "ties", "wrong")
REQUEST_COLUMNS = ("prompt", "ttft_ms", "time_ms", "tokens", "steps")
#: Lists of the result file with one line for each of their many entries.
FLAT = ("rows", "references", "batches")


def as_json(run: BenchRun) -> dict[str, Any]:
    """Return the result file's content."""
    found = figures(run)
    options = run.options
    counters = sorted({name for batch in run.batches for name in batch.counters})
    ranked = any(rank is not None for reference in run.references for rank in reference.ranks)
    target, draft = options.target_pace, options.draft_pace
    return {
        "complete": run.ended_by is None,
        "ended_by": run.ended_by,
        "valid": found.valid,
        "held": found.held,
        "doubts": list(found.doubts),
        "bars": [bar.as_json() for bar in found.bars],
        "pacing": target and {"target": target.setting, "draft": draft and draft.setting},
        "time_scale": options.time_scale,
        "gamma": run.gamma,
        "trials": [{"gamma": trial.gamma, "tpot_ms": rounded(trial.tpot_ms)} for trial in run.trials],
        "rows": [row.as_json() for row in found.rows],
        "differences": list(found.wrong),
        "overruns": {name: rounded(paced.share) for name, paced in run.paced.items()},
        "paced_forwards": {name: paced.steps for name, paced in run.paced.items()},
        "references": [_reference_json(reference, ranked) for reference in run.references],
        "batch_columns": [*BATCH_COLUMNS, "requests", *counters],
        "request_columns": list(REQUEST_COLUMNS),
        "batches": [_batch_json(batch, counters) for batch in run.batches],
        "options": {name: _shown(value) for name, value in options.as_json().items()},
        "seconds": round(run.seconds, 1),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": git_commit(),
        "command": command_line(),
    }


def _shown(value: Any) -> Any:
    """An option's value; a path in the checkout without the way to the checkout."""
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    root = machine.checkout()
    return str(Path(value).relative_to(root)) if Path(value).is_relative_to(root) else value


def _reference_json(reference: Reference, ranked: bool) -> dict[str, Any]:
    """A prompt without its text: how long the target's own is, and how often the draft model agrees with it."""
    ranks = reference.ranks if ranked else ()
    return {
        "index": reference.index,
        "name": reference.name,
        "tokens": len(reference.expected),
        "agreement": rounded(ranks.count(0) / len(ranks)) if ranks else None,
        "outside": rounded(ranks.count(None) / len(ranks)) if ranks else None,
    }


def _batch_json(batch: Batch, counters: Sequence[str]) -> list[Any]:
    figures = (batch.seconds, batch.cpu_s.get("target"), batch.cpu_s.get("drafter"))
    requests = [[rounded(getattr(request, name)) for name in REQUEST_COLUMNS] for request in batch.requests]
    increases = [rounded(batch.counters.get(name)) for name in counters]
    return [*batch.cell, batch.repeat, *map(rounded, figures), batch.ties, len(batch.wrong), requests, *increases]


def command_line() -> str:
    """Return the command that runs this bench, as given."""
    return shlex.join(["wanspec", *sys.argv[1:]])


def write_json(run: BenchRun, path: Path) -> None:
    """Write the result file.

    Raises:
        WanspecError: The file cannot be written.
    """
    data = as_json(run)
    text = json.dumps(data | {name: [] for name in FLAT}, indent=1, ensure_ascii=False)
    for name in FLAT:
        lines = ",\n  ".join(json.dumps(one, ensure_ascii=False) for one in data[name])
        text = text.replace(f'\n "{name}": []', f'\n "{name}": [\n  {lines}\n ]', 1)
    write_output("--json", path, text + "\n")
