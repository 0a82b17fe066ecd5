"""Which drafter serves a session, and what the session asks of it.

Decides, and changes nothing: the links' state is their thread's, who is on which link is the pool's.
"""

import logging
from collections.abc import Collection, Mapping
from typing import NamedTuple

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.link import DrafterLink
from vllm_wanspec.core.messages import MAX_CONTEXT_TOKENS, Limits, Welcome

logger = logging.getLogger("vllm.wanspec.pool")


class Chosen(NamedTuple):
    """A drafter that can take a session, and what it said of itself when it was chosen."""

    link: DrafterLink
    welcome: Welcome


def choose(served: Mapping[DrafterLink, Collection[object]], length: int) -> Chosen | None:
    """The drafter for one more session: the nearest, each session that it has counting as one round trip more.

    Args:
        served: The links, and who is on each.
        length: Tokens in the session's context.

    Returns:
        None where no drafter is connected that has room and takes so long a context; the first of equal ones.
    """
    best: Chosen | None = None
    best_s = 0.0
    for link, sessions in served.items():
        welcome = link.welcome  # read once: the link's thread clears it whenever it likes
        if (
            welcome is None
            or len(sessions) >= welcome.max_sessions
            or length > min(welcome.max_context, MAX_CONTEXT_TOKENS)
        ):
            continue
        cost_s = link.rtt_s * (1 + len(sessions))
        if best is None or cost_s < best_s:
            best, best_s = Chosen(link, welcome), cost_s
    return best


def limits_for(tree: TreeSettings, max_nodes: int, lookahead: int) -> Limits:
    """What a session asks of a drafter that takes ``max_nodes`` nodes; ``lookahead`` serves where it is ``auto``."""
    threshold = tree.entropy_threshold_nats
    return Limits(
        lookahead=lookahead if tree.lookahead_tokens == "auto" else tree.lookahead_tokens,
        max_nodes=min(tree.max_nodes, max_nodes),
        max_branches=tree.max_branches,
        running_branches=tree.running_branches,
        branch_depth=tree.branch_depth,
        entropy_threshold_nats=None if threshold == "adaptive" else threshold,
        min_probability=tree.min_probability,
    )


def tell_of_shorter_context(link: DrafterLink, max_model_len: int) -> bool:
    """Say it where a drafter's model takes shorter contexts than the target's ``max_model_len``; whether it does."""
    welcome = link.welcome
    if welcome is None or welcome.max_context + 1 >= max_model_len:
        return False
    logger.warning(
        "drafter %s: its model takes contexts of at most %d tokens, the target up to %d: what is longer is served "
        "without its drafts; give it a larger --max-model-len if its model can",
        link.name,
        welcome.max_context,
        max_model_len,
    )
    return True
