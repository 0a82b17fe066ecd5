"""A `Pair` of real sessions that checks at every call what must always hold; `pair_checks` has the rules."""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pair_checks as rules
from toys import VOCAB_SIZE, toy

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.draft import NO_DRAFT, Draft
from vllm_wanspec.core.drafter import Action, DrafterSession, DraftStep, StartBranch, StopBranch
from vllm_wanspec.core.messages import Commit, Message, Nodes, Open, Reject
from vllm_wanspec.core.states import ControllerState, DrafterState
from vllm_wanspec.core.tree import main_line_tip
from vllm_wanspec.drafter.connection import Connection
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.sim import history
from vllm_wanspec.sim.history import Logs, Request
from vllm_wanspec.sim.models import Language
from vllm_wanspec.sim.pair import Pair

PROMPTS = ((7, 7, 42), (1, 2, 3, 4, 5), (9,))


@dataclass(frozen=True)
class Setup(history.Setup):
    """A history's initial conditions; each request may have as many places for branches as there are."""

    places: int = 48
    agreement: float = 0.8
    requests: int = 1
    max_branch_tokens: int = 20


class CheckedConnection(Connection):
    """The drafter's end of a link, which holds its sessions against the rules."""

    def __init__(self, world: "World") -> None:
        super().__init__(world.host)
        self.world = world
        self._watched: dict[int, tuple[DrafterSession, rules.DrafterWatch]] = {}
        self._stopped: tuple[int, int] | None = None
        self._started: list[StartBranch] = []
        self.aside: dict[int, set[int]] = {}
        """By session the ids of nodes that were not drafted at the end of its main line."""

    def check(self) -> None:
        """Everything that holds at any moment."""
        for number, session in self._sessions.items():
            rules.check_drafter(session)
            request = self.world.by_number.get(number)
            if request is not None and not self.world.poisoned:
                known = session.tree.committed_length
                assert session._context == request.context[:known]

    def reject(self, number: int, code: str) -> None:
        session = self._sessions.get(number)
        if session is not None:
            self._do(number, [*session.close(self.world.now_s), Reject(number, code)])

    def late_output(self) -> None:
        """A branch that was stopped can still have given a token: nobody wants it."""
        if self._stopped is None:
            return
        number, branch = self._stopped
        self._stopped = None
        session = self._sessions.get(number)
        if session is not None:
            nodes = session.tree.size
            assert session.drafted(branch, [self.world.language.step([1])], self.world.now_s) == []
            assert session.ended(branch, self.world.now_s) == []
            assert session.tree.size == nodes

    def resize(self, width: int) -> None:
        super().resize(width)
        for session in self._sessions.values():
            assert session.width == max(1, min(width, session.limits.running_branches))

    def drafted(self, number: int, branch: int, steps: Sequence[DraftStep]) -> None:
        session = self._sessions.get(number)
        if session is None:
            return
        beside, first = branch != _main_branch(session), session.tree.last_id + 1
        super().drafted(number, branch, steps)
        if beside:
            self.aside.setdefault(number, set()).update(range(first, session.tree.last_id + 1))

    def ended(self, number: int, branch: int) -> None:
        super().ended(number, branch)
        assert number in self._sessions  # it has given tokens: no reason to reject

    def _session_settings(self) -> dict[str, Any]:
        return {**super()._session_settings(), "max_branch_tokens": self.world.setup.max_branch_tokens}

    def _new_session(self, opened: Open) -> DrafterSession:
        session = super()._new_session(opened)
        self._watched[opened.session] = (session, rules.DrafterWatch(session))
        return session

    def _take(self, message: Message) -> None:
        """Follow a commit: a branch that becomes the main line goes on, it is not asked for again."""
        session = self._sessions.get(message.session) if isinstance(message, Commit) else None
        if session is None:
            super()._take(message)
            return
        before = _main_branch(session)
        running = set(session.running)
        self._started.clear()
        super()._take(message)
        main = _main_branch(session)
        if main is not None and main != before and main in running:
            tip = main_line_tip(session.tree)
            assert not any(start.node == tip.id for start in self._started)
            assert before is None or before not in session.running
            self.world.seen["promoted branch"] += 1

    def _do(self, number: int, actions: list[Action]) -> None:
        """Carry out what a session wants, and hold it against the rules."""
        session, watch = self._watched[number]
        for action in actions:
            match action:
                case StartBranch():
                    rules.check_start(session, action, self.world.setup.max_context)
                    self._started.append(action)
                case StopBranch(branch=branch):
                    self._stopped = (number, branch)
                case Nodes():
                    watch.sent(session, action)
        super()._do(number, actions)
        self.world.seen["budget stop"] += watch.after(session, [b for n, b in self._handles if n == number])
        if number not in self._sessions:
            assert session.state is DrafterState.ENDED


