"""The draft tree as columns: the controller's copy, and its words for a device.

`FlatTree` keeps what `DraftTree` keeps, by the same rules, in lists with one entry a node: a node that arrives costs no
Python call and no object, since thousands of them a second arrive beside the serving path. `DraftTree` is the plain
form of the rules, and the tests' reference for this one. `TreeWords` follows a tree for the block that a device reads.
"""

import heapq
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

from vllm_wanspec.core.block import (
    BEST,
    BLOCK_NODES,
    LOOKED_UP,
    MAX_FOLLOWED,
    MAX_TOKEN,
    UNDER_ROOT,
    survival_level,
    word,
)
from vllm_wanspec.core.learned.calibration import LOG_EDGES, RANGES, Calibration
from vllm_wanspec.core.tree import ROOT_ID, Appended, Committed, NodeRecord
from vllm_wanspec.errors import RemoteProtocolError

NONE = -1
_TOKEN_BITS = 32
_LEAST_DEAD = 256
"""Columns are made anew when so many nodes have been dropped, and as many as live."""


class FlatTree:
    """Nodes below the committed context of one session; see `DraftTree` for the words used here.

    Nodes are known by their index in the columns: parents come before their children. Indices hold until `version`
    changes, which only `append` does.

    Attributes:
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
        "_parents",
        "_pending",
        "_position",
        "_reaches",
        "_tokens",
        "_vocab_size",
        "_walked",
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
        """Committed tokens after the cursor that the tree does not hold."""
        return self._pending

    @property
    def committed_length(self) -> int:
        """Tokens in the committed context, pending ones included."""
        return self._position + len(self._pending)

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
        return self._ids[self._cursor]

    @property
    def has_draft(self) -> bool:
        """Whether anything is drafted for the committed context."""
        return not self._pending and self._best[self._cursor] >= 0

    @property
    def line(self) -> tuple[int, int]:
        """The end of the most probable continuation: the node's id, and how many tokens it is behind the cursor.

        That is the cursor while commits are pending.
        """
        best, node, length = self._best, self._cursor, 0
        while best[node] >= 0 and not self._pending:
            node = best[node]
            length += 1
        return self._ids[node], length

    def append(self, records: Iterable[NodeRecord]) -> Appended:
        """Prune, then add drafted nodes in the order in which they were drafted; as `DraftTree.append`.

        Raises:
            RemoteProtocolError: A record that no correct drafter sends.
        """
        if self._walked:
            self.prune()
        ids, index, children, kids = self._ids, self._index, self._children, self._kids
        tokens, parents, logprobs, entropies = self._tokens, self._parents, self._logprobs, self._entropies
        best, buckets, reaches, pending = self._best, self._buckets, self._reaches, self._pending
        log_probability = self._calibration.log_probability
        vocab_size, last_id, most = self._vocab_size, self._last_id, self._max_nodes
        added = stale = late = late_hits = aside = 0
        late_parent = late_first = -1
        for number, parent_id, token, logprob, entropy in records:
            if not (0 <= parent_id <= last_id < number and 0 <= token < vocab_size):
                self._last_id = last_id
                self._refuse(number, parent_id, token)
            last_id = number
            parent = index.get(parent_id, NONE)
            drafted = logprob != 0.0 or entropy != 0.0
            if pending and parent >= 0 and parent_id != late_parent and drafted:
                late_parent, late_first = parent_id, number
                late += 1
            if parent < 0 or (pending and token != pending[0]):
                stale += 1
                continue
            key = parent << _TOKEN_BITS | token
            if key in children:
                self._last_id = last_id
                raise RemoteProtocolError(f"node {number} repeats token {token} below node {parent_id}")
            if not pending and len(index) > most:
                self._last_id = last_id
                raise RemoteProtocolError(f"node {number} is over the budget of {most} nodes")
            node = len(ids)
            bucket = bisect_right(LOG_EDGES, logprob)
            favourite = best[parent]
            if favourite < 0 or logprob > logprobs[favourite]:
                best[parent] = node
            else:
                bucket += RANGES
            ids.append(number)
            tokens.append(token)
            parents.append(parent)
            logprobs.append(logprob)
            entropies.append(entropy)
            buckets.append(bucket)
            reaches.append(reaches[parent] + log_probability[bucket] if drafted else reaches[parent])
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
                pending.popleft()
                if drafted:
                    late_hits += 1
                    if number != late_first:
                        aside = self._position + 1
                del index[parent_id]
                self._cursor = node
                self._position += 1
            else:
                added += 1
        self._last_id = last_id
        if len(ids) > _LEAST_DEAD + 2 * len(index):
            self._renew()
        return Appended(added, stale, late, late_hits, aside)

    def commit(self, tokens: Iterable[int]) -> Committed:
        """Move the cursor along verified tokens; in time proportional to their number."""
        stayed = followed = 0
        missed = False
        cursor, pending, best, mine = self._cursor, self._pending, self._best, self._tokens
        for token in tokens:
            if not pending:
                self._walked.append((cursor, token))
                child = best[cursor]
                if child >= 0:
                    if mine[child] == token:
                        followed += not missed
                        cursor = child
                        stayed += 1
                        continue
                    missed = True
                    child = self._children.get(cursor << _TOKEN_BITS | token, NONE)
                    if child >= 0:
                        cursor = child
                        stayed += 1
                        continue
            pending.append(token)
        self._cursor = cursor
        self._position += stayed
        return tuple.__new__(Committed, (stayed, followed, missed))

    def prune(self) -> None:
        """Drop what commits have ruled out, and learn from what they took."""
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

    def draft(self, limit: int, least: float = 0.0) -> tuple[list[int], float, float]:
        """Tokens of the most probable continuation, for verification; as `DraftTree.draft`."""
        tokens: list[int] = []
        chance, expected = 1.0, 0.0
        if self._pending:
            return tokens, expected, chance
        best, mine, buckets, probability = self._best, self._tokens, self._buckets, self._calibration.probability
        node = best[self._cursor]
        while node >= 0 and limit > 0:
            longer = chance * probability[buckets[node]]
            if longer < least:
                break
            chance = longer
            expected += chance
            tokens.append(mine[node])
            node = best[node]
            limit -= 1
        return tokens, expected, chance

    def best_path(self, limit: int) -> list[int]:
        """Indices of the most probable continuation, at most ``limit`` nodes; empty while commits are pending."""
        path: list[int] = []
        node = NONE if self._pending else self._best[self._cursor]
        while node >= 0 and len(path) < limit:
            path.append(node)
            node = self._best[node]
        return path

    def drafted_until(self, last_id: int, draft: Sequence[int]) -> int:
        """How many tokens of a draft come from nodes with ids up to ``last_id``: the first, since ids rise along it.

        ``draft`` begins after the committed context; what of it the tree does not hold is not counted.
        """
        count = 0
        node = NONE if self._pending else self._cursor
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
        node = self._cursor if node is None else node
        family = self._kids[node] or ()
        return [(kid, self._tokens[kid], self._logprobs[kid], kid == self._best[node]) for kid in family]

    def _refuse(self, number: int, parent_id: int, token: int) -> NoReturn:
        if number <= self._last_id:
            raise RemoteProtocolError(f"node id {number} does not rise above {self._last_id}")
        if not 0 <= parent_id <= self._last_id:
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

    def _renew(self) -> None:
        """Make the columns anew of the live nodes alone."""
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


class TreeWords:
    """The words of one tree, as its slot's block has them: what has arrived is added, dead ones go now and then.

    Attributes:
        root: Length of the context that the words follow.
    """

    def __init__(self, tree: FlatTree) -> None:
        """Begin with the tree as it is."""
        self._tree = tree
        self.root = 0
        self._words = array("q")
        self._places: dict[int, int] = {}
        self._favourites: dict[int, int] = {}
        self._next = self._version = 0
        self._root_reach = 0.0
        self._left_out = False
        self._renew()

    @property
    def tree(self) -> FlatTree:
        """The tree that they are of."""
        return self._tree

    def current(self, guess: "Guess | None" = None) -> "array[int]":
        """The words for all that the tree holds by now, as far as a block has room; not to be changed.

        Args:
            guess: Tokens that prompt lookup goes on with; left out where something has been drafted in their place.
        """
        tree = self._tree
        if (
            tree.version != self._version
            or tree._cursor not in self._places
            or tree._position - self.root > MAX_FOLLOWED // 2
            or (self._left_out and tree._position > self.root)
        ):
            self._renew()
        else:
            self._extend()
        return self._words if guess is None else self._with(guess)

    def _renew(self) -> None:
        """Begin at the cursor."""
        tree = self._tree
        self.root, self._version = tree._position, tree.version
        self._words = array("q")
        self._places = {tree._cursor: UNDER_ROOT}
        self._favourites = {}
        self._left_out = False
        self._root_reach = tree._reaches[tree._cursor]
        if len(tree._index) - 1 <= BLOCK_NODES:
            self._next = tree._cursor + 1
            self._extend()
            return
        self._next = len(tree._ids)
        self._left_out = True
        # The most probable ones: no child is more probable than its parent, so that none comes before it.
        heap = [(-tree._reaches[kid], kid) for kid in tree._kids[tree._cursor] or ()]
        heapq.heapify(heap)
        while heap and len(self._words) < BLOCK_NODES:
            _, node = heapq.heappop(heap)
            self._add(node)
            for kid in tree._kids[node] or ():
                heapq.heappush(heap, (-tree._reaches[kid], kid))

    def _extend(self) -> None:
        """Add what has come."""
        tree, places = self._tree, self._places
        parents = tree._parents
        for node in range(self._next, len(tree._ids)):
            if parents[node] in places:
                if len(self._words) == BLOCK_NODES:
                    self._left_out = True
                    break
                self._add(node)
        self._next = len(tree._ids)

    def _add(self, node: int) -> None:
        tree = self._tree
        parent = self._places[tree._parents[node]]
        token = tree._tokens[node]
        if token > MAX_TOKEN:
            return
        place = self._places[node] = len(self._words)
        flags = 0
        if tree._best[tree._parents[node]] == node:
            before = self._favourites.get(parent)
            if before is not None:
                self._words[before] &= ~BEST
            self._favourites[parent] = place
            flags = BEST
        level = survival_level(self._root_reach - tree._reaches[node])
        self._words.append(word(parent, token, level, flags))

    def _with(self, guess: "Guess") -> "array[int]":
        """The words and a guess, as far as there is room."""
        tree = self._tree
        node = tree._index.get(guess.after, NONE)
        parent = self._places.get(node)
        if parent is None:
            return self._words
        if not tree.pending:
            return self._words if tree._best[node] >= 0 else chained(self._words, parent, guess.tokens)
        return chained(self._words, parent, [*tree.pending, *guess.tokens]) if node == tree._cursor else self._words


class Guess(NamedTuple):
    """What prompt lookup goes on with.

    Attributes:
        after: Id of the node at the end of what was drafted when it was made; the tree's cursor where nothing was.
        tokens: Behind that node, and behind the commits that were pending.
        match: Tokens of the match that it followed.
    """

    after: int
    tokens: Sequence[int]
    match: int


def chained(words: "array[int]", parent: int, tokens: Sequence[int]) -> "array[int]":
    """Words with tokens of prompt lookup, one behind the other, below ``parent``; as many as a block has room for."""
    longer = words[:]
    for token in tokens[: BLOCK_NODES - len(words)]:
        if token > MAX_TOKEN:
            break
        place = len(longer)
        longer.append(word(parent, token, 1, BEST | LOOKED_UP))
        parent = place
    return longer
