"""What the tree bench compares: its settings, the arms, their order, and how much of a text it uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.demo_setup import DemoOptions, DemoPlan, plan_servers
from vllm_wanspec.lab.harness.launch import DRAFT_PACE, TARGET_PACE
from vllm_wanspec.lab.harness.models import DemoModels

__all__ = [
    "DEFAULT_ARM",
    "DEFAULT_ARMS",
    "MAIN_LINE",
    "OFF",
    "Arm",
    "TreesOptions",
    "arm_orders",
    "parse_arms",
    "plan_trees",
]

MAIN_LINE = "main-line"
DEFAULT_ARM = "default"
#: Override with which a request is decoded as if there were no drafter.
OFF = "off"
THRESHOLD_KEY = "entropy_threshold_nats"
DEFAULT_ARMS = "; ".join(
    [
        f"{MAIN_LINE}=max_branches=1",
        *(f"theta-{theta}={THRESHOLD_KEY}={theta}" for theta in ("inf", "2", "1.5", "1", "0.5", "0")),
        f"adaptive={THRESHOLD_KEY}=adaptive",
        f"{DEFAULT_ARM}=",
    ]
)
ARMS_FORM = '"name=key=value,key=value; name2=…", as in "narrow=running_branches=4; plain=off; default="'


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to draft.

    Args:
        name: What tables call it.
        override: What its requests ask for in place of the target's settings: ``key=value,…``, ``off``, or nothing.
    """

    name: str
    override: str = ""

    @property
    def request_fields(self) -> dict[str, Any]:
        """What its requests have besides prompt and length."""
        return {"vllm_xargs": {"wanspec": self.override}} if self.override else {}

    @property
    def drafts(self) -> bool:
        """Whether it takes drafts at all."""
        return self.override != OFF

    @property
    def threshold_nats(self) -> float | None:
        """The entropy threshold that alone it sets; None where it sets none, or something else too."""
        key, _, value = self.override.partition("=")
        try:
            return float(value) if key == THRESHOLD_KEY else None
        except ValueError:
            return None


def parse_arms(text: str) -> tuple[Arm, ...]:
    """Read ``"name=override; name2=override2"``; the target checks what the overrides say.

    Raises:
        ConfigError: Not of that form, or a name is given twice.
    """
    arms: list[Arm] = []
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, override = (piece.strip() for piece in part.partition("="))
        pairs = [] if override in ("", OFF) else [pair.strip() for pair in override.split(",")]
        if not name or not all(_is_pair(pair) for pair in pairs):
            raise ConfigError(f"--arms: {part!r} is not an arm, expected {ARMS_FORM}")
        if any(arm.name == name for arm in arms):
            raise ConfigError(f"--arms: the name {name!r} is given twice; names must differ")
        arms.append(Arm(name, ",".join(pairs) or override))
    if not arms:
        raise ConfigError(f"--arms: {text!r} names none, expected {ARMS_FORM}")
    return tuple(arms)


def _is_pair(text: str) -> bool:
    key, _, value = text.partition("=")
    return bool(key.strip() and value.strip())


@dataclass(frozen=True, slots=True)
class TreesOptions:
    """The tree bench's settings.

    Args:
        arms: What is compared.
        baseline: Name of the arm that the others are divided by.
        rtt_ms: Emulated round trip between target and drafter, milliseconds.
        prompts: How many prompts; None takes all.
        max_tokens: Tokens per prompt at most; fewer where the text begins to repeat.
        repeats: How often each prompt goes through each arm.
        speculative_tokens: Draft tokens verified per step at most.
        seed: Of the arms' order and of the bootstrap.
        models: Folder with ``target/``, ``draft/`` and ``prompts.jsonl``; None takes the checkout's.
        target_pace: Duration of a target forward.
        draft_pace: Duration of a draft forward.
    """

    arms: tuple[Arm, ...] = parse_arms(DEFAULT_ARMS)
    baseline: str = MAIN_LINE
    rtt_ms: float = 30.0
    prompts: int | None = None
    max_tokens: int = 128
    repeats: int = 1
    speculative_tokens: int = 8
    seed: int = 0
    models: Path | None = None
    target_pace: Pacing = TARGET_PACE
    draft_pace: Pacing = DRAFT_PACE

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if self.baseline not in names:
            raise ConfigError(f"--baseline: no arm is called {self.baseline!r}; there are {', '.join(names)}")


def plan_trees(options: TreesOptions, models: DemoModels, ports: Sequence[int], folder: Path) -> DemoPlan:
    """Lay out drafter, WAN proxy and target as the demo does, without its plain target.

    One target serves all arms: a request that opts out is decoded plainly there.
    """
    demo = DemoOptions(
        rtt_ms=options.rtt_ms,
        speculative_tokens=options.speculative_tokens,
        target_pace=options.target_pace,
        draft_pace=options.draft_pace,
    )
    # Prompt lookup would serve part of the steps that a branch is there for.
    plan = plan_servers(demo, models, ports, folder, fallback=[])
    specs = tuple(spec for spec in plan.specs if spec.name != plan.plain)
    stats = {name: path for name, path in plan.stats.items() if name != plan.plain}
    return dataclasses.replace(plan, specs=specs, plain=plan.wanspec, stats=stats)


def arm_orders(arms: Sequence[Arm], rng: Random) -> Iterator[list[Arm]]:
    """Yield the order of the arms for one prompt after another, without end.

    In as many consecutive prompts as there are arms, each arm has each place once, since whoever comes first meets a
    drafter whose cache has not seen the prompt.
    """
    while True:
        base = list(arms)
        rng.shuffle(base)
        for turn in range(len(base)):
            yield base[turn:] + base[:turn]
