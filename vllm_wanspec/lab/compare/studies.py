"""The conditions of ``make bench-more``: each changes one thing of one stream at R = 30 ms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_wanspec.lab.compare.arms import named_arms
from vllm_wanspec.lab.compare.plan import Options

RTT_MS = 30.0
#: Remote drafts and their peers, without lookup and with it.
COMPARED = named_arms("arms", ("draft_model", "draft_model_lookup", "wanspec", "wanspec_no_lookup"))
USELESS = named_arms("arms", ("none", "wanspec_dead", "wanspec_random"))
BASE = "base"
#: A drafter of two cores keeps the pace of many streams' branches only if it is so many times as long.
MANY_STREAMS_SCALE = 3.0


@dataclass(frozen=True, slots=True)
class Study:
    """One condition.

    Attributes:
        title: What is asked.
        changes: Of the settings that `base_options` gives.
    """

    title: str
    changes: Mapping[str, Any]


STUDIES: dict[str, Study] = {
    BASE: Study("One stream, nothing changed", {}),
    "streams": Study(
        "Several streams at a time",
        {
            "concurrency": (1, 2, 4, 8, 16),
            "arms": (*named_arms("", ["none"]), *COMPARED),
            "time_scale": MANY_STREAMS_SCALE,
        },
    ),
    "rates": Study(
        "Requests at random times",
        {
            "concurrency": (),
            "rates": (0.4, 0.8, 1.2),
            "slo_ms": (500.0, 100.0),
            "count": 48,
            "time_scale": MANY_STREAMS_SCALE,
        },
    ),
    "t07": Study("Sampling at T = 0.7", {"temperature": 0.7}),
    "t10": Study("Sampling at T = 1", {"temperature": 1.0}),
    "jitter": Study("Jitter of up to 5 ms each way, 5 ms more per round trip in the mean", {"jitter_ms": 5.0}),
    "loss": Study("One segment in a hundred lost", {"loss": 0.01}),
    "cut8": Study("Texts cut where 8 tokens repeat", {"repeat_span": 8}),
    "scale5": Study(
        "Paces and round trips five times as long, without lookup",
        {
            "time_scale": 5.0,
            "rtt_ms": (0.0, 30.0, 70.0),
            "arms": named_arms("", ["none", "draft_model", "wanspec_no_lookup"]),
            "gammas": (2, 3, 4),
        },
    ),
    "useless": Study("Drafters of no use, without lookup", {"arms": USELESS, "concurrency": (1, 8)}),
}


def base_options(target: str, draft: str, prompts: Any, **changes: Any) -> Options:
    """Return the settings of one stream with nothing changed."""
    settings: dict[str, Any] = {"arms": COMPARED, "rtt_ms": (RTT_MS,), "count": 24, "gammas": (1, 2, 3, 4)}
    settings |= {"trial_prompts": 6, "time_scale": 1.25}
    return Options(target=target, draft=draft, prompts=prompts, **(settings | changes))


def study_options(study: Study, base: Options) -> Options:
    """Return the settings of a study; above one stream it compares the same arms at the same round trips."""
    changed: dict[str, Any] = {"arms": base.arms, "rtt_ms": base.rtt_ms} | dict(study.changes)
    return replace(base, **changed, concurrent_arms=changed["arms"], concurrent_rtt_ms=changed["rtt_ms"])