class World(Pair):
    """Both sides, held against the rules, and what is done to them that no network and no process does."""

    setup: Setup
    connection: CheckedConnection | None

    def __init__(self, setup: Setup, logs: Logs | None = None, language: Language | None = None) -> None:
        self.poisoned = False
        self._posted: Message | None = None
        super().__init__(language or toy(setup.seed, setup.agreement), setup, PROMPTS[: setup.requests], logs)

    # The rules

    def called(self, session: ControllerSession) -> AbstractContextManager[object]:
        return rules.controller_call(session)

    def drafted(self, request: Request, draft: list[int], limit: int, expected: float) -> None:
        assert len(draft) <= limit
        assert 0.0 <= expected <= len(draft)
        if self.poisoned:
            assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in draft)
        else:
            # Exactly what the draft model says after the committed context: nothing of an older one slips through.
            assert draft == self.language.drafted(request.context, len(draft))

    def rejected(self, request: Request, message: Reject) -> None:
        assert request.session.state is ControllerState.UNSERVED
        assert request.bar.holds(self.now_s)
        assert request.bar.lasts == (message.code in ("too_long", "vocabulary"))

    def post(self, request: Request, message: Message) -> None:
        if isinstance(message, Open):
            assert message.tokens == tuple(request.context)
        self._posted = message
        super().post(request, message)

    def broken(self, error: RemoteProtocolError) -> None:
        if not self.poisoned:
            raise error
        self.seen["poison refused"] += 1
        self.disconnect()
        self.connect()

    def new_connection(self) -> Connection:
        return CheckedConnection(self)

    def exchange(self) -> None:
        if self.connection is not None:
            self.connection.late_output()
        super().exchange()

    def commit(self, request: Request, tokens: list[int], draft: Draft = NO_DRAFT) -> None:
        counters, session = self.shared.counters, request.session
        hits_in_branches, number = counters.branch_hits, request.number
        self._posted = None
        accepted = rules.accepted(counters) + (len(tokens) - 1 if draft.tokens else 0)
        if draft.drafted and self.connection is not None and not self.poisoned:
            rules.check_sources(session, draft, self.connection.aside.get(number or 0, set()))
        super().commit(request, tokens, draft)
        assert rules.accepted(counters) == accepted
        assert session.length == len(request.context)
        if counters.branch_hits > hits_in_branches and session.tree is not None:
            self.seen["drafts right after a re-root"] += bool(session.tree.best_path(1))
        assert isinstance(self._posted, Commit) == (number is not None)
        if number is not None:
            assert self._posted == Commit(number, len(request.context) - len(tokens), tuple(tokens))

    def begin_again(self, request: Request) -> None:
        session = request.session
        super().begin_again(request)
        assert session.state is ControllerState.CLOSED

    def disconnect(self) -> None:
        super().disconnect()
        assert self.host.running == self.host.engine.running == 0
        self.poisoned = False

    def restart_drafter(self) -> None:
        super().restart_drafter()
        self.poisoned = False

    def check(self) -> None:
        """Everything that holds at any moment."""
        for request in self.requests:
            rules.check_controller(request.session, self.setup.limits.max_nodes, len(request.context))
            linked = request.session.state in (ControllerState.SERVED, ControllerState.BLIND)
            assert (request.number is not None) == linked
        if self.connection is not None:
            self.connection.check()

    def totals(self) -> Counter[str]:
        """What this history has seen."""
        return self.seen + self.counts()

    # Disturbances

    def commit_again(self, request: Request, count: int) -> None:
        """The last tokens once more: a commit may repeat, as a whole or in part, what is known."""
        if request.number is not None and count:
            self.seen["repeated commits"] += 1
            position = max(request.session.tree.committed_length - count, 0) if request.session.tree else 0
            super().post(request, Commit(request.number, position, tuple(request.context[position:])))

    def resize_each(self, width: int) -> None:
        """Places for each request to run so many branches."""
        self.resize(width * len(self.requests))

    def feed_drafter(self, frame: bytes) -> bool:
        """A frame that no correct controller sends; whether it was refused."""
        return self._feed(frame, self.connection.receive if self.connection is not None else self.deliver)

    def feed_controller(self, frame: bytes) -> bool:
        """A frame that no correct drafter sends; whether it was refused."""
        return self._feed(frame, self.deliver)

    def _feed(self, frame: bytes, receive: Any) -> bool:
        self.poisoned = True
        try:
            receive(frame)
        except RemoteProtocolError:
            self.seen["garbage refused"] += 1
            return True
        self.seen["garbage accepted"] += 1
        return False


def sessions_of(world: World) -> dict[int, DrafterSession]:
    """The drafter's sessions, by number."""
    assert world.connection is not None
    return world.connection._sessions


def _main_branch(session: DrafterSession) -> int | None:
    """The branch that extends the most probable continuation."""
    tip = main_line_tip(session.tree)
    return next((branch.number for branch in session._running.values() if branch.tip is tip), None)
