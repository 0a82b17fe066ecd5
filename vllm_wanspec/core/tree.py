"""The draft tree: what has been drafted below the committed context, and what of it is still possible.

Both sides keep one. The drafter's tree is the original, the controller's a copy that is built from the nodes that
arrive. This module knows no messages and no engine; it only keeps the tree consistent.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import log
from typing import NamedTuple, NoReturn

from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.errors import RemoteProtocolError

ROOT_ID = 0


class NodeRecord(NamedTuple):
    """A node as it travels: one drafted token and where it hangs.

    Attributes:
        id: Given by the drafter, counting within a session from 1 on (0 is the context that the session opened with).
        parent: Id of the node that this token follows.
        token: Token id.
        logprob: Natural logarithm of the token's probability under the draft model, <= 0.
        entropy_nats: Entropy of the distribution that the token was drawn from; the same for siblings.
    """

    id: int
    parent: int
    token: int
    logprob: float
    entropy_nats: float


@dataclass(slots=True, eq=False)
class Node:
    """A live node of a tree.

    Attributes:
        position: Length of the context that ends with this node.
        reach: Logarithm of the calibrated probability that the target's text comes by here, counted from the context
            that the session opened with. Comparisons between live nodes hold whatever is committed meanwhile.
        bucket: The range of `Calibration` that the token belongs to.
        best: The most probable child.
    """

    id: int
    token: int
    position: int
    logprob: float
    entropy_nats: float
    parent: "Node | None" = None
    reach: float = 0.0
    bucket: int = 0
    children: dict[int, "Node"] = field(default_factory=dict)
    best: "Node | None" = None


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of appended nodes: ``added`` live ones, ``stale`` dropped ones, and ``late`` positions.

    A position is late whose drafts (one, or several alternatives) arrived after it was committed, right or wrong;
    ``late_hits`` of them were right. Nodes below a wrong path that was dropped are stale, not late: no arrival could
    have made them of use. ``aside`` is the position of the last of those hits that was an alternative, and not the most
    probable token of its position, which comes first; 0 without one.
    """

    added: int
    stale: int
    late: int
    late_hits: int
    aside: int = 0


class Committed(NamedTuple):
    """How committed tokens went through the tree.

    Attributes:
        stayed: How many of them, counted from the first, were in the tree; the others are pending.
        followed: How many of those, counted from the first, were the most probable child.
        missed: Whether a most probable child was there and the target took another token.
    """

    stayed: int
    followed: int
    missed: bool


