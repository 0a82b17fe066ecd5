"""A drafter's session with an engine that runs its branches one step at a time, as a test says.

Its language is simple: a context of length n goes on with token n, and every position has the alternatives n + 100,
n + 200 and n + 300, each half as probable as the one before.
"""

import math
from collections.abc import Callable

from toys import limits

from vllm_wanspec.core.drafter import Action, DrafterSession, DraftStep, StartBranch, StopBranch
from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.messages import Commit, Nodes, Open
from vllm_wanspec.core.tree import Node, NodeRecord

PROMPT = (0, 1, 2)


def even_step(context: list[int]) -> DraftStep:
    """The next token, and three alternatives, at an entropy of one nat."""
    n = len(context)
    return DraftStep(n, math.log(0.5), 1.0, tuple((n + 100 * i, math.log(0.5 * 0.5**i)) for i in (1, 2, 3)))


class Play:
    """A session and an engine that extends its branches one step at a time, as the test says."""

    def __init__(
        self,
        *,
        step: Callable[[list[int]], DraftStep] = even_step,
        width: int | None = None,
        prompt: tuple[int, ...] = PROMPT,
        max_context: int = 2000,
        **changes: object,
    ) -> None:
        defaults = {"lookahead": 8, "max_branches": 4, "running_branches": 8, "branch_depth": 3}
        self.step = step
        self.calibration = Calibration()
        self.session = DrafterSession(
            Open(7, tuple(prompt), limits(**{**defaults, **changes})),  # type: ignore[arg-type]
            vocab_size=1000,
            max_context=max_context,
            width=width,
            calibration=self.calibration,
        )
        self.prompt = list(prompt)
        self.contexts: dict[int, list[int]] = {}
        self.left: dict[int, int] = {}
        self.starts: list[StartBranch] = []
        self.stops: list[int] = []
        self.nodes: list[NodeRecord] = []
        self.do(self.session.start(0.0))

    @property
    def main_tip(self) -> Node:
        node = self.session.tree.cursor
        while node.best is not None:
            node = node.best
        return node

    @property
    def sides(self) -> list[int]:
        """Running branches but for the main line's."""
        return [number for number, branch in self.session._running.items() if branch.tip is not self.main_tip]

    @property
    def running(self) -> list[int]:
        return list(self.session.running)

    def do(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            if isinstance(action, StartBranch):
                self.starts.append(action)
                self.contexts[action.branch] = list(action.tokens)
                self.left[action.branch] = action.max_tokens
            elif isinstance(action, StopBranch):
                self.stops.append(action.branch)
            elif isinstance(action, Nodes):
                self.nodes += action.nodes
        return actions

    def advance(self, branch: int, count: int = 1) -> list[Action]:
        """One branch gives ``count`` tokens, and ends where it was asked for no more."""
        actions: list[Action] = []
        for _ in range(count):
            step = self.step(self.contexts[branch])
            self.contexts[branch].append(step.token)
            self.left[branch] -= 1
            actions += self.do(self.session.drafted(branch, [step], 0.0))
            if self.left[branch] == 0:
                actions += self.do(self.session.ended(branch, 0.0))
        return actions

    def settle(self) -> None:
        """All branches run, in turn, until none does."""
        for _ in range(1000):
            if not self.running:
                return
            for branch in self.running:
                if branch in self.running:
                    self.advance(branch)
        raise AssertionError("does not settle")

    def commit(self, *tokens: int) -> list[Action]:
        position = self.session.tree.committed_length
        return self.do(self.session.committed(Commit(7, position, tokens), 0.0))

    def tokens_of(self, start: StartBranch) -> list[int]:
        return list(start.tokens[len(self.prompt) :])


def started(actions: list[Action]) -> list[StartBranch]:
    return [action for action in actions if isinstance(action, StartBranch)]
