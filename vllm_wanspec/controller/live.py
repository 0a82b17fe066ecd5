"""What the pool keeps for each request: its session, what it asks of drafters, and the link that serves it now."""

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.link import DrafterLink
from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.messages import Limits


class LiveSession:
    """One request: ``expected`` and ``offered`` tokens of its present draft; ``guessed``: no drafter gave it."""

    __slots__ = ("core", "expected", "guessed", "link", "number", "offered", "tree")

    def __init__(self, core: ControllerSession, tree: TreeSettings) -> None:
        """Start without a link."""
        self.core = core
        self.tree = tree
        self.link: DrafterLink | None = None
        self.number = 0
        self.expected = 0.0
        self.offered = 0
        self.guessed = False


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
