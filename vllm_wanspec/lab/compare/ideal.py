"""The best that a drafter across the WAN could do for a pair of models: what a measured time per token is held against.

Computed from the pair's own texts: at each position, which place the target's token has among the draft model's eight
most probable ones. The ideal drafter extends all eight at every node at once, in the time of one forward, and nothing
else costs any time: no width, no scheduling, no messages. (Own derivation.)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.lab.records import Reference

__all__ = ["ideal_tpot_ms"]


def ideal_tpot_ms(
    references: Sequence[Reference], *, rtt_ms: float, target: Pacing, draft: Pacing, limit: int
) -> float | None:
    """Milliseconds per token after the first, over all texts; None where they have none.

    Args:
        references: The texts.
        rtt_ms: Round trip between target and drafter.
        target: Duration of a target forward.
        draft: Duration of a draft forward, that of one token whatever its width.
        limit: Most drafts per step.
    """
    times = [_decode_ms(reference, rtt_ms / 2.0, target, draft, limit) for reference in references]
    tokens = sum(len(reference.expected) - 1 for reference in references)
    return sum(times) / tokens if tokens > 0 else None


def _decode_ms(reference: Reference, one_way_ms: float, target: Pacing, draft: Pacing, limit: int) -> float:
    """Time from the first token to the last.

    ``drafted[i]`` is when the drafter has the distribution of token i: one forward after it knows token i - 1, which it
    does as soon as that is one of those that it extends, and at the latest one way after it was committed. A step
    verifies the most probable continuation as far as it has arrived when the step begins; no step is held back.
    """
    ranks, prompt_tokens = reference.ranks, len(reference.prompt_ids)
    forward_ms = draft.step_ms(1)
    # The drafter gets the prompt when the target begins with it, and the first token is committed at 0.
    opened_ms = one_way_ms - target.step_ms(prompt_tokens)
    drafted = [opened_ms + draft.step_ms(prompt_tokens)]
    committed = [0.0]

    def known_ms(index: int) -> float:
        in_tree = drafted[index] if ranks[index] is not None else inf
        told = committed[index] + one_way_ms if index < len(committed) else inf
        return min(in_tree, told)

    now = 0.0
    while len(committed) < len(ranks):
        begin = position = len(committed)
        del drafted[begin:]  # what was drafted ahead is found anew, now that more is committed
        drafts = 0
        while drafts < limit and position < len(ranks):
            if position == len(drafted):
                drafted.append(known_ms(position - 1) + forward_ms)
            if drafted[position] + one_way_ms > now:
                break
            drafts += 1
            if ranks[position] != 0:
                # What follows the wrong token is verified with it, and in vain.
                late_ms = now - one_way_ms - drafted[position]
                drafts = min(limit, drafts + int(late_ms // forward_ms)) if forward_ms > 0.0 else limit
                break
            position += 1
        now += target.step_ms(1 + drafts)
        committed += [now] * min(position - begin + 1, len(ranks) - begin)
        while len(drafted) < len(committed):
            drafted.append(known_ms(len(drafted) - 1) + forward_ms)
    return now
