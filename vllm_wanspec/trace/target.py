"""A request as the target saw it: its steps, what arrived for them and what they waited for, from the controller's log.

It decides nothing anew: it follows the log and says what each step had and where it led.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from vllm_wanspec.core.messages import from_plain
from vllm_wanspec.core.wire import frames
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.trace.log import COMMIT, DRAFTS, NODES, OPEN, Event
from vllm_wanspec.trace.tree import WASTED, Fate, Node, TreeCopy


class Had(StrEnum):
    """What a step could verify."""

    PREFILL = "prefill"
    """It was the prompt's own."""
    FULL = "full"
    """As many drafts as were asked for."""
    SHORT = "short"
    """Some drafts."""
    BRANCH = "branch"
    """Drafts of a branch: the step before left the most probable path and met it."""
    NONE = "none"


class Outcome(StrEnum):
    """Where a step's tokens led."""

    HIT = "hit"
    """All on the most probable path."""
    CAUGHT = "caught"
    """Off the most probable path, but in the tree: a branch caught it."""
    MISS = "miss"
    """Out of the tree: another token was drafted there."""
    BEYOND = "beyond"
    """Out of the tree: nothing was drafted that far."""
    BLIND = "blind"
    """Unknown: the step before had left the tree, and nothing had come since."""
    UNLINKED = "unlinked"
    """No drafter served the request."""


@dataclass(slots=True)
class Step:
    """One step of the target for this request, from where its drafts were fixed to its commit (wall clock).

    Attributes:
        position: Length of the context before the step's tokens.
        drafted: Draft tokens verified; ``draft_nodes`` are those of them that the tree has.
        limit: Most drafts asked for.
        tokens: What the step yielded: accepted drafts and one more.
        live_nodes: Size of the tree after the commit.
        sent: Whether the commit went out to a drafter; ``received_s`` says when it came there, if known.
    """

    start_s: float
    end_s: float
    position: int
    had: Had
    outcome: Outcome
    drafted: list[int]
    limit: int
    tokens: list[int]
    accepted: int
    waited_s: float
    live_nodes: int
    sent: bool
    peer: str
    draft_nodes: list[Node] = field(default_factory=list)
    received_s: float | None = None


@dataclass(slots=True)
class Arrival:
    """A message of nodes: when it came, what became of its nodes then, and when the drafter sent it, if known."""

    at_s: float
    nodes: int
    added: int
    stale: int
    late: int
    bytes: int
    live_nodes: int
    first_id: int
    peer: str
    sent_s: float | None = None


@dataclass(slots=True)
class Wait:
    """The late rule held a step back."""

    start_s: float
    end_s: float


@dataclass(slots=True)
class Link:
    """A session on a drafter's link; ``ending`` says why it ended, and is empty while it has not."""

    drafter: str
    peer: str
    start_s: float
    position: int
    number: int | None
    end_s: float | None = None
    ending: str = ""


@dataclass(slots=True)
class Cell:
    """A committed token; ``node`` is the tree's, if there is one."""

    position: int
    token: int
    step: int
    node: Node | None


