"""The ideal of each arm: what its kind of drafting could do at best on the measured texts, at the paces of the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.core.analysis.ideal import (
    UNLIMITED,
    Width,
    colocated_decode_ms,
    ideal_decode_ms,
    lookup_decode_ms,
    oracle_decode_ms,
    plain_decode_ms,
)
from vllm_wanspec.lab.compare.arms import OFF, Arm
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.records import Cell, Reference, Setting
from vllm_wanspec.lab.stats import Timed


@dataclass(frozen=True, slots=True)
class Ideal:
    """Time and tokens at best, by prompt; empty where there is no ideal.

    Attributes:
        unlimited: With a tree of any width, at the pace of one branch.
        as_wide: With the width that was used, and the pace of so many branches; the same where there is no tree.
    """

    unlimited: Mapping[int, Timed] = field(default_factory=dict)
    as_wide: Mapping[int, Timed] = field(default_factory=dict)


def width_of(arm: Arm) -> Width:
    """How wide an arm's tree may get."""
    tree = TreeSettings()
    if arm.override not in ("", OFF):
        tree = tree.overridden(arm.override)
    return Width(tree.max_branches, tree.running_branches, tree.branch_depth)


def ideals(result: Result, cell: Cell, setting: Setting | None, prompts: Collection[int]) -> Ideal:
    """Return the ideal of a cell for some prompts.

    There is none where several requests run at a time, nothing is paced, or tokens are sampled: ranks and lookup are
    those of the greedy texts.
    """
    options, arm = result.options, result.options.arm(cell.arm)
    if not cell.single or not options.ranked or options.temperature > 0.0:
        return Ideal()
    own = [one for one in result.references if one.index in prompts and len(one.expected) > 1]

    def timed(width: Width) -> dict[int, Timed]:
        made = {one.index: (_decode_ms(result, cell, setting, one, width), len(one.expected) - 1) for one in own}
        return {index: Timed(time_ms, tokens) for index, (time_ms, tokens) in made.items() if time_ms is not None}

    unlimited = timed(UNLIMITED)
    return Ideal(unlimited, timed(width_of(arm)) if cell.rtt_ms is not None else unlimited)


def _decode_ms(result: Result, cell: Cell, setting: Setting | None, one: Reference, width: Width) -> float | None:
    """Milliseconds of one text at best; None for vLLM's own lookup, and where nothing is paced."""
    options, arm = result.options, result.options.arm(cell.arm)
    target, draft = options.target_forward, options.draft_forward
    if target is None or draft is None:
        return None
    lookup = result.lookup(one) if arm.lookup == "ours" else None
    limit, tokens = options.speculative_tokens, len(one.expected)
    if cell.rtt_ms is not None:
        return ideal_decode_ms(
            one.ranks,
            len(one.prompt_ids),
            rtt_ms=options.emulated_ms(cell.rtt_ms),
            target_ms=target.step_ms,
            draft_ms=draft.step_ms,
            limit=limit,
            lookup=lookup,
            width=width,
        )
    if arm.is_colocated and setting is not None:
        gamma = setting.draft_tokens
        paces = {"target_ms": target.step_ms, "draft_ms": draft.step_ms}
        return colocated_decode_ms(one.ranks, gamma=gamma, limit=max(limit, gamma), lookup=lookup, **paces)
    if lookup is not None:
        return lookup_decode_ms(lookup, target_ms=target.step_ms, limit=limit)
    if arm.target.method == "oracle":
        return oracle_decode_ms(tokens, target_ms=target.step_ms, limit=limit)
    return None if arm.target.method == "ngram" else plain_decode_ms(tokens, target_ms=target.step_ms)
