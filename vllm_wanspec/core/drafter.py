"""DrafterSession: the draft side of one request, without I/O.

It is told what the controller committed and what the draft engine produced, and answers with actions: which engine
requests (*branches*) to start and stop, and which nodes to send. It keeps the main line drafted ahead, never further
than the session's lookahead beyond the last commit and never over its budget of nodes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_wanspec.core.expansion import LOOKAHEAD_SLACK, main_line_tip
from vllm_wanspec.core.messages import Commit, Nodes, Open, Reject
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
    """Ask the engine to continue ``tokens`` greedily for at most ``max_tokens`` tokens."""

    branch: int
    tokens: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class StopBranch:
    """Tell the engine that a branch is no longer wanted."""

    branch: int


Action = StartBranch | StopBranch | Nodes | Reject


class DrafterSession:
    """One request's tree at the drafter.

    Every method returns the actions that follow, in order. After a `Reject` the session is over.
    """

    def __init__(self, opened: Open, *, vocab_size: int, max_context: int, max_branch_tokens: int = 256) -> None:
        """Take the session's context and limits.

        Args:
            opened: The controller's `Open`, already held against the server's own limits.
            vocab_size: Ids below this may be drafted and sent.
            max_context: Longest context in tokens that the draft model takes.
            max_branch_tokens: Most tokens asked of the engine in one request.
        """
        self.number = opened.session
        self._limits = opened
        self._vocab_size = vocab_size
        self._max_context = max_context
        self._max_branch_tokens = max_branch_tokens
        self._context = list(opened.tokens)
        self._tree = DraftTree(len(opened.tokens), vocab_size=vocab_size, max_nodes=opened.max_nodes)
        self._branches = 0
        self._running: int | None = None
        self._tip: Node | None = None
        self._fruitless = True
        self._failed = False

    @property
    def tree(self) -> DraftTree:
        """What has been drafted and is still possible; read only."""
        return self._tree

    @property
    def running(self) -> int | None:
        """The branch that the engine is extending."""
        return self._running

    def start(self) -> list[Action]:
        """Begin to draft."""
        return self._steer()

    def committed(self, commit: Commit) -> list[Action]:
        """Follow a commit; what it repeats is skipped, and tokens that were not drafted become nodes.

        A commit that begins after the known context cannot be followed: the session ends with a `Reject`.
        """
        known = self._tree.committed_length
        if commit.position > known:
            return [*self._stop(), Reject(self.number, "gap")]
        tokens = commit.tokens[known - commit.position :]
        if any(token >= self._vocab_size for token in tokens):
            return [*self._stop(), Reject(self.number, "vocabulary")]
        self._context.extend(tokens)
        self._tree.commit(tokens)
        echoes = self._echoes()
        self._tree.append(echoes)
        actions: list[Action] = []
        if self._tip is not None and self._tip not in self._tree:
            actions += self._stop()
        if echoes:
            actions.append(self._nodes(echoes))
        return actions + self._steer()

    def drafted(self, branch: int, steps: Iterable[DraftStep]) -> list[Action]:
        """Take tokens from the engine; those of a branch that was stopped meanwhile are ignored."""
        records: list[NodeRecord] = []
        stops: list[Action] = []
        for step in steps:
            if branch != self._running:
                break
            if not self._take(step, records):
                stops = self._stop()
                break
        if not records:
            return stops
        return [self._nodes(records), *stops, *self._steer()]

    def ended(self, branch: int) -> list[Action]:
        """The engine has finished a branch (its ``max_tokens``), and more may be wanted.

        One that ends without a token counts as a failure: asking again at once would go on for ever.
        """
        if branch != self._running:
            return []
        if self._fruitless:
            return self.failed()
        self._running = self._tip = None
        return self._steer()

    def failed(self) -> list[Action]:
        """The engine cannot serve the session."""
        self._running = self._tip = None
        self._failed = True
        return [Reject(self.number, "engine")]

    def close(self) -> list[Action]:
        """The controller is done with the session."""
        return self._stop()

    def _take(self, step: DraftStep, records: list[NodeRecord]) -> bool:
        """Hang one engine step below the tip; False when it cannot be used any more."""
        tip = self._tip
        if tip is None or step.token >= self._vocab_size:
            return False
        room = self._limits.max_nodes - self._tree.size
        if room < 1 or self._ahead(tip) >= self._limits.lookahead:
            return False
        others = [(t, p) for t, p in step.alternatives if t != step.token and t < self._vocab_size]
        ranked = [(step.token, step.logprob), *others[: min(self._limits.alternatives, room) - 1]]
        fresh = [
            NodeRecord(self._tree.last_id + 1 + index, tip.id, token, min(logprob, 0.0), step.entropy_nats)
            for index, (token, logprob) in enumerate(ranked)
        ]
        self._tree.append(fresh)
        records += fresh
        self._tip = tip.children[step.token]
        self._fruitless = False
        return True

    def _echoes(self) -> list[NodeRecord]:
        """Nodes for committed tokens that were never drafted."""
        first = self._tree.last_id + 1
        parents: Sequence[int] = [self._tree.cursor.id, *range(first, first + len(self._tree.pending))]
        pending = enumerate(self._tree.pending)
        return [NodeRecord(first + index, parents[index], token, 0.0, 0.0) for index, token in pending]

    def _steer(self) -> list[Action]:
        """Stop the branch when it has run far enough; start one when the main line is short."""
        tip = main_line_tip(self._tree)
        if self._running is not None:
            return self._stop() if self._exhausted(tip) else []
        slack = min(LOOKAHEAD_SLACK, self._limits.lookahead // 2)
        if self._failed or self._exhausted(tip) or self._ahead(tip) > self._limits.lookahead - slack:
            return []
        self._branches += 1
        self._running, self._tip, self._fruitless = self._branches, tip, True
        tokens = (*self._context, *self._path_to(tip))
        return [StartBranch(self._branches, tokens, min(self._max_branch_tokens, self._max_context - len(tokens)))]

    def _exhausted(self, tip: Node) -> bool:
        return (
            self._ahead(tip) >= self._limits.lookahead
            or tip.position >= self._max_context
            or self._tree.size >= self._limits.max_nodes
        )

    def _ahead(self, tip: Node) -> int:
        return tip.position - self._tree.committed_length

    def _path_to(self, tip: Node) -> list[int]:
        return [node.token for node in self._tree.best_path(tip.position)]

    def _stop(self) -> list[Action]:
        if self._running is None:
            return []
        stopped = StopBranch(self._running)
        self._running = self._tip = None
        return [stopped]

    def _nodes(self, records: Sequence[NodeRecord]) -> Nodes:
        return Nodes(self.number, self._tree.committed_length, tuple(records))
