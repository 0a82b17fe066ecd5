"""The best that a drafter across the WAN could do for a pair of models: what a measured time per token is held against.

Computed from the pair's own texts: at each position, which place the target's token has among the draft model's eight
most probable ones. The ideal drafter extends all eight at every node at once, in the time of one forward, and nothing
else costs any time: no width, no scheduling, no messages. (Own derivation.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

StepTime = Callable[[int], float]
"""Milliseconds that a forward over so many tokens takes."""


def ideal_decode_ms(
    ranks: Sequence[int | None],
    prompt_tokens: int,
    *,
    rtt_ms: float,
    target_ms: StepTime,
    draft_ms: StepTime,
    limit: int,
) -> float:
    """Milliseconds from a text's first token to its last.

    ``drafted[i]`` is when the drafter has the distribution of token i: one forward after it knows token i - 1, which it
    does as soon as that is one of those that it extends, and at the latest one way after it was committed. A step
    verifies the most probable continuation as far as it has arrived when the step begins; no step is held back.

    Args:
        ranks: For each token of the text its place among the draft model's most probable ones there, 0 for the most
            probable one; None for a token that the drafter does not extend.
        prompt_tokens: Length of the prompt.
        rtt_ms: Round trip between target and drafter.
        target_ms: Duration of a target forward.
        draft_ms: Duration of a draft forward, that of one token whatever its width.
        limit: Most drafts per step.
    """
    one_way_ms, forward_ms = rtt_ms / 2.0, draft_ms(1)
    # The drafter gets the prompt when the target begins with it, and the first token is committed at 0.
    opened_ms = one_way_ms - target_ms(prompt_tokens)
    drafted = [opened_ms + draft_ms(prompt_tokens)]
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
        now += target_ms(1 + drafts)
        committed += [now] * min(position - begin + 1, len(ranks) - begin)
        while len(drafted) < len(committed):
            drafted.append(known_ms(len(drafted) - 1) + forward_ms)
    return now
