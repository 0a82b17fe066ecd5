"""Invented runs of the side-by-side bench."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_wanspec.lab.compare.arms import ARMS as KNOWN
from vllm_wanspec.lab.compare.arms import named_arms
from vllm_wanspec.lab.compare.plan import Options, cells
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.pacing_counts import Paced
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.records import Batch, Cell, Reference, Request, Trial

ARMS = ("none", "none_constrained", "ngram", "draft_model", "wanspec", "oracle", "wanspec_dead", "wanspec_random")
RTT_MS = (0.0, 10.0, 20.0, 30.0, 50.0, 70.0, 100.0, 500.0)
TOKENS = 40
GAMMA = 4
LEVELS = {
    "none": 36.5,
    "none_constrained": 36.6,
    "ngram": 31.0,
    "draft_model": 22.0,
    "oracle": 7.5,
    "wanspec_dead": 36.8,
    "wanspec_random": 36.9,
}
#: Arms for which one text is as hard as another.
STEADY = ("none", "none_constrained", "wanspec_dead", "wanspec_random")
TIMES_MS = {0.0: 14.5, 10.0: 15.0, 20.0: 18.0, 30.0: 19.2, 50.0: 19.8, 70.0: 21.5, 100.0: 27.0, 500.0: 35.5}


def options(**changes: Any) -> Options:
    """Those of ``make bench``; arms by name."""
    fields: dict[str, Any] = {
        "target": "models/target",
        "draft": "models/draft",
        "prompts": Path("prompts.jsonl"),
        "arms": ARMS,
        "rtt_ms": RTT_MS,
        "concurrency": (1, 8),
        "concurrent_arms": ("none", "draft_model", "wanspec", "wanspec_no_wait"),
        "concurrent_rtt_ms": (30.0,),
    }
    fields |= changes
    return Options(**(fields | {name: named_arms(name, fields[name]) for name in ("arms", "concurrent_arms")}))


def provenance(seconds: float = 3700.0) -> Provenance:
    """Of nowhere."""
    return Provenance("a machine", {"python": "3"}, "abc1234", "wanspec bench --check", seconds)


def reference(index: int, ranks: Sequence[int | None] = (0, 0, 0, 1, 0, 0, None, 0) * 5) -> Reference:
    """A prompt whose text has as many tokens as there are ranks."""
    return Reference(index, f"module{index}", "def f(", (1, 2, 3), tuple(range(len(ranks))), tuple(ranks))


def request(prompt: int, time_ms: float, tokens: int = TOKENS - 1, steps: int = 13, ttft_ms: float = 80.0) -> Request:
    """A request."""
    return Request(prompt, ttft_ms, time_ms, tokens, steps)


def batch(cell: Cell, requests: Sequence[Request], repeat: int = 0, **changes: Any) -> Batch:
    """Requests one after the other, without counters, or with some by name."""
    seconds = sum(one.ttft_ms + one.time_ms for one in requests) / 1000.0
    fields: dict[str, Any] = {"cell": cell, "repeat": repeat, "seconds": seconds, "requests": tuple(requests)}
    fields |= changes
    return Batch(**(fields | {"counters": Counters(fields.get("counters", {}))}))


def counters(arm: str, requests: int) -> Mapping[str, float]:
    """What as many requests add."""
    drafts = {"num_drafts": 12, "num_draft_tokens": 40, "num_accepted_tokens": 26}
    local = {"local_draft_passes": 0, "sent_bytes": 4000, "received_bytes": 40_000, "waits": 1, "wait_seconds": 0.005}
    found: dict[str, float] = {}
    if arm not in ("none", "none_constrained"):
        found |= drafts
    if KNOWN[arm].is_remote:
        found |= local
    if KNOWN[arm].uses_wan:
        found |= {"drafted_tokens": 310}
    return {name: value * requests for name, value in found.items()}


def _pace(cell: Cell, times_ms: Mapping[float, float]) -> float:
    return LEVELS[cell.arm] if cell.rtt_ms is None else times_ms[cell.rtt_ms]


def full_run(prompts: int = 24, times_ms: Mapping[float, float] = TIMES_MS, **changes: Any) -> Result:
    """A whole run of ``make bench`` in which all bars hold."""
    made = changes.pop("options", options())
    rng = random.Random(3)
    hard = [rng.uniform(0.85, 1.15) for _ in range(prompts)]
    batches = []
    for cell in cells(made):
        for repeat in range(made.repeats):
            paces = [_pace(cell, times_ms) * rng.uniform(0.999, 1.001) for _ in hard]
            if cell.arm not in STEADY:
                paces = [pace * factor for pace, factor in zip(paces, hard, strict=True)]
            requests = [request(index, pace * (TOKENS - 1)) for index, pace in enumerate(paces)]
            cpu_s = {"target": 0.4} | ({"drafter": 0.6} if KNOWN[cell.arm].uses_wan else {})
            if cell.concurrency == 1:
                batches += [batch(cell, [one], repeat, counters=counters(cell.arm, 1), cpu_s=cpu_s) for one in requests]
            else:
                seconds = sum(one.ttft_ms + one.time_ms for one in requests) / 1000.0 / cell.concurrency
                found = counters(cell.arm, prompts)
                batches.append(batch(cell, requests, repeat, seconds=seconds, counters=found, cpu_s=cpu_s))
    fields: dict[str, Any] = {
        "options": made,
        "taken": [reference(index) for index in range(prompts)],
        "trials": [Trial(gamma, 22.0 + abs(gamma - GAMMA)) for gamma in made.gammas],
        "gamma": GAMMA,
        "batches": batches,
        "paced": {"none": Paced(9000, 3), "wanspec": Paced(5000, 10), "drafter": Paced(20_000, 20)},
        "provenance": provenance(),
    }
    return Result(**(fields | changes))
