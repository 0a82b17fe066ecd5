"""Which drafter serves a session, and what the session asks of it.

Decides, and changes nothing: the links' state is their thread's, who is on which link and what is known of the drafters
is `placing`'s. Healthy drafters come first; `core.health` says what the others are for.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.link import DrafterLink
from vllm_wanspec.core.health import OPENING, Bar
from vllm_wanspec.core.messages import MAX_CONTEXT_TOKENS, Limits, Welcome
from vllm_wanspec.core.states import LinkState

logger = logging.getLogger("vllm.wanspec.pool")

Served = Mapping[DrafterLink, Collection[object]]
"""The links, and who is on each."""
Bars = Mapping[DrafterLink, Bar]
NO_BARS: Bars = {}


class Chosen(NamedTuple):
    """A drafter that can take a session, what it said of itself when it was chosen, and whether it is to be probed."""

    link: DrafterLink
    welcome: Welcome
    probe: bool = False


def choose(served: Served, length: int, now: float, bars: Bars = NO_BARS, *, new: bool = True) -> Chosen | None:
    """The drafter for one more session: the one whose first draft is expected soonest, among the healthy.

    A drafter that is not healthy and due for a probe is probed with a new request, whose prefill hides what may be
    lost, or with one that no healthy drafter can take. Such a request may also go to a suspect.

    Args:
        served: The links, and who is on each.
        length: Tokens in the session's context.
        now: Seconds.
        bars: Of the request.
        new: Whether the request has just arrived. Others are opened a few at a time; see `OPENING`.

    Returns:
        None where there is none now; the first of equal ones.
    """
    able = list(_able(served, length, now, bars))
    healthy = [each for each in able if each.link.health.state is LinkState.HEALTHY]
    if new or not healthy:
        for each in able:
            if each.link.health.probe_due(now):
                return each._replace(probe=True)
    suspect = [each for each in able if each.link.health.state is LinkState.SUSPECT]
    return _nearest(served, healthy or suspect, now, new=new)


def choose_other(served: Served, length: int, now: float, bars: Bars, than: DrafterLink) -> Chosen | None:
    """The healthy drafter to which a session can be moved from the link ``than`` now; the rest as for `choose`."""
    healthy = [
        each
        for each in _able(served, length, now, bars)
        if each.link is not than and each.link.health.state is LinkState.HEALTHY
    ]
    return _nearest(served, healthy, now, new=False)


def _able(served: Served, length: int, now: float, bars: Bars) -> Iterator[Chosen]:
    """The drafters that are connected, have room, take so long a context, and have not rejected the request lately."""
    for link, sessions in served.items():
        welcome = link.welcome  # read once: the link's thread clears it whenever it likes
        if (
            welcome is None
            or link.draining
            or len(sessions) >= welcome.max_sessions
            or length > min(welcome.max_context, MAX_CONTEXT_TOKENS)
        ):
            continue
        bar = bars.get(link)
        if bar is None or not bar.holds(now):
            yield Chosen(link, welcome)


def _nearest(served: Served, able: list[Chosen], now: float, *, new: bool) -> Chosen | None:
    best: Chosen | None = None
    best_s = 0.0
    for each in able:
        link = each.link
        if not new and link.health.opening >= OPENING:
            continue
        cost_s = link.health.cost_s(link.rtt_s, len(served[link]), now)
        if best is None or cost_s < best_s:
            best, best_s = each, cost_s
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
