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
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.records import Batch, Cell, Load, Part, Records, Reference, Request, Serving, Setting, Trial

ARMS = (
    *("none", "none_constrained", "ngram", "lookup", "draft_model", "draft_model_lookup"),
    *("wanspec", "wanspec_no_lookup", "oracle", "wanspec_dead", "wanspec_random"),
)
RTT_MS = (0.0, 10.0, 20.0, 30.0, 50.0, 70.0, 100.0)
FAR_MS = 500.0
TOKENS = 40
GAMMA = 4
LEVELS = {
    "none": 36.5,
    "none_constrained": 36.6,
    "ngram": 31.0,
    "lookup": 30.0,
    "draft_model": 22.0,
    "draft_model_lookup": 20.0,
    "oracle": 7.5,
    "wanspec_dead": 36.8,
    "wanspec_random": 36.9,
}
#: Arms for which one text is as hard as another.
STEADY = ("none", "none_constrained", "wanspec_dead", "wanspec_random")
TIMES_MS = {0.0: 14.5, 10.0: 15.0, 20.0: 18.0, 30.0: 19.2, 50.0: 19.8, 70.0: 21.5, 100.0: 27.0, 500.0: 35.5}
#: A drafter without lookup is so much slower.
NO_LOOKUP_MS = 1.0


def options(**changes: Any) -> Options:
    """Those of ``make bench``; arms by name."""
    fields: dict[str, Any] = {
        "target": "models/target",
        "draft": "models/draft",
        "prompts": Path("prompts.jsonl"),
        "arms": ARMS,
        "rtt_ms": RTT_MS,
        "far_rtt_ms": (FAR_MS,),
        "concurrency": (1, 8),
        "concurrent_arms": ("none", "draft_model", "wanspec", "wanspec_no_wait"),
        "gammas": (2, 3, 4, 5),
        "ngrams": (Setting(8, 2, 4), Setting(4, 1, 3)),
        "concurrent_rtt_ms": (30.0,),
    }
    fields |= changes
    return Options(**(fields | {name: named_arms(name, fields[name]) for name in ("arms", "concurrent_arms")}))


def provenance(seconds: float = 3700.0) -> Provenance:
    """Of nowhere."""
    return Provenance("a machine", {"python": "3"}, "abc1234", "wanspec bench --check", seconds)


def reference(index: int, ranks: Sequence[int | None] = (0, 0, 0, 1, 0, 0, None, 0) * 5) -> Reference:
    """A prompt whose text has as many tokens as there are ranks."""
    kind = ("code", "prose")[index % 2]
    text = (1, 2, 3), tuple(range(10, 10 + len(ranks))), tuple(ranks)
    return Reference(index, f"module{index}", "def f(", *text, kind=kind)


def request(prompt: int, time_ms: float, tokens: int = TOKENS - 1, steps: int = 13, ttft_ms: float = 80.0) -> Request:
    """A request whose steps come at equal times, and yield one token each but for the last."""
    counts = [1] * steps + [tokens - steps + 1]
    return Request(prompt, tuple((ttft_ms + time_ms * place / steps, count) for place, count in enumerate(counts)))


def batch(cell: Cell, requests: Sequence[Request], repeat: int = 0, **changes: Any) -> Batch:
    """Requests one after the other, without counters, or with some by name."""
    seconds = sum(one.ttft_ms + one.time_ms for one in requests) / 1000.0
    fields: dict[str, Any] = {"cell": cell, "repeat": repeat, "seconds": seconds, "requests": tuple(requests)}
    fields |= changes
    return Batch(**(fields | {"counters": Counters(fields.get("counters", {}))}))


