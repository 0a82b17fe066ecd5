"""The drafter's half of the pair: real sessions, and a toy engine that gives each branch some tokens per tick."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import pair_checks as rules
from toys import VOCAB_SIZE, Toy, draft_model

from vllm_wanspec.core.drafter import Action, DrafterSession, DraftStep, StartBranch, StopBranch
from vllm_wanspec.core.events import RecordedDrafterSession
from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.messages import Close, Commit, Message, Nodes, Open, Ping, Pong, Reject, decode
from vllm_wanspec.core.states import DrafterState
from vllm_wanspec.core.tree import main_line_tip
from vllm_wanspec.drafter.connection import gathered
from vllm_wanspec.errors import RemoteProtocolError

if TYPE_CHECKING:
    from pair import World

MODEL = draft_model()


class CachedToy(Toy):
    """A `Toy` that remembers its answers, which depend on a context's length and last tokens alone."""

    def __init__(self, seed: int, agreement: float) -> None:
        super().__init__(seed, agreement=agreement)
        self._targets: dict[tuple[int, ...], int] = {}
        self._steps: dict[tuple[int, ...], DraftStep] = {}

    @staticmethod
    @cache
    def of(seed: int, agreement: float) -> "CachedToy":
        """One for all histories that ask for the same."""
        return CachedToy(seed, agreement)

    def target(self, context: Sequence[int]) -> int:
        key = (len(context), *context[-3:])
        if key not in self._targets:
            self._targets[key] = super().target(context)
        return self._targets[key]

    def step(self, context: Sequence[int]) -> DraftStep:
        key = (len(context), *context[-3:])
        if key not in self._steps:
            self._steps[key] = super().step(context)
        return self._steps[key]


@dataclass(slots=True)
class Running:
    """An engine request: its context so far, and how many tokens it will still give."""

    context: list[int]
    left: int


