"""DrafterSession: the draft side of one request, without I/O.

It is told what the controller committed and what the draft engine produced, and answers with actions: which engine
requests (*branches*) to start and stop, and which nodes to send. It keeps the main line drafted ahead and spends the
other branches where the draft model is unsure, never further than the session's lookahead beyond the last commit and
never over its budget of nodes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.messages import Commit, Nodes, Open, Reject
from vllm_wanspec.core.policy.expansion import LOOKAHEAD_SLACK, Candidates, branching_tokens
from vllm_wanspec.core.states import DRAFTER_TABLE, DrafterEvent, DrafterState
from vllm_wanspec.core.tree import DraftTree, Node, NodeRecord


@dataclass(frozen=True, slots=True)
class DraftStep:
    """One token from the draft engine.

    Attributes:
        token: The token that the engine went on with (its most probable one).
        logprob: Its natural log-probability.
        entropy_nats: Entropy of the distribution.
        alternatives: Other probable tokens with their log-probabilities, most probable first.
    """

    token: int
    logprob: float
    entropy_nats: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StartBranch:
    """Ask the engine to go on greedily at ``node``, for at most ``max_tokens`` tokens.

    Attributes:
        context: The session's own, which goes on growing: its first ``length`` tokens count.
        path: The tokens from there to the node.
    """

    branch: int
    node: int
    context: Sequence[int] = field(repr=False, compare=False)
    length: int
    path: tuple[int, ...]
    max_tokens: int

    @property
    def tokens(self) -> list[int]:
        """All that the engine is to continue; a copy each time."""
        return [*self.context[: self.length], *self.path]


@dataclass(frozen=True, slots=True)
class StopBranch:
    """Tell the engine that a branch is no longer wanted."""

    branch: int


Action = StartBranch | StopBranch | Nodes | Reject


@dataclass(slots=True)
class _Branch:
    """A running engine request: the node that it extends now, and how many tokens it will still give."""

    number: int
    tip: Node
    left: int
    fruitless: bool = True


class DrafterSession:
    """One request's tree at the drafter.

    Every method that takes ``now`` (seconds) returns the actions that follow, in order. After a `Reject` the session is
    over. While its context is still coming, in commits, nothing is drafted.
    """

    def __init__(
        self,
        opened: Open,
        *,
        vocab_size: int,
        max_context: int,
        max_branch_tokens: int = 256,
        width: int | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Take the session's context and limits.

        Args:
            opened: The controller's `Open`, already held against the server's own limits.
            vocab_size: Ids below this may be drafted and sent.
            max_context: Longest context in tokens that the draft model takes.
            max_branch_tokens: Most tokens asked of the engine in one request.
            width: Branches that the server allows to run at a time; None: as many as the controller asks for.
            calibration: Shared by the sessions of a connection; None makes one.
        """
        self.number = opened.session
        self.limits = opened.limits
        self._calibration = calibration or Calibration()
        self._vocab_size = vocab_size
        self._max_context = max_context
        self._max_branch_tokens = max_branch_tokens
        self._context = list(opened.tokens)
        self._opened_length = opened.total
        self._tree = DraftTree(
            opened.total,
            vocab_size=vocab_size,
            max_nodes=opened.limits.max_nodes,
            calibration=self._calibration,
        )
        self.width = min(opened.limits.running_branches, width or opened.limits.running_branches)
        self._branches = 0
        self._running: dict[int, _Branch] = {}
        self._at_tip: dict[Node, _Branch] = {}
        self._left = 0
        self._main_tip = self._tree.cursor
        self._candidates = Candidates(opened.limits.min_probability)
        self._dead_end: Node | None = None
        self._until = opened.total if opened.on_demand else None
        self._state = DrafterState.NEW

    @property
    def tree(self) -> DraftTree:
        """What has been drafted and is still possible; read only."""
        return self._tree

    @property
    def running(self) -> Sequence[int]:
        """The branches that the engine is extending."""
        return list(self._running)

    @property
    def main_branch(self) -> int | None:
        """The branch that extends the most probable continuation; None: there is none now."""
        main = self._at_tip.get(self._tip())
        return main.number if main is not None else None

    @property
    def state(self) -> DrafterState:
        """What the session is doing."""
        return self._state

    @property
    def length(self) -> int:
        """Tokens of the context that are there."""
        return len(self._context)

    @property
    def context(self) -> Sequence[int]:
        """The context, as far as it is there; read only."""
        return self._context

    def start(self, now: float) -> list[Action]:
        """Begin to draft, where the whole context is there."""
        return self._steer_if_whole()

    def committed(self, commit: Commit, now: float) -> list[Action]:
        """Follow a commit; what it repeats is skipped, and tokens that were not drafted become nodes.

        A commit that begins after the known context cannot be followed, nor one that makes it longer than the model
        takes: the session ends with a `Reject`.
        """
        known = self.length
        if commit.position > known:
            return self._reject("gap")
        tokens = commit.tokens[known - commit.position :]
        if known + len(tokens) > self._max_context:
            return self._reject("too_long")
        if any(token >= self._vocab_size for token in tokens):
            return self._reject("vocabulary")
        self._context.extend(tokens)
        if known < self._opened_length:
            if self.length < self._opened_length:
                return []
            tokens = tokens[self._opened_length - known :]
        self._tree.commit(tokens)
        self._tree.catch_up(self.length)
        self._main_tip = self._tree.cursor
        impossible = [branch for branch in self._running.values() if branch.tip not in self._tree]
        actions: list[Action] = [self._stop(branch) for branch in impossible]
        if len(self._candidates) > 2 * self.limits.max_nodes:
            self._candidates.forget(self._tree)
        return actions + self._steer()

    def wanted(self, tokens: int, now: float) -> list[Action]:
        """The controller asks for drafts, so many tokens beyond the context; of no effect where it gets them anyway."""
        if self._until is not None:
            self._until = self.length + tokens
        return self._steer_if_whole()

    def drafted(self, number: int, steps: Iterable[DraftStep], now: float) -> list[Action]:
        """Take tokens from the engine; those of a branch that was stopped meanwhile are ignored."""
        branch = self._running.get(number)
        if branch is None:
            return []
        records: list[NodeRecord] = []
        actions: list[Action] = []
        for step in steps:
            if not self._take(branch, step, records):
                actions.append(self._stop(branch))
                break
        if records:
            actions.insert(0, Nodes(self.number, self.length, tuple(records)))
        return actions + self._steer()

    def ended(self, number: int, now: float) -> list[Action]:
        """The engine has finished a branch (its ``max_tokens``), and more may be wanted.

        One that ends without a token counts as a failure: asking again at once would go on for ever.
        """
        branch = self._running.get(number)
        if branch is None:
            return []
        self._forget(branch)
        return self._reject("engine") if branch.fruitless else self._steer()

    def failed(self, now: float) -> list[Action]:
        """The engine cannot serve the session."""
        return self._reject("engine")

    def resize(self, width: int, now: float) -> list[Action]:
        """The server allows ``width`` running branches; those that run above that run to their end."""
        self.width = max(1, min(width, self.limits.running_branches))
        return self._steer_if_whole()

    def close(self, now: float) -> list[Action]:
        """The controller is done with the session."""
        return self._end(DrafterEvent.CLOSE)

    @property
    def _lookahead(self) -> int:
        """Tokens that may be drafted beyond the context now."""
        most = self.limits.lookahead
        return most if self._until is None else max(0, min(most, self._until - self.length))

    def _take(self, branch: _Branch, step: DraftStep, records: list[NodeRecord]) -> bool:
        """Hang one engine step below a branch's tip; False when it cannot be used."""
        tip, tree = branch.tip, self._tree
        room = self.limits.max_nodes - tree.size
        if step.token >= self._vocab_size:
            self._dead_end = tip  # a greedy engine would give the same token again
            return False
        if room < 1 or self._ahead(tip) >= self._lookahead:
            return False
        branch.left -= 1
        self._left -= 1
        branch.fruitless = False
        usable = (item for item in step.alternatives if item[0] != step.token and item[0] < self._vocab_size)
        others, branching = branching_tokens(usable, step.entropy_nats, self.limits, self._calibration)
        spare = max(0, room - 1 - self._reserved())
        ranked = [(step.token, step.logprob), *others[:spare]]
        fresh = [
            NodeRecord(tree.last_id + 1 + index, tip.id, token, min(logprob, 0.0), step.entropy_nats)
            for index, (token, logprob) in enumerate(ranked)
        ]
        tree.append(fresh)
        records += fresh
        del self._at_tip[tip]
        branch.tip = tip.children[step.token]
        self._at_tip[branch.tip] = branch
        for token, _ in ranked[1 : branching + 1]:
            self._candidates.add(tip.children[token])
        return True

    def _steer_if_whole(self) -> list[Action]:
        return self._steer() if self.length >= self._opened_length else []

    def _steer(self) -> list[Action]:
        """Stop and start branches as the tree and the limits now want it."""
        actions: list[Action] = []
        tip = self._tip()
        main = self._at_tip.get(tip)
        exhausted = self._exhausted(tip)
        slack = min(LOOKAHEAD_SLACK, self._lookahead // 2)
        if main is not None and exhausted:
            actions.append(self._stop(main))
            main = None
        elif main is None and not exhausted and self._ahead(tip) <= self._lookahead - slack:
            actions.append(self._start(tip, self._line_tokens(tip)))
            main = self._running[self._branches]
        actions += self._branch_out(main)
        self._state = DRAFTER_TABLE[self._state, self._what_now(exhausted)]
        return actions

    def _line_tokens(self, tip: Node) -> int:
        """How many tokens the engine is asked for at the main line's end: what it may need before it is asked again."""
        most = min(self._max_branch_tokens, self._max_context - tip.position)
        return most if self._until is None else min(most, self._until - tip.position)

    def _branch_out(self, main: _Branch | None) -> list[Action]:
        """Start side branches, the most probable first; one place is always kept for the main line."""
        actions: list[Action] = []
        places = self.width - len(self._running) - (main is None)
        if places < 1 or not len(self._candidates):
            return actions
        depth = self.limits.branch_depth
        farthest = min(self._tree.committed_length + self._lookahead, self._max_context)
        leaves = self._candidates.take(self._tree, farthest)
        while places > 0 and self._tree.size + self._reserved() + depth <= self.limits.max_nodes:
            leaf = next(leaves, None)
            if leaf is None:
                break
            if leaf not in self._at_tip:
                actions.append(self._start(leaf, min(depth, farthest - leaf.position)))
                places -= 1
        leaves.close()
        return actions

    def _start(self, node: Node, max_tokens: int) -> StartBranch:
        self._branches += 1
        self._running[self._branches] = self._at_tip[node] = _Branch(self._branches, node, max_tokens)
        self._left += max_tokens
        path = tuple(self._path_to(node))
        return StartBranch(self._branches, node.id, self._context, self.length, path, max_tokens)

    def _stop(self, branch: _Branch) -> StopBranch:
        self._forget(branch)
        return StopBranch(branch.number)

    def _forget(self, branch: _Branch) -> None:
        del self._running[branch.number], self._at_tip[branch.tip]
        self._left -= branch.left

    def _reject(self, code: str) -> list[Action]:
        return [*self._end(DrafterEvent.REJECT), Reject(self.number, code)]

    def _end(self, event: DrafterEvent) -> list[Action]:
        self._state = DRAFTER_TABLE[self._state, event]
        return [self._stop(branch) for branch in list(self._running.values())]

    def _reserved(self) -> int:
        """Nodes that the running branches and the main line up to the lookahead will still need."""
        tip = self._tip()
        main = self._at_tip.get(tip)
        side = self._left - (main.left if main is not None else 0)
        return side + max(0, self._lookahead - self._ahead(tip))

    def _tip(self) -> Node:
        """The main line's end, sought from where it was: until a commit, nodes are only hung below ends of branches."""
        node = self._main_tip
        while node.best is not None:
            node = node.best
        self._main_tip = node
        return node

    def _what_now(self, exhausted: bool) -> DrafterEvent:
        if self._running:
            return DrafterEvent.DRAFT
        if exhausted and self._tree.size >= self.limits.max_nodes:
            return DrafterEvent.FILL
        return DrafterEvent.REST

    def _exhausted(self, tip: Node) -> bool:
        return (
            self._ahead(tip) >= self._lookahead
            or tip is self._dead_end
            or tip.position >= self._max_context
            or self._tree.size >= self.limits.max_nodes
        )

    def _ahead(self, tip: Node) -> int:
        return tip.position - self._tree.committed_length

    def _path_to(self, node: Node) -> list[int]:
        path: list[int] = []
        while node.parent is not None:
            path.append(node.token)
            node = node.parent
        return path[::-1]
