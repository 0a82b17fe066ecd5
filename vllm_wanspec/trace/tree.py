"""A copy of a draft tree, rebuilt from a log, in which every node tells at the end what became of it.

The tree of `core` forgets what a commit rules out; here it is kept, because that is what the page shows. It follows the
same rules (`architecture.md`, the draft tree), but takes whatever the log has: there is no peer to blame.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Fate(StrEnum):
    """What became of a node.

    The first four are on the committed path. *Late* nodes agree with what was committed before they arrived; *echoes*
    only repeat it: both sides make them of what left the tree, and they are no drafts.
    """

    ACCEPTED = "accepted"
    """Verified as a draft, and accepted."""
    FORESEEN = "foreseen"
    """The target's own next token, which was the most probable child."""
    CAUGHT = "caught"
    """The target took this token instead of the most probable one: a branch caught what would have been a miss."""
    LATE = "late"
    ECHO = "echo"
    REJECTED = "rejected"
    """Verified as a draft, and not accepted."""
    UNUSED = "unused"
    """In the tree, but the target went another way."""
    STALE = "stale"
    """Ruled out before it arrived."""
    LEFT = "left"
    """Alive when the session ended."""


WASTED = frozenset({Fate.REJECTED, Fate.UNUSED, Fate.STALE, Fate.LEFT})


@dataclass(slots=True, eq=False)
class Node:
    """A node of the log.

    Attributes:
        position: Length of the context that ends with this node; 0 if the log does not tell.
        arrived_s: When, on the wall clock; an echo is made when nodes come that were drafted with its token known.
        step: Index of the target's step that settled its fate, if one did.
    """

    id: int
    token: int
    position: int
    logprob: float
    entropy_nats: float
    arrived_s: float
    parent: "Node | None" = None
    fate: Fate = Fate.LEFT
    step: int | None = None
    children: dict[int, "Node"] = field(default_factory=dict)

    @property
    def best(self) -> "Node | None":
        """The most probable child; the first of equal ones."""
        return max(self.children.values(), key=lambda child: child.logprob, default=None)


@dataclass(slots=True)
class Appended:
    """What became of nodes that arrived: live ones, stale ones, and how many came after their position's commit."""

    added: int = 0
    stale: int = 0
    late: int = 0


class TreeCopy:
    """One session's tree.

    Args:
        position: Length of the context that the session opened with.
        keep: Whether dropped nodes stay known, so that stale ones find their parents.
    """

    def __init__(self, position: int, *, keep: bool) -> None:
        self.cursor = Node(0, -1, position, 0.0, 0.0, 0.0)
        self.pending: deque[int] = deque()
        self._live = {0: self.cursor}
        self._dropped: dict[int, Node] | None = {} if keep else None
        self._last_id = 0

    @property
    def size(self) -> int:
        """Live nodes below the cursor."""
        return len(self._live) - 1

    def find(self, number: int) -> Node | None:
        """The live node of that id."""
        return self._live.get(number)

    def catch_up(self, length: int, at_s: float, step: int) -> list[Node]:
        """Make nodes of the pending tokens of the context's first ``length``, as both sides do."""
        nodes: list[Node] = []
        while self.pending and self.cursor.position < length:
            self._last_id += 1
            node = Node(self._last_id, self.pending.popleft(), self.cursor.position + 1, 0.0, 0.0, at_s, self.cursor)
            node.fate = Fate.ECHO
            self.cursor.children[node.token] = self._live[node.id] = node
            self._descend(node, step)
            nodes.append(node)
        return nodes

    def append(self, records: Iterable[Sequence[Any]], at_s: float, step: int) -> tuple[list[Node], Appended]:
        """Add ``[id, parent, token, logprob, entropy]`` records; the nodes made from them, stale ones included."""
        nodes, appended = [], Appended()
        for number, parent_number, token, logprob, entropy_nats in (record[:5] for record in records):
            parent = self._live.get(parent_number)
            self._last_id = number
            appended.late += bool(self.pending) and parent is not None
            stale = parent is None or token in parent.children or bool(self.pending and token != self.pending[0])
            if parent is None and self._dropped is not None:
                parent = self._dropped.get(parent_number)
            position = 0 if parent is None or not parent.position else parent.position + 1
            node = Node(number, token, position, logprob, entropy_nats, at_s, parent)
            nodes.append(node)
            if stale or parent is None:
                node.fate, node.step = Fate.STALE, step
                appended.stale += 1
                self._forget(node)
                continue
            parent.children[token] = node
            self._live[number] = node
            if self.pending:
                self.pending.popleft()
                node.fate = Fate.LATE
                self._descend(node, step)
            else:
                appended.added += 1
        return nodes, appended

    def commit(self, token: int, step: int) -> Node | None:
        """Move the cursor along a token; its node, or None if it is pending now."""
        child = None if self.pending else self.cursor.children.get(token)
        if child is not None:
            self._descend(child, step)
            return child
        if not self.pending:
            self._drop(list(self.cursor.children.values()), step)
        self.pending.append(token)
        return None

    def path(self, tokens: Iterable[int]) -> list[Node]:
        """The nodes along tokens from the cursor on, as far as the tree holds them."""
        nodes: list[Node] = []
        node = None if self.pending else self.cursor
        for token in tokens:
            node = node.children.get(token) if node is not None else None
            if node is None:
                break
            nodes.append(node)
        return nodes

    def best_path(self) -> list[Node]:
        """The most probable continuation."""
        nodes: list[Node] = []
        node = None if self.pending else self.cursor.best
        while node is not None:
            nodes.append(node)
            node = node.best
        return nodes

    def _descend(self, child: Node, step: int) -> None:
        old = self.cursor
        self._drop([sibling for sibling in old.children.values() if sibling is not child], step)
        self._live.pop(old.id, None)
        if self._dropped is None:
            old.children, child.parent = {}, None  # or the whole past would hang on the cursor
        self._forget(old)
        self.cursor = child

    def _drop(self, doomed: list[Node], step: int) -> None:
        while doomed:
            node = doomed.pop()
            self._live.pop(node.id, None)
            node.step = step
            if node.fate is Fate.LEFT:
                node.fate = Fate.UNUSED
            self._forget(node)
            doomed.extend(node.children.values())

    def _forget(self, node: Node) -> None:
        if self._dropped is not None:
            self._dropped[node.id] = node
