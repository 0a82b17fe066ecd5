"""The draft tree as columns: the controller's copy.

`FlatTree` keeps what `DraftTree` keeps, by the same rules, in lists with one entry a node: a node that arrives costs no
Python call and no object, since thousands of them a second arrive beside the serving path. The most probable
continuation lies ready as a list of tokens, so that a draft is a slice of it, and a commit that follows it a
comparison. `DraftTree` is the plain form of the rules, and the tests' reference for this one.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NoReturn

from vllm_wanspec.core.draft import NO_DRAFT, Draft
from vllm_wanspec.core.learned.calibration import LOG_EDGES, RANGES, Calibration
from vllm_wanspec.core.tree import ROOT_ID, Appended, Committed, NodeRecord
from vllm_wanspec.errors import RemoteProtocolError

NONE = -1
_new = tuple.__new__
"""Makes a named tuple without a Python call, on the serving path."""
_TOKEN_BITS = 32
_LEAST_DEAD = 256
"""Columns are made anew when so many nodes have been dropped, and as many as live."""


class FlatTree:
    """Nodes below the committed context of one session; see `DraftTree` for the words used here.

    Nodes are known by their index in the columns: parents come before their children. Indices hold until `version`
    changes, which only `append` does.

    The *path* is the most probable continuation. Of its tokens those from `at` on are drafted; those before have been
    committed since it was laid. Whoever commits the tokens that it has next may just move `at` on by their number.

    Attributes:
        path: Token ids; none while commits are pending. Read only.
        at: How many of them have been committed.
        chances: By how many of its tokens: the chance that the target takes the first ones of the path. Read only; a
            node's chance is as known when it arrived or when the path was laid.
        branch_id: Nodes up to this id are a side branch's, see `Counters`; set by the session. 0: none are.
        changed: Whether nodes have come since the last `draft`.
        version: Counts how often the columns have been made anew.
    """

    __slots__ = (
        "_best",
        "_buckets",
        "_calibration",
        "_children",
        "_cursor",
        "_entropies",
        "_ids",
        "_index",
        "_kids",
        "_last_id",
        "_logprobs",
        "_max_nodes",
        "_nodes",
        "_parents",
        "_pending",
        "_position",
        "_reaches",
        "_settled",
        "_tokens",
        "_vocab_size",
        "_walked",
        "at",
        "branch_id",
        "chances",
        "changed",
        "path",
        "version",
    )

    def __init__(
        self, context_length: int, *, vocab_size: int, max_nodes: int, calibration: Calibration | None = None
    ) -> None:
        """Start with a context of ``context_length`` tokens and no draft; arguments as of `DraftTree`."""
        self._vocab_size = vocab_size
        self._max_nodes = max_nodes
        self._calibration = calibration or Calibration()
        self._pending: deque[int] = deque()
        self._walked: list[tuple[int, int]] = []
        self._last_id = ROOT_ID
        self._cursor = 0
        self._position = context_length
        self.version = 0
        self.path: list[int] = []
        self.chances = [1.0]
        self.branch_id = 0
        self.changed = False
        self.at = self._settled = 0  # along the path: all commits, and those of them that the cursor has made
        self._nodes = [0]  # of the path, the one before it included
        # One entry a node; the first is the context that the tree began with, or was last made anew for.
        self._ids = [ROOT_ID]
        self._tokens = [NONE]
        self._parents = [NONE]
        self._logprobs = [0.0]
        self._entropies = [0.0]
        self._buckets = [0]
        self._reaches = [0.0]  # logarithms, from the beginning of the columns on
        self._best = [NONE]
        self._kids: list[list[int] | None] = [None]
        self._index = {ROOT_ID: 0}  # of the live ones, by id
        self._children: dict[int, int] = {}  # by parent's index and token

    @property
    def pending(self) -> Sequence[int]:
        """Committed tokens that the tree does not hold."""
        return self._pending

    @property
    def cursor(self) -> int:
        """Index of the node that equals the committed context, as far as the tree knows it (see `pending`)."""
        return self._nodes[self.at]

    @property
    def position(self) -> int:
        """Tokens in the context that the cursor stands for."""
        return self._position + self.at - self._settled

    @property
    def committed_length(self) -> int:
        """Tokens in the committed context, pending ones included."""
        return self.position + len(self._pending)

    @property
    def size(self) -> int:
        """Nodes below the cursor, and those that wait to be pruned."""
        return len(self._index) - 1

    @property
    def last_id(self) -> int:
        """The highest node id seen so far."""
        return self._last_id

    @property
    def cursor_id(self) -> int:
        """Id of the node that equals the committed context, as far as the tree knows it."""
        return self._ids[self._nodes[self.at]]

    @property
    def line(self) -> tuple[int, int]:
        """The end of the most probable continuation: the node's id, and how many tokens it is behind the cursor.

        That is the cursor while commits are pending.
        """
        return self._ids[self._nodes[-1]], len(self.path) - self.at

    def append(self, records: Iterable[NodeRecord]) -> Appended:
        """Prune, then add drafted nodes in the order in which they were drafted; as `DraftTree.append`.

        Raises:
            RemoteProtocolError: A record that no correct drafter sends.
        """
        self.prune()
        self.changed = True
        new_path = False
        ids, index, children, kids = self._ids, self._index, self._children, self._kids
        tokens, parents, logprobs, entropies = self._tokens, self._parents, self._logprobs, self._entropies
        best, buckets, reaches, pending = self._best, self._buckets, self._reaches, self._pending
        probability, log_probability = self._calibration.probability, self._calibration.log_probability
        path, nodes, chances = self.path, self._nodes, self.chances
        vocab_size, last_id, most = self._vocab_size, self._last_id, self._max_nodes
        added = stale = late = late_hits = aside = 0
        late_parent = late_first = -1
        try:
            for number, parent_id, token, logprob, entropy in records:
                if not (0 <= parent_id <= last_id == number - 1 and 0 <= token < vocab_size):
                    self._refuse(number, parent_id, token, last_id)
                last_id = number
                parent = index.get(parent_id, NONE)
                if pending and parent >= 0 and parent_id != late_parent:
                    late_parent, late_first = parent_id, number
                    late += 1
                if parent < 0 or (pending and token != pending[0]):
                    stale += 1
                    continue
                key = parent << _TOKEN_BITS | token
                if key in children:
                    raise RemoteProtocolError(f"node {number} repeats token {token} below node {parent_id}")
                if not pending and len(index) > most:
                    raise RemoteProtocolError(f"node {number} is over the budget of {most} nodes")
                node = len(ids)
                bucket = bisect_right(LOG_EDGES, logprob)
                favourite = best[parent]
                if favourite >= 0 and logprob <= logprobs[favourite]:
                    bucket += RANGES
                else:
                    best[parent] = node
                    if favourite >= 0:
                        new_path = True
                    elif parent == nodes[-1] and not pending:
                        path.append(token)
                        nodes.append(node)
                        chances.append(chances[-1] * probability[bucket])
                ids.append(number)
                tokens.append(token)
                parents.append(parent)
                logprobs.append(logprob)
                entropies.append(entropy)
                buckets.append(bucket)
                reaches.append(reaches[parent] + log_probability[bucket])
                best.append(NONE)
                kids.append(None)
                children[key] = node
                index[number] = node
                siblings = kids[parent]
                if siblings is None:
                    kids[parent] = [node]
                else:
                    siblings.append(node)
                if pending:
                    new_path = True
                    pending.popleft()
                    late_hits += 1
                    if number != late_first:
                        aside = self._position + 1
                    del index[parent_id]
                    self._cursor = node
                    self._position += 1
                else:
                    added += 1
        finally:
            self._last_id = last_id
            if len(ids) > _LEAST_DEAD + 2 * len(index):
                self._renew()
                new_path = True
            if new_path:
                self._lay_path()
        return Appended(added, stale, late, late_hits, aside)

    def catch_up(self, length: int) -> None:
        """Prune, then make nodes of the pending tokens of the context's first ``length``; as `DraftTree.catch_up`."""
        self.prune()
        pending = self._pending
        if not pending or self._position >= length:
            return
        while pending and self._position < length:
            before, node, token = self._cursor, len(self._ids), pending.popleft()
            self._last_id += 1
            self._ids.append(self._last_id)
            self._tokens.append(token)
            self._parents.append(before)
            self._logprobs.append(0.0)
            self._entropies.append(0.0)
            self._buckets.append(0)
            self._reaches.append(self._reaches[before])
            self._best.append(NONE)
            self._kids.append(None)
            del self._index[self._ids[before]]
            self._index[self._last_id] = node
            self._cursor = node
            self._position += 1
        self._lay_path()

    def commit(self, tokens: Sequence[int]) -> Committed:
        """Move the cursor along verified tokens; in time proportional to their number."""
        count, at = len(tokens), self.at
        if self.path[at : at + count] == tokens:
            self.at = at + count
            return _new(Committed, (count, count, False))
        path, nodes, settled = self.path, self._nodes, self._settled
        followed = 0
        for expected, token in zip(path[at:], tokens, strict=False):
            if expected != token:
                break
            followed += 1
        at += followed
        # As `_settle`, without the call.
        self._walked.extend(zip(nodes[settled:at], path[settled:at], strict=False))
        self._position += at - settled
        cursor, stayed = nodes[at], followed
        missed = False
        best, pending = self._best, self._pending
        for token in tokens[followed:]:
            if not pending:
                self._walked.append((cursor, token))
                child = self._children.get(cursor << _TOKEN_BITS | token, NONE)
                missed = missed or child != best[cursor]
                if child >= 0:
                    cursor = child
                    stayed += 1
                    continue
            pending.append(token)
        self._cursor = cursor
        self._position += stayed - followed
        if pending:
            self.path, self._nodes, self.chances = [], [cursor], [1.0]
            self.at = self._settled = 0
        else:
            self._lay_path()
        return _new(Committed, (stayed, followed, missed))

    def _settle(self) -> None:
        """Have the cursor where commits along the path have brought it."""
        at, settled = self.at, self._settled
        if at != settled:
            nodes = self._nodes
            self._walked.extend(zip(nodes[settled:at], self.path[settled:at], strict=False))
            self._cursor = nodes[at]
            self._position += at - settled
            self._settled = at

    def prune(self) -> None:
        """Drop what commits have ruled out, and learn from what they took."""
        self._settle()
        if not self._walked:
            return
        ids, index, kids, children = self._ids, self._index, self._kids, self._children
        for node, token in self._walked:
            family = kids[node]
            kept = children.get(node << _TOKEN_BITS | token, NONE)
            if family:
                self._learn(node, family, kept)
                doomed = [child for child in family if child != kept]
                for child in doomed:
                    del index[ids[child]]
                    below = kids[child]
                    if below:
                        doomed.extend(below)
            if kept >= 0:
                del index[ids[node]]
            elif family:
                for child in family:
                    del children[node << _TOKEN_BITS | self._tokens[child]]
                kids[node], self._best[node] = None, NONE
        self._walked.clear()
        self._lay_path()

    def draft(self, limit: int, least: float = 0.0) -> Draft:
        """Tokens of the most probable continuation, for verification; as `DraftTree.draft`."""
        self.changed = False
        at = self.at
        tokens = self.path[at : at + limit]
        if not tokens:
            return NO_DRAFT
        ahead = self.chances[at + 1 : at + 1 + limit]
        until_here = self.chances[at] or 1.0  # a product of very many chances is 0
        if ahead[-1] < least * until_here:
            count = len(ahead) - bisect_left(ahead[::-1], least * until_here)
            if not count:
                return NO_DRAFT
            tokens, ahead = tokens[:count], ahead[:count]
        branch = 0
        if self.branch_id:
            if self.cursor_id >= self.branch_id:
                self.branch_id = 0
            branch = self.drafted_until(self.branch_id, tokens)
        return _new(Draft, (tokens, sum(ahead) / until_here, ahead[-1] / until_here, (), 0, branch))

    def best_path(self, limit: int) -> list[int]:
        """Indices of the most probable continuation, at most ``limit`` nodes; empty while commits are pending."""
        return self._nodes[self.at + 1 : self.at + 1 + limit]

    def drafted_until(self, last_id: int, draft: Sequence[int]) -> int:
        """How many tokens of a draft come from nodes with ids up to ``last_id``: the first, since ids rise along it.

        ``draft`` begins after the committed context; what of it the tree does not hold is not counted.
        """
        count = 0
        node = NONE if self._pending else self._nodes[self.at]
        for token in draft:
            node = self._children.get(node << _TOKEN_BITS | token, NONE) if node >= 0 else NONE
            if node < 0 or self._ids[node] > last_id:
                break
            count += 1
        return count

    def below(self, node: int | None = None) -> list[tuple[int, int, float, bool]]:
        """What follows a node, the cursor if none is given: index, token, log-probability, and whether it is the best.

        Those that a commit has ruled out, and that wait to be pruned, are not among what follows the cursor.
        """
        node = self._nodes[self.at] if node is None else node
        family = self._kids[node] or ()
        return [(kid, self._tokens[kid], self._logprobs[kid], kid == self._best[node]) for kid in family]

    def _refuse(self, number: int, parent_id: int, token: int, last_id: int) -> NoReturn:
        if number != last_id + 1:
            raise RemoteProtocolError(f"node id {number} does not follow {last_id}")
        if not 0 <= parent_id <= last_id:
            raise RemoteProtocolError(f"node {number} hangs below node {parent_id}, which was never sent")
        raise RemoteProtocolError(f"node {number} has token {token}, outside 0..{self._vocab_size - 1}")

    def _learn(self, node: int, family: Sequence[int], taken: int) -> None:
        """Tell the calibration what the target took where a distribution was known."""
        best, buckets, calibration = self._best[node], self._buckets, self._calibration
        for child in family:
            calibration.saw(buckets[child], child == taken)
        if taken == best:
            outcome = 0
        elif taken < 0:
            outcome = 3
        else:
            outcome = 1 if self._kids[taken] else 2
        calibration.saw_outcome(self._entropies[best], outcome)

    def _lay_path(self) -> None:
        """Lay the path anew, from the cursor."""
        best, mine, buckets, probability = self._best, self._tokens, self._buckets, self._calibration.probability
        node, chance = self._cursor, 1.0
        path: list[int] = []
        nodes, chances = [node], [chance]
        node = NONE if self._pending else best[node]
        while node >= 0:
            chance *= probability[buckets[node]]
            path.append(mine[node])
            nodes.append(node)
            chances.append(chance)
            node = best[node]
        self.path, self._nodes, self.chances = path, nodes, chances
        self.at = self._settled = 0

    def _renew(self) -> None:
        """Make the columns anew of the live nodes alone; the path must be laid anew then."""
        live = sorted(self._index.values())
        places = {node: place for place, node in enumerate(live)}
        places[NONE] = NONE
        base = self._reaches[self._cursor]
        self._ids = [self._ids[node] for node in live]
        self._tokens = [self._tokens[node] for node in live]
        self._parents = [places.get(self._parents[node], NONE) for node in live]
        self._logprobs = [self._logprobs[node] for node in live]
        self._entropies = [self._entropies[node] for node in live]
        self._buckets = [self._buckets[node] for node in live]
        self._reaches = [self._reaches[node] - base for node in live]
        self._best = [places[self._best[node]] for node in live]
        families = [self._kids[node] for node in live]
        self._kids = [None if family is None else [places[kid] for kid in family] for family in families]
        self._index = {number: place for place, number in enumerate(self._ids)}
        pairs = enumerate(zip(self._parents, self._tokens, strict=True))
        self._children = {parent << _TOKEN_BITS | token: node for node, (parent, token) in pairs if parent >= 0}
        self._cursor = places[self._cursor]
        self.version += 1
