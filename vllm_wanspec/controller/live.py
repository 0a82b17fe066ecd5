"""What the pool keeps for each request: its session, what it asks of drafters, the link that serves it, its draft.

A `LiveSession` is the pool's, and is changed under its lock alone: its link by `placing`, its slot by `publishing`, its
draft by `drafting`, until `pool` has given it to the commit that tells what became of it. What is inside ``core`` is
the session's own.
"""

import sys
from math import inf

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.link import DrafterLink
from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.draft import NO_DRAFT
from vllm_wanspec.core.health import Bar
from vllm_wanspec.core.messages import Resumed
from vllm_wanspec.core.words import Guess, TreeWords

NO_END = sys.maxsize
"""Of a request of which it is not known when it ends."""


def last_use(end: int) -> int:
    """The longest context for which a draft can be used, of a request that ends at a length of ``end`` tokens.

    A step yields one token without any draft, so that one that gives the last token needs none.
    """
    return end - 2


class LiveSession:
    """One request.

    Attributes:
        core: Its session.
        tree: What it asks of drafters.
        link: The link to the drafter that serves it; None while none does.
        number: The session's on that link.
        draft: What was drafted last since its last commit.
        offered: Whether the target got that draft; it can be withheld. Of no meaning while there is none.
        end: Its length in tokens when it is over.
        room: The longest context that its link's drafts are of use for.
        broken: Where it was served last, where that connection broke: the drafter may still have its context.
        slot: Its place in the target's memory, where its tree is published; None without one.
        words: Of its tree, as published; None where nothing is.
        guess: What prompt lookup goes on with there.
        bars: What links' rejects of it mean.
        opened_s: When it was opened on its link.
        opening: Whether it waits for its first draft there.
        due_s: Since when a draft is owed to it; infinite while none is.
        looked: Its length when that was last looked at.
    """

    __slots__ = (
        "bars",
        "broken",
        "core",
        "draft",
        "due_s",
        "end",
        "guess",
        "link",
        "looked",
        "number",
        "offered",
        "opened_s",
        "opening",
        "room",
        "slot",
        "tree",
        "words",
    )

    def __init__(self, core: ControllerSession, tree: TreeSettings, end: int = NO_END) -> None:
        """Start without a link."""
        self.core = core
        self.tree = tree
        self.end = end
        self.room = 0
        self.link: DrafterLink | None = None
        self.number = 0
        self.broken: tuple[DrafterLink, Resumed] | None = None
        self.draft = NO_DRAFT
        self.offered = False
        self.slot: int | None = None
        self.words: TreeWords | None = None
        self.guess: Guess | None = None
        self.bars: dict[DrafterLink, Bar] = {}
        self.opened_s = 0.0
        self.opening = False
        self.due_s = inf
        self.looked = 0

    @property
    def has_news(self) -> bool:
        """Whether nodes have come since its last draft."""
        tree = self.core.tree
        return tree is not None and tree.changed

    def has_drafts(self, count: int) -> bool:
        """Whether so many tokens have been drafted for the next step, or no drafter serves the request."""
        tree = self.core.tree
        return tree is None or len(tree.path) - tree.at >= count
