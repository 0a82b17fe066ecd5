"""What the pool keeps for each request: its session, what it asks of drafters, and the link that serves it now."""

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.link import DrafterLink
from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.draft import NO_DRAFT
from vllm_wanspec.core.messages import Limits


class LiveSession:
    """One request.

    Attributes:
        core: Its session.
        tree: What it asks of drafters.
        link: The link to the drafter that serves it; None while none does.
        number: The session's on that link.
        draft: What was drafted last since its last commit.
        offered: Whether the target got that draft; it can be withheld.
    """

    __slots__ = ("core", "draft", "link", "number", "offered", "tree")

    def __init__(self, core: ControllerSession, tree: TreeSettings) -> None:
        """Start without a link."""
        self.core = core
        self.tree = tree
        self.link: DrafterLink | None = None
        self.number = 0
        self.draft = NO_DRAFT
        self.offered = False


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