@dataclass(slots=True)
class Figures:
    """What is counted of a request. ``steps`` leaves the prefill out; ``misses`` are commits that left the tree."""

    id: str
    process: str
    drafters: list[str] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    tokens: int = 0
    first_tokens: int = 0
    steps: int = 0
    steps_without_draft: int = 0
    offered: int = 0
    accepted: int = 0
    hits: int = 0
    caught: int = 0
    misses: int = 0
    beyond: int = 0
    blind: int = 0
    waits: int = 0
    waited_s: float = 0.0
    nodes: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    first_commit_s: float = 0.0
    last_commit_s: float = 0.0

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens of a step that was not the prefill."""
        return (self.tokens - self.first_tokens) / self.steps if self.steps else None

    @property
    def ms_per_token(self) -> float | None:
        """Time between tokens, from the first commit to the last."""
        tokens = self.tokens - self.first_tokens
        return 1e3 * (self.last_commit_s - self.first_commit_s) / tokens if tokens else None

    def as_dict(self) -> dict[str, Any]:
        """Names and values, the two quotients included."""
        return {**asdict(self), "tokens_per_step": self.tokens_per_step, "ms_per_token": self.ms_per_token}


class TargetReplay:
    """Follows one request through the controller's log.

    Args:
        name: The request's id, made unique.
        begin: Its first event.
        keep: Whether to keep every step and node, or only the figures.
    """

    def __init__(self, name: str, begin: Event, *, keep: bool) -> None:
        self.figures = Figures(name, begin.process)
        self.start_s = self.end_s = begin.at_s
        self.context_length = len(begin.data["context"])
        self.steps: list[Step] = []
        self.arrivals: list[Arrival] = []
        self.waits: list[Wait] = []
        self.links: list[Link] = []
        self.nodes: list[Node] = []
        self.path: list[Cell] = []
        self.closed = False
        self._keep = keep
        self._length = self.context_length
        self._link: Link | None = None
        self._next_link: Mapping[str, str] = {}
        self._tree: TreeCopy | None = None
        self._draft: tuple[list[int], int, list[Node]] = ([], 0, [])
        self._ready_s = begin.at_s
        self._waited_s = 0.0
        self._longest = 0  # of the drafts that a device made: how many there was room for is not in the log
        self._from_branch = False
        self._steps = 0

    def follow(self, event: Event) -> None:
        """Take the next event of the request."""
        self.end_s = max(self.end_s, event.at_s)
        if event.call not in DRAFTS:
            self.figures.bytes_sent += sum(map(_size, event.data.get("out", ())))
        match event.call:
            case "link":
                self._next_link = event.data
            case "open":
                self._open(event)
            case "commit" if event.data["tokens"]:
                self._commit(event)
            case "receive":
                self._receive(event)
            case "draft":
                tokens = event.data["out"]
                nodes = self._tree.path(tokens) if self._tree is not None else []
                self._draft = (tokens, event.data["limit"], nodes)
                self._ready_s = event.at_s
            case "fall_back":
                self._draft = (event.data["out"], event.data["limit"], [])
                self._ready_s = event.at_s
            case "told":  # by a device, when the step is over: it was fixed some time after the commit before
                tokens = event.data["out"]
                self._longest = max(self._longest, len(tokens))
                self._draft = (tokens, self._longest, self._tree.path(tokens) if self._tree is not None else [])
            case "wait":
                self._wait(event)
            case "leave":  # a lost link follows, as far as the session is concerned
                self._unlink(event.at_s, "no more of its drafts can be used")
            case "link_lost":
                self._unlink(event.at_s, "link lost")
            case "close":
                self._unlink(event.at_s, "closed")
                self.closed = True

    def count_fates(self) -> dict[str, int]:
        """Nodes by what became of them, and ``drafted``, ``used`` and ``wasted`` in all."""
        counts: dict[str, int] = dict.fromkeys(Fate, 0)
        for node in self.nodes:
            counts[node.fate] += 1
        drafted = len(self.nodes) - counts[Fate.ECHO]
        wasted = sum(counts[fate] for fate in WASTED)
        return {**counts, "drafted": drafted, "used": drafted - counts[Fate.LATE] - wasted, "wasted": wasted}

    def _open(self, event: Event) -> None:
        self._unlink(event.at_s, "opened anew")
        drafter, peer = (
            event.data.get(name) or self._next_link.get(name) or unknown
            for name, unknown in (("drafter", "?"), ("peer", ""))
        )
        self._next_link = {}
        sent = next((message for message in event.data.get("out", ()) if message[0] == OPEN), None)
        self._link = Link(drafter, peer, event.at_s, self._length, sent[1] if sent else None)
        self._tree = TreeCopy(self._length, keep=self._keep)
        if self._keep:
            self.links.append(self._link)
        self.figures.peers.append(peer)
        if drafter not in self.figures.drafters:
            self.figures.drafters.append(drafter)

    def _unlink(self, at_s: float, ending: str) -> None:
        if self._link is not None:
            self._link.end_s, self._link.ending = at_s, ending
        self._link = self._tree = None

    def _wait(self, event: Event) -> None:
        waited_s = event.data["waited_s"]
        self.figures.waits += 1
        self.figures.waited_s += waited_s
        self._waited_s += waited_s
        self._ready_s = event.at_s
        if self._keep:
            self.waits.append(Wait(event.at_s - waited_s, event.at_s))

    def _receive(self, event: Event) -> None:
        message, size = event.data["message"], _size(event.data["message"])
        self.figures.bytes_received += size
        link, tree = self._link, self._tree
        if link is None or tree is None or (link.number is not None and message[1] != link.number):
            return
        if message[0] != NODES:
            self._unlink(event.at_s, f"rejected: {message[2]}")
            return
        records = message[3]
        confirmed = tree.cursor
        echoes = tree.catch_up(message[2], event.at_s, self._steps)
        drafted, appended = tree.append(records, event.at_s, self._steps)
        self.figures.nodes += len(drafted)
        if not self._keep:
            return
        nodes = echoes + drafted
        self.nodes += nodes
        for node in nodes:
            if node.fate in (Fate.ECHO, Fate.LATE) and tree.cursor is not confirmed:
                self._confirm(node)
        self.arrivals.append(
            Arrival(
                event.at_s,
                len(records),
                appended.added,
                appended.stale,
                appended.late,
                size,
                tree.size,
                records[0][0] if records else 0,
                link.peer,
            )
        )

    def _confirm(self, node: Node) -> None:
        """A token that was committed before its node came has it now."""
        cell = self.path[node.position - self.context_length - 1]
        cell.node, node.step = node, cell.step

    def _commit(self, event: Event) -> None:
        tokens: list[int] = event.data["tokens"]
        drafted, limit, draft_nodes = self._draft
        accepted = _common(drafted, tokens[:-1])
        if accepted < len(tokens) and drafted[accepted : accepted + 1] not in ([], [tokens[accepted]]):
            for node in draft_nodes[accepted:]:
                node.fate = Fate.REJECTED
        had = self._had(drafted, limit)
        start_s = min(self._ready_s, event.at_s)
        outcome = self._walk(tokens, accepted)
        sent = any(message[0] == COMMIT for message in event.data.get("out", ()))
        self._count(event.at_s, had, outcome, len(tokens), len(drafted), accepted)
        if self._keep:
            live = self._tree.size if self._tree is not None else 0
            step = Step(
                start_s, event.at_s, self._length, had, outcome, drafted, limit, tokens, accepted, self._waited_s,
                live, sent, self._link.peer if self._link is not None else "", draft_nodes,
            )  # fmt: skip
            self.steps.append(step)
        self._steps += 1
        self._length += len(tokens)
        self._draft, self._waited_s, self._ready_s = ([], 0, []), 0.0, event.at_s

    def _had(self, drafted: list[int], limit: int) -> Had:
        if not self._steps:
            return Had.PREFILL
        if not drafted:
            return Had.NONE
        if self._from_branch:
            return Had.BRANCH
        return Had.FULL if len(drafted) >= limit else Had.SHORT

    def _walk(self, tokens: list[int], accepted: int) -> Outcome:
        """Move the tree along the step's tokens, and say where that led."""
        tree = self._tree
        outcome = Outcome.UNLINKED if tree is None else Outcome.BLIND if tree.pending else Outcome.HIT
        for index, token in enumerate(tokens):
            node, best = None, None
            if tree is not None:
                best = None if tree.pending else tree.cursor.best
                node = tree.commit(token, self._steps)
            if node is not None:
                node.step = self._steps
                node.fate = Fate.FORESEEN if node is best else Fate.CAUGHT
                if index < accepted:
                    node.fate = Fate.ACCEPTED
                elif node is not best:
                    outcome = Outcome.CAUGHT
            elif outcome in (Outcome.HIT, Outcome.CAUGHT):
                outcome = Outcome.BEYOND if best is None else Outcome.MISS
            if self._keep:
                self.path.append(Cell(self._length + index + 1, token, self._steps, node))
        self._from_branch = outcome is Outcome.CAUGHT and tree is not None and bool(tree.cursor.children)
        return outcome

    def _count(self, at_s: float, had: Had, outcome: Outcome, tokens: int, offered: int, accepted: int) -> None:
        figures = self.figures
        figures.tokens += tokens
        figures.last_commit_s = at_s
        figures.offered += offered
        figures.accepted += accepted
        figures.hits += outcome is Outcome.HIT
        figures.caught += outcome is Outcome.CAUGHT
        figures.misses += outcome in (Outcome.MISS, Outcome.BEYOND)
        figures.beyond += outcome is Outcome.BEYOND
        figures.blind += outcome is Outcome.BLIND
        if had is Had.PREFILL:
            figures.first_tokens, figures.first_commit_s = tokens, at_s
        else:
            figures.steps += 1
            figures.steps_without_draft += had is Had.NONE


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def _size(message: list[Any]) -> int:
    """Bytes of a message on the wire, without those of the frames around it."""
    try:
        return sum(len(frame) - 1 for frame in frames([from_plain(message)]))
    except (RemoteProtocolError, ValueError):  # something that no wire carries, in a field that is not read here
        return 0