class ToyDrafter:
    """One connection's sessions over the toy engine; a stand-in for the service's `Connection`, without asyncio."""

    def __init__(self, world: "World", *, name: str) -> None:
        self.world, self.name = world, name
        self.sessions: dict[int, DrafterSession] = {}
        self.branches: dict[tuple[int, int], Running] = {}
        self._calibration = Calibration()
        self._last_number = 0
        self._watched: dict[int, rules.DrafterWatch] = {}
        self._outbox: list[Message] = []
        self._stopped: tuple[int, int] | None = None

    @property
    def seen(self) -> Counter[str]:
        return self.world.seen

    def receive(self, frame: bytes) -> None:
        for message in decode(frame):
            self.take(message)

    def take(self, message: Message) -> None:
        match message:
            case Open():
                self._open(message)
            case Commit(session=number):
                if number in self.sessions:
                    self._committed(number, message)
                elif number > self._last_number:
                    raise RemoteProtocolError(f"commit to session {number}, which was never opened")
            case Close(session=number):
                self._end(number)
            case Ping(sent_us=sent_us):
                self._outbox.append(Pong(sent_us))
            case _:
                raise RemoteProtocolError(f"unexpected {type(message).__name__.lower()} message")

    def tick(self, burst: int) -> None:
        """The engine gives each branch up to ``burst`` tokens."""
        self._late_output()
        random = self.world.rng.random
        for key in list(self.branches):
            number, branch = key
            running = self.branches.get(key)
            count = int(random() * (burst + 1)) if burst > 1 else random() < 0.85
            if running is None or not count:
                continue
            steps = []
            for _ in range(min(count, running.left)):
                steps.append(self.world.toy.step(running.context))
                running.context.append(steps[-1].token)
            running.left -= len(steps)
            self.do(number, self.sessions[number].drafted(branch, steps, self.world.now_s))
            if running.left == 0 and key in self.branches:
                del self.branches[key]
                self.do(number, self.sessions[number].ended(branch, self.world.now_s))
                assert number in self.sessions  # it has given tokens: no reason to reject

    def flush(self) -> None:
        if self._outbox:
            self.world.down.send(self.world.now, gathered(self._outbox))
            self._outbox = []

    def fail_engine(self) -> None:
        """All that runs ends in an error."""
        for number, branch in list(self.branches):
            if self.branches.pop((number, branch), None) is not None:
                self.do(number, self.sessions[number].failed(self.world.now_s))

    def reject(self, number: int, code: str) -> None:
        if number in self.sessions:
            self.do(number, [*self.sessions[number].close(self.world.now_s), Reject(number, code)])

    def resize(self) -> None:
        for number, session in list(self.sessions.items()):
            self.do(number, session.resize(self.world.width, self.world.now_s))
            assert session.width == max(1, min(self.world.width, session.limits.running_branches))

    def close(self) -> None:
        for number in list(self.sessions):
            self._end(number)
        assert not self.branches

    def check(self) -> None:
        for number, session in self.sessions.items():
            rules.check_drafter(session)
            request = self.world.by_number.get(number)
            if request is not None and not self.world.poisoned:
                known = session.tree.committed_length
                assert session._context == request.context[:known]

    def do(self, number: int, actions: list[Action]) -> None:
        """Carry out what a session wants, and hold it against the rules."""
        session, watch = self.sessions[number], self._watched[number]
        for action in actions:
            match action:
                case StartBranch():
                    rules.check_start(session, action, self.world.setup.max_context)
                    self.branches[number, action.branch] = Running(list(action.tokens), action.max_tokens)
                    self.seen["requests"] += 1
                case StopBranch(branch=branch):
                    # A branch that has just given its last tokens is stopped too: there is nothing left to stop then.
                    self.branches.pop((number, branch), None)
                    self._stopped = (number, branch)
                case Nodes():
                    watch.sent(session, action)
                    self._outbox.append(action)
                case Reject():
                    self.sessions.pop(number)
                    self._outbox.append(action)
        self.seen["budget stop"] += watch.after(session, [b for n, b in self.branches if n == number])
        if number not in self.sessions:
            assert session.state is DrafterState.ENDED

    def _open(self, opened: Open) -> None:
        number = opened.session
        if number <= self._last_number:
            raise RemoteProtocolError(f"session number {number} does not rise above {self._last_number}")
        self._last_number = number
        max_context = self.world.setup.max_context
        if len(opened.tokens) > max_context:
            self._outbox.append(Reject(number, "too_long"))
        elif max(opened.tokens) >= VOCAB_SIZE:
            self._outbox.append(Reject(number, "vocabulary"))
        elif opened.limits.max_nodes > MODEL.max_nodes:
            raise RemoteProtocolError(f"session {number} wants {opened.limits.max_nodes} nodes")
        else:
            session = self.sessions[number] = self._new_session(opened, max_context)
            self._watched[number] = rules.DrafterWatch(session)
            self.do(number, session.start(self.world.now_s))
            self.do(number, session.resize(self.world.width, self.world.now_s))

    def _new_session(self, opened: Open, max_context: int) -> DrafterSession:
        settings = {
            "vocab_size": VOCAB_SIZE,
            "max_context": max_context,
            "max_branch_tokens": self.world.setup.max_branch_tokens,
            "width": 1,
            "calibration": self._calibration,
        }
        logs = self.world.logs
        if logs is None:
            return DrafterSession(opened, **settings)
        return RecordedDrafterSession(opened, key=f"{self.name}#{opened.session}", sink=logs.drafter.append, **settings)

    def _committed(self, number: int, commit: Commit) -> None:
        """Follow a commit; a branch that becomes the main line goes on, it is not asked for again."""
        session = self.sessions[number]
        before = _main_branch(session)
        running = set(session.running)
        actions = session.committed(commit, self.world.now_s)
        main = _main_branch(session)
        if main is not None and main != before and main in running:
            tip = main_line_tip(session.tree)
            assert not any(isinstance(action, StartBranch) and action.node == tip.id for action in actions)
            assert before is None or before not in session.running
            self.seen["promoted branch"] += 1
        self.do(number, actions)

    def _late_output(self) -> None:
        """A branch that was stopped can still have given a token: nobody wants it."""
        if self._stopped is None:
            return
        number, branch = self._stopped
        self._stopped = None
        session = self.sessions.get(number)
        if session is not None:
            nodes = session.tree.size
            assert session.drafted(branch, [self.world.toy.step([1])], self.world.now_s) == []
            assert session.ended(branch, self.world.now_s) == []
            assert session.tree.size == nodes

    def _end(self, number: int) -> None:
        session = self.sessions.get(number)
        if session is not None:
            self.do(number, session.close(self.world.now_s))
            del self.sessions[number], self._watched[number]
            assert session.state is DrafterState.ENDED


def _main_branch(session: DrafterSession) -> int | None:
    """The branch that extends the most probable continuation."""
    tip = main_line_tip(session.tree)
    return next((branch.number for branch in session._running.values() if branch.tip is tip), None)
