"""The draft tree: what has been drafted below the committed context, and what of it is still possible.

Both sides keep one. The drafter's tree is the original, the controller's a copy that is built from the nodes that
arrive. This module knows no messages and no engine; it only keeps the tree consistent.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_wanspec.errors import RemoteProtocolError

ROOT_ID = 0


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node as it travels: one drafted token and where it hangs.

    Attributes:
        id: Given by the drafter, rising within a session, from 1 on (0 is the context that the session opened with).
        parent: Id of the node that this token follows.
        token: Token id.
        logprob: Natural logarithm of the token's probability under the draft model, <= 0.
        entropy_nats: Entropy of the distribution that the token was drawn from; the same for siblings.
            A node that only repeats a committed token, and was not drafted, has ``logprob == entropy_nats == 0``.
    """

    id: int
    parent: int
    token: int
    logprob: float
    entropy_nats: float

    @property
    def is_echo(self) -> bool:
        """Whether the node repeats a committed token instead of predicting one."""
        return self.logprob == 0.0 and self.entropy_nats == 0.0


@dataclass(slots=True, eq=False)
class Node:
    """A live node of a tree; ``position`` is the length of the context that ends with it."""

    id: int
    token: int
    position: int
    logprob: float
    entropy_nats: float
    children: dict[int, "Node"] = field(default_factory=dict)
    best: "Node | None" = None


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of appended nodes: ``added`` live ones, ``stale`` dropped ones, and ``late`` positions.

    A position is late whose drafts (one, or several alternatives) arrived after it was committed, right or wrong.
    Nodes below a wrong path that was dropped are stale, not late: no arrival could have made them of use.
    """

    added: int
    stale: int
    late: int


class DraftTree:
    """Nodes below the committed context of one session.

    The *cursor* is the node that equals the committed context; it is the root of what is kept, and everything that
    is not below it has been dropped. Committed tokens that the tree does not hold (yet) wait as *pending*.
    """

    def __init__(self, context_length: int, *, vocab_size: int, max_nodes: int) -> None:
        """Start with a context of ``context_length`` tokens and no draft.

        Args:
            context_length: Tokens in the context that the session opened with.
            vocab_size: Token ids are below this.
            max_nodes: Bound on live nodes below the cursor.
        """
        self._vocab_size = vocab_size
        self._max_nodes = max_nodes
        self._cursor = Node(ROOT_ID, -1, context_length, 0.0, 0.0)
        self._nodes: dict[int, Node] = {ROOT_ID: self._cursor}
        self._pending: deque[int] = deque()
        self._last_id = ROOT_ID

    @property
    def cursor(self) -> Node:
        """The node that equals the committed context, as far as the tree knows it (see `pending`)."""
        return self._cursor

    @property
    def pending(self) -> Sequence[int]:
        """Committed tokens after the cursor that the tree does not hold."""
        return self._pending

    @property
    def committed_length(self) -> int:
        """Tokens in the committed context, pending ones included."""
        return self._cursor.position + len(self._pending)

    @property
    def size(self) -> int:
        """Live nodes below the cursor."""
        return len(self._nodes) - 1

    @property
    def last_id(self) -> int:
        """The highest node id seen so far."""
        return self._last_id

    def __contains__(self, node: Node) -> bool:
        return self._nodes.get(node.id) is node

    def append(self, records: Iterable[NodeRecord]) -> Appended:
        """Add drafted nodes in the order in which they were drafted.

        Nodes below something that was dropped meanwhile are stale: they were in flight, and nobody is to blame.

        Raises:
            RemoteProtocolError: A record that no correct drafter sends: an id that does not rise, a parent that was
                never sent, a token outside the vocabulary, a repeated child, over the budget.
        """
        added = stale = late = 0
        late_parent = -1
        for record in records:
            self._check(record)
            self._last_id = record.id
            parent = self._nodes.get(record.parent)
            confirms = bool(self._pending)
            if parent is not None and confirms and not record.is_echo and record.parent != late_parent:
                late_parent = record.parent
                late += 1
            if parent is None or (confirms and record.token != self._pending[0]):
                stale += 1
                continue
            if record.token in parent.children:
                raise RemoteProtocolError(f"node {record.id} repeats token {record.token} below node {record.parent}")
            if not confirms and self.size >= self._max_nodes:
                raise RemoteProtocolError(f"node {record.id} is over the budget of {self._max_nodes} nodes")
            node = self._attach(parent, record)
            if confirms:
                self._pending.popleft()
                self._descend(node)
            else:
                added += 1
        return Appended(added, stale, late)

    def commit(self, tokens: Iterable[int]) -> int:
        """Move the cursor along verified tokens; what they rule out is dropped.

        Returns:
            How many of the tokens stayed in the tree, counted from the first; the others are pending.
        """
        stayed = 0
        for token in tokens:
            child = None if self._pending else self._cursor.children.get(token)
            if child is None:
                if not self._pending:
                    self._clear()
                self._pending.append(token)
            else:
                self._descend(child)
                stayed += 1
        return stayed

    def best_path(self, limit: int) -> list[Node]:
        """The most probable continuation, at most ``limit`` nodes; empty while commits are pending."""
        path: list[Node] = []
        node = None if self._pending else self._cursor.best
        while node is not None and len(path) < limit:
            path.append(node)
            node = node.best
        return path

    def _check(self, record: NodeRecord) -> None:
        if record.id <= self._last_id:
            raise RemoteProtocolError(f"node id {record.id} does not rise above {self._last_id}")
        if not 0 <= record.parent <= self._last_id:
            raise RemoteProtocolError(f"node {record.id} hangs below node {record.parent}, which was never sent")
        if not 0 <= record.token < self._vocab_size:
            raise RemoteProtocolError(f"node {record.id} has token {record.token}, outside 0..{self._vocab_size - 1}")

    def _attach(self, parent: Node, record: NodeRecord) -> Node:
        node = Node(record.id, record.token, parent.position + 1, record.logprob, record.entropy_nats)
        parent.children[record.token] = node
        if parent.best is None or node.logprob > parent.best.logprob:
            parent.best = node
        self._nodes[record.id] = node
        return node

    def _descend(self, child: Node) -> None:
        """Make a child of the cursor the cursor, and drop its siblings and the old cursor."""
        old = self._cursor
        for sibling in old.children.values():
            if sibling is not child:
                self._drop(sibling)
        del self._nodes[old.id]
        self._cursor = child

    def _clear(self) -> None:
        for child in self._cursor.children.values():
            self._drop(child)
        self._cursor.children = {}
        self._cursor.best = None

    def _drop(self, top: Node) -> None:
        doomed = [top]
        while doomed:
            node = doomed.pop()
            del self._nodes[node.id]
            doomed.extend(node.children.values())
