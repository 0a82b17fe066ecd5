"""What the pool keeps for each request: its session, what it asks of drafters, and the link that serves it now."""

import logging
import sys

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.link import DrafterLink
from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.messages import Limits

logger = logging.getLogger("vllm.wanspec.pool")

NO_END = sys.maxsize
"""Of a request of which it is not known when it ends."""


def last_use(end: int) -> int:
    """The longest context for which a draft can be used, of a request that ends at a length of ``end`` tokens.

    A step yields one token without any draft, so that one that gives the last token needs none.
    """
    return end - 2


class LiveSession:
    """One request: ``expected`` and ``offered`` tokens of its present draft; ``guessed``: no drafter gave it.

    ``end`` is its length in tokens when it is over; ``room`` the longest context that its link's drafts are of use for.
    """

    __slots__ = ("core", "end", "expected", "guessed", "link", "number", "offered", "room", "tree")

    def __init__(self, core: ControllerSession, tree: TreeSettings, end: int = NO_END) -> None:
        """Start without a link."""
        self.core = core
        self.tree = tree
        self.end = end
        self.room = 0
        self.link: DrafterLink | None = None
        self.number = 0
        self.expected = 0.0
        self.offered = 0
        self.guessed = False

    def has_drafts(self, count: int) -> bool:
        """Whether so many tokens have been drafted for the next step, or no drafter serves the request."""
        tree = self.core.tree
        return tree is None or len(tree.best_path(count)) == count


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
