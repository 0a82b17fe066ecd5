"""A session as the drafter saw it: which branches ran when, and which commits came in, from the drafter's log."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_wanspec.trace.log import NODES, REJECT, Event
from vllm_wanspec.trace.tree import TreeCopy


@dataclass(slots=True)
class Branch:
    """An engine request of a session.

    Attributes:
        node: Id of the node that it extends.
        main: Whether that was the end of the most probable path.
        lane: Where to draw it: 0 is the main line's, and no two overlap in one.
        tokens: How many it gave.
        ending: ``stopped``, ``finished`` or ``failed``; empty while it runs.
        promoted_s: When the most probable path began to end in it, if it was not the main line from the start.
    """

    number: int
    start_s: float
    node: int
    main: bool
    lane: int
    tokens: int = 0
    end_s: float | None = None
    ending: str = ""
    promoted_s: float | None = None


@dataclass(slots=True)
class Receipt:
    """A commit that came in; ``opening`` where all of it is of the context that the session opened with."""

    at_s: float
    position: int
    tokens: int
    opening: bool


@dataclass(slots=True)
class Rejection:
    """The drafter gave the session up."""

    at_s: float
    code: str


class SessionReplay:
    """Follows one session through the drafter's log.

    Args:
        key: The session's key, which the controller's log knows as its peer.
        opened: Its first event.
    """

    def __init__(self, key: str, opened: Event) -> None:
        self.key = key
        self.process = opened.process
        self.start_s = self.end_s = opened.at_s
        self.branches: list[Branch] = []
        self.receipts: list[Receipt] = []
        self.rejections: list[Rejection] = []
        self.sent_s: dict[int, float] = {}
        _, _, tokens, _, length, *_ = opened.data["message"]
        self._length = self._opened_length = length or len(tokens)
        self._tree = TreeCopy(self._length, keep=False)
        self._running: dict[int, Branch] = {}
        self._tips: dict[int, int] = {}
        self._lanes: list[float] = [float("-inf")]
        self.follow(opened)

    @property
    def passes(self) -> int:
        """Tokens that the draft engine gave: its forward passes, counted per branch."""
        return sum(branch.tokens for branch in self.branches)

    def follow(self, event: Event) -> None:
        """Take the next event of the session."""
        at_s = self.end_s = event.at_s
        if event.call == "commit":
            self._commit(at_s, event.data["message"])
        elif event.call == "ended":
            self._end(event.data["branch"], at_s, "finished")
        elif event.call in ("close", "failed"):
            for number in list(self._running):
                self._end(number, at_s, "stopped" if event.call == "close" else "failed")
        for action in event.data.get("out", ()):
            self._act(at_s, action)
        if event.call == "drafted":
            self._drafted(event.data["branch"], event.data["steps"])
        self._promote(at_s)

    def shift(self, by_s: float) -> None:
        """Move all times."""
        self.start_s += by_s
        self.end_s += by_s
        self.sent_s = {number: at_s + by_s for number, at_s in self.sent_s.items()}
        for receipt in self.receipts:
            receipt.at_s += by_s
        for rejection in self.rejections:
            rejection.at_s += by_s
        for branch in self.branches:
            branch.start_s += by_s
            branch.end_s = None if branch.end_s is None else branch.end_s + by_s
            branch.promoted_s = None if branch.promoted_s is None else branch.promoted_s + by_s

    def _commit(self, at_s: float, message: Sequence[Any]) -> None:
        _, _, position, tokens, *_ = message
        opening = position + len(tokens) <= self._opened_length
        self.receipts.append(Receipt(at_s, position, len(tokens), opening))
        for token in tokens[max(0, self._length - position) :]:
            self._tree.commit(token, 0)
        self._length = max(self._length, position + len(tokens))
        self._tree.catch_up(self._length, at_s, 0)

    def _act(self, at_s: float, action: Sequence[Any]) -> None:
        match action[0]:
            case "start":
                self._start(at_s, action[1], action[2])
            case "stop":
                self._end(action[1], at_s, "stopped")
            case kind if kind == NODES:
                self._tree.append(action[3], at_s, 0)
                self.sent_s.update((record[0], at_s) for record in action[3])
            case kind if kind == REJECT:
                self.rejections.append(Rejection(at_s, action[2]))

    def _start(self, at_s: float, number: int, node: int) -> None:
        main = node in self._best()
        lane = self._lane(at_s, main)
        branch = Branch(number, at_s, node, main, lane)
        self.branches.append(branch)
        self._lanes[lane] = float("inf")
        self._running[number] = branch
        self._tips[number] = node

    def _lane(self, at_s: float, main: bool) -> int:
        """The first free lane; the main line's is kept free for it."""
        free = (lane for lane in range(0 if main else 1, len(self._lanes)) if self._lanes[lane] <= at_s)
        lane = next(free, len(self._lanes))
        if lane == len(self._lanes):
            self._lanes.append(at_s)
        return lane

    def _end(self, number: int, at_s: float, ending: str) -> None:
        branch = self._running.pop(number, None)
        if branch is not None:
            branch.end_s, branch.ending = at_s, ending
            self._lanes[branch.lane] = at_s

    def _drafted(self, number: int, steps: Iterable[Sequence[Any]]) -> None:
        branch = self._running.get(number)
        for token, *_ in steps:
            tip = self._tree.find(self._tips.get(number, -1))
            child = tip.children.get(token) if tip is not None else None
            if child is not None:
                self._tips[number] = child.id
            if branch is not None:
                branch.tokens += 1

    def _promote(self, at_s: float) -> None:
        best = self._best()
        for number, branch in self._running.items():
            if not branch.main and branch.promoted_s is None and self._tips[number] in best:
                branch.promoted_s = at_s

    def _best(self) -> set[int]:
        return {self._tree.cursor.id, *(node.id for node in self._tree.best_path())}
