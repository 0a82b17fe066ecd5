"""What the pool keeps for each request: its session, what it asks of drafters, the link that serves it, its draft.

A `LiveSession` is the pool's, and is changed under its lock alone: its link by `pool`, its draft by `drafting`, until
`pool` has given it to the commit that tells what became of it. What is inside ``core`` is the session's own.
"""

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.link import DrafterLink
from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.draft import NO_DRAFT


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