class DraftTree:
    """Nodes below the committed context of one session.

    The *cursor* is the node that equals the committed context. Committed tokens that the tree does not hold (yet) wait
    as *pending*, until nodes bring them or `catch_up` makes them nodes. What a commit rules out is dropped by `prune`,
    which every `append` does first: a commit itself only moves the cursor, since it is on the serving path.
    """

    def __init__(
        self, context_length: int, *, vocab_size: int, max_nodes: int, calibration: Calibration | None = None
    ) -> None:
        """Start with a context of ``context_length`` tokens and no draft.

        Args:
            context_length: Tokens in the context that the session opened with.
            vocab_size: Token ids are below this.
            max_nodes: Bound on live nodes below the cursor.
            calibration: Learns from commits, and says how probable nodes really are; None makes one.
        """
        self._vocab_size = vocab_size
        self._max_nodes = max_nodes
        self._calibration = calibration or Calibration()
        self._cursor = Node(ROOT_ID, -1, context_length, 0.0, 0.0)
        self._nodes: dict[int, Node] = {ROOT_ID: self._cursor}
        self._pending: deque[int] = deque()
        self._walked: list[tuple[Node, int]] = []
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
        """Nodes below the cursor, and those that wait to be pruned."""
        return len(self._nodes) - 1

    @property
    def last_id(self) -> int:
        """The highest node id seen so far."""
        return self._last_id

    def __contains__(self, node: Node) -> bool:
        return self._nodes.get(node.id) is node

    def append(self, records: Iterable[NodeRecord]) -> Appended:
        """Prune, then add drafted nodes in the order in which they were drafted.

        Nodes below something that was dropped meanwhile are stale: they were in flight, and nobody is to blame.

        Raises:
            RemoteProtocolError: A record that no correct drafter sends: an id that is not the next one, a parent that
                was never sent, a token outside the vocabulary, a repeated child, over the budget.
        """
        self.prune()
        nodes, pending = self._nodes, self._pending
        added = stale = late = late_hits = aside = 0
        late_parent = late_first = -1
        for record in records:
            number, parent_id, token, _, _ = record
            if not (0 <= parent_id <= self._last_id == number - 1 and 0 <= token < self._vocab_size):
                self._refuse(record)
            self._last_id = number
            parent = nodes.get(parent_id)
            if parent is not None and pending and parent_id != late_parent:
                late_parent, late_first = parent_id, number
                late += 1
            if parent is None or (pending and token != pending[0]):
                stale += 1
                continue
            if token in parent.children:
                raise RemoteProtocolError(f"node {number} repeats token {token} below node {parent_id}")
            if pending:
                node = self._attach(parent, record)
                pending.popleft()
                late_hits += 1
                aside = aside if number == late_first else node.position
                del nodes[parent_id]
                self._cursor, node.parent = node, None
            elif len(nodes) > self._max_nodes:
                raise RemoteProtocolError(f"node {number} is over the budget of {self._max_nodes} nodes")
            else:
                self._attach(parent, record)
                added += 1
        return Appended(added, stale, late, late_hits, aside)

    def catch_up(self, length: int) -> None:
        """Prune, then make nodes of the pending tokens of the context's first ``length``, with the next ids.

        Both sides do so where the drafter has followed a commit that left the tree: what was committed is known to
        both, so these nodes need not travel.
        """
        self.prune()
        nodes, pending = self._nodes, self._pending
        while pending and self._cursor.position < length:
            before = self._cursor
            self._last_id += 1
            node = Node(self._last_id, pending.popleft(), before.position + 1, 0.0, 0.0, reach=before.reach)
            del nodes[before.id]
            self._cursor = nodes[node.id] = node

    def commit(self, tokens: Iterable[int]) -> Committed:
        """Move the cursor along verified tokens; in time proportional to their number."""
        stayed = followed = 0
        missed = False
        cursor, pending = self._cursor, self._pending
        for token in tokens:
            if not pending:
                self._walked.append((cursor, token))
                best = cursor.best
                child = cursor.children.get(token)
                if child is best and child is not None:
                    followed += not missed
                else:
                    missed = missed or best is not None
                if child is not None:
                    cursor = child
                    stayed += 1
                    continue
            pending.append(token)
        self._cursor = cursor
        return Committed(stayed, followed, missed)

    def prune(self) -> None:
        """Drop what commits have ruled out, and learn from what they took."""
        for node, token in self._walked:
            self._learn(node, token)
            kept = node.children.get(token)
            for child in node.children.values():
                if child is not kept:
                    self._drop(child)
            node.children, node.best = {}, None
            if kept is not None:
                del self._nodes[node.id]
                kept.parent = None
        self._walked.clear()

    def best_path(self, limit: int) -> list[Node]:
        """The most probable continuation, at most ``limit`` nodes; empty while commits are pending."""
        path: list[Node] = []
        node = None if self._pending else self._cursor.best
        while node is not None and len(path) < limit:
            path.append(node)
            node = node.best
        return path

    def drafted_until(self, last_id: int, limit: int) -> int:
        """How many of `best_path`'s nodes have ids up to ``last_id``: the first ones, since ids rise along a path."""
        count = 0
        node = None if self._pending else self._cursor.best
        while node is not None and count < limit and node.id <= last_id:
            count += 1
            node = node.best
        return count

    def draft(self, limit: int, least: float = 0.0) -> tuple[list[int], float, float]:
        """Tokens of the most probable continuation, for verification.

        Args:
            limit: Most tokens.
            least: The draft ends where the calibrated probability that the target takes all of it falls below this.

        Returns:
            The tokens, how many of them the target can be expected to take, and the chance that it takes all.
        """
        tokens: list[int] = []
        node = None if self._pending else self._cursor.best
        probability, chance, expected = self._calibration.probability, 1.0, 0.0
        while node is not None and limit > 0:
            longer = chance * probability[node.bucket]
            if longer < least:
                break
            chance = longer
            expected += chance
            tokens.append(node.token)
            node = node.best
            limit -= 1
        return tokens, expected, chance

    def _refuse(self, record: NodeRecord) -> NoReturn:
        if record.id != self._last_id + 1:
            raise RemoteProtocolError(f"node id {record.id} does not follow {self._last_id}")
        if not 0 <= record.parent <= self._last_id:
            raise RemoteProtocolError(f"node {record.id} hangs below node {record.parent}, which was never sent")
        raise RemoteProtocolError(f"node {record.id} has token {record.token}, outside 0..{self._vocab_size - 1}")

    def _attach(self, parent: Node, record: NodeRecord) -> Node:
        number, _, token, logprob, entropy_nats = record
        best = parent.best is None or logprob > parent.best.logprob
        bucket = self._calibration.bucket(logprob, best=best)
        reach = parent.reach + log(self._calibration.probability[bucket])
        node = Node(number, token, parent.position + 1, logprob, entropy_nats, parent, reach, bucket)
        parent.children[token] = node
        if best:
            parent.best = node
        self._nodes[number] = node
        return node

    def _learn(self, node: Node, token: int) -> None:
        """Tell the calibration what the target took where a distribution was known."""
        best = node.best
        if best is None:
            return
        for child in node.children.values():
            self._calibration.saw(child.bucket, child.token == token)
        taken = node.children.get(token)
        if taken is best:
            outcome = 0
        elif taken is None:
            outcome = 3
        else:
            outcome = 1 if taken.children else 2
        self._calibration.saw_outcome(best.entropy_nats, outcome)

    def _drop(self, top: Node) -> None:
        doomed = [top]
        while doomed:
            node = doomed.pop()
            del self._nodes[node.id]
            doomed.extend(node.children.values())
            node.children, node.best, node.parent = {}, None, None


def main_line_tip(tree: DraftTree) -> Node:
    """The end of the most probable continuation: the node to extend."""
    node = tree.cursor
    while node.best is not None:
        node = node.best
    return node