def counters(arm: str, requests: int, scale: float = 1.0) -> Mapping[str, float]:
    """What as many requests add at a time scale."""
    known = KNOWN[arm]
    found: dict[str, float] = {"target_forwards": 14, "target_overruns": 0, "local_draft_passes": 0}
    found |= {"local_draft_overruns": 0}
    if arm not in ("none", "none_constrained"):
        found |= {"num_drafts": 12, "num_draft_tokens": 40, "num_accepted_tokens": 26}
    if known.is_remote:
        found |= {"accepted_main_line": 15, "accepted_branch": 6, "accepted_lookup": 5, "waits": 1}
        found |= {"sent_bytes": 4000, "received_bytes": 40_000, "wait_seconds": 0.005}
    if known.uses_wan:
        found |= {"drafted_tokens": 310, "drafter_forwards": 100, "drafter_overruns": 0}
    if known.is_colocated:
        found |= {"local_draft_passes": 48, "local_draft_paced_ms": 48 * 5.02 * scale}
    if arm == "draft_model_lookup":
        found |= {"accepted_main_line": 21, "accepted_branch": 0, "accepted_lookup": 5, "drafted_tokens": 36}
    return {name: value * requests for name, value in found.items()}


def _pace(cell: Cell, times_ms: Mapping[float, float]) -> float:
    if cell.rtt_ms is None:
        return LEVELS[cell.arm]
    return times_ms[cell.rtt_ms] + NO_LOOKUP_MS * (cell.arm == "wanspec_no_lookup" and cell.rtt_ms != FAR_MS)


def trials(made: Options) -> list[Trial]:
    """A pre-pass in which γ = 4 is best at one stream, γ = 3 above, and the first n-grams everywhere."""
    found = []
    for arm in made.started:
        for setting in made.candidates(arm):
            for load in made.loads(arm):
                best = GAMMA if load == Load() else GAMMA - 1
                off = abs(setting.draft_tokens - best) if arm.is_colocated else made.ngrams.index(setting)
                found.append(Trial(arm.name, load, setting, 22.0 + off))
    return found


def servings(made: Options) -> list[Serving]:
    """Every arm's target, without async scheduling."""
    observed = {"async_scheduling": False, "draft_tokens": 8}
    facts = {"command": ["python", "-m", "vllm"], "environment": {}, "settings": None, "observed": observed}
    return [Serving(arm.target.name, (arm.name,), facts) for arm in made.started]


def records(
    references: Sequence[Reference],
    batches: Sequence[Batch],
    trials: Sequence[Trial] = (),
    servings: Sequence[Serving] = (),
) -> Records:
    """Those of a run of 3,700 s."""
    made = Records()
    made.references = {one.index: one for one in references}
    made.batches, made.trials = list(batches), list(trials)
    made.servings = {one.server: one for one in servings}
    made.parts = [Part(3700.0)]
    return made


def full_run(prompts: int = 24, times_ms: Mapping[float, float] = TIMES_MS, **changes: Any) -> Result:
    """A whole run of ``make bench`` in which all bars hold; ``changes`` of its records and of the result."""
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
            more: dict[str, Any] = {"cpu_s": {"target": 0.4}}
            if KNOWN[cell.arm].uses_wan:
                more = {"cpu_s": {"target": 0.4, "drafter": 0.6}, "rtt_ms": made.emulated_ms(cell.rtt_ms or 0.0) + 0.5}
            if cell.concurrency == 1:
                batches += [
                    batch(cell, [one], repeat, counters=counters(cell.arm, 1, made.time_scale), **more)
                    for one in requests
                ]
            else:
                seconds = sum(one.ttft_ms + one.time_ms for one in requests) / 1000.0 / cell.concurrency
                found = counters(cell.arm, prompts, made.time_scale)
                batches.append(batch(cell, requests, repeat, seconds=seconds, counters=found, **more))
    parts: dict[str, Any] = {"references": [reference(index) for index in range(prompts)], "batches": batches}
    parts |= {"trials": trials(made), "servings": servings(made)}
    parts |= {name: changes.pop(name) for name in tuple(changes) if name in parts}
    return Result(**{"options": made, "records": records(**parts), "provenance": provenance()} | changes)
