"""Connection: one controller's sessions, from its frames to their drafts, over a host.

What the engine and the controller say changes sessions; the nodes that follow wait in the connection's outbox until
its writer takes them, several sessions' nodes in one frame.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace

from vllm_wanspec.core.drafter import Action, DrafterSession, DraftStep, StartBranch, StopBranch
from vllm_wanspec.core.events import RecordedDrafterSession
from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.messages import (
    MAX_NODES_PER_MESSAGE,
    PROTOCOL_VERSION,
    Close,
    Commit,
    Drain,
    Have,
    Hello,
    Message,
    Nodes,
    Open,
    Ping,
    Pong,
    Refuse,
    Reject,
    Resumed,
    Want,
    Welcome,
)
from vllm_wanspec.core.vocabulary import Tokens
from vllm_wanspec.core.wire import Sender, decode, frames, greeting
from vllm_wanspec.drafter.admission import DRAINING, SESSION_IDLE_S, SESSIONS
from vllm_wanspec.drafter.host import Host
from vllm_wanspec.errors import RemoteProtocolError

logger = logging.getLogger("vllm.wanspec.drafter")

MAX_OUTBOX = 16384


class Connection:
    """One controller's connection.

    Feed it with `receive` and put on the wire what `frames` gives. Where one of them raises or refuses the connection
    ends, and `end` then stops everything that the engine still does for it.

    Attributes:
        client_name: Under which name its tokens are counted; whoever lets it in knows.
    """

    def __init__(self, host: Host, wake: Callable[[], None] = lambda: None, client_name: str = "") -> None:
        """Serve from ``host``; ``wake`` is called when there is something to send."""
        self._host = host
        self._model = host.model
        self._wake = wake
        self._calibration = Calibration()
        self.client_name = client_name
        self._client = ""
        self._sessions: dict[int, DrafterSession] = {}
        self._heard_s: dict[int, float] = {}
        self._width = 0
        self._last_number = 0
        self._handles: dict[tuple[int, int], int] = {}
        self._outbox: list[Message] = []
        self._greeted = False
        host.connections.add(self)

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    @property
    def running(self) -> int:
        """Branches that the engine is extending, or will when it is their turn."""
        return len(self._handles)

    def receive(self, frame: bytes) -> bool:
        """Take one frame; False when the controller was refused and the connection should end.

        Raises:
            RemoteProtocolError: No correct controller sends that, or it sends without reading. Its sessions' lookahead
                bounds what one message can put into the outbox, so checking here bounds the outbox.
        """
        if len(self._outbox) >= MAX_OUTBOX:
            raise RemoteProtocolError(f"the controller does not read: {MAX_OUTBOX} messages wait for it")
        self._expire()
        if not self._greeted:
            return self._greet(frame)
        for message in decode(frame, Sender.CONTROLLER):
            self._take(message)
        return True

    def frames(self) -> list[bytes]:
        """What is to be sent now."""
        batch, self._outbox = self._outbox, []
        return list(frames(gathered(batch)))

    def resize(self, width: int) -> None:
        """Let each session run ``width`` branches."""
        if width == self._width:
            return
        self._width = width
        for number, session in list(self._sessions.items()):
            if session.width != min(width, session.limits.running_branches):
                self._do(number, session.resize(width, self._host.now()))

    def drafted(self, number: int, branch: int, steps: Sequence[DraftStep]) -> None:
        """The engine gave tokens for a session's branch."""
        session = self._sessions.get(number)
        if session is not None:
            self._do(number, session.drafted(branch, steps, self._host.now()))

    def ended(self, number: int, branch: int) -> None:
        """The engine has given all that a session's branch asked for."""
        session = self._sessions.get(number)
        if session is not None:
            self._do(number, session.ended(branch, self._host.now()))

    def failed(self, number: int, branch: int, reason: str) -> None:
        """The engine cannot serve a session's branch."""
        session = self._sessions.get(number)
        if session is not None and branch in session.running:
            self._host.complain(reason)
            self._do(number, session.failed(self._host.now()))

    def forget(self, number: int, branch: int) -> None:
        """The engine is through with a session's branch."""
        del self._handles[number, branch]

    def end(self) -> list[int]:
        """End all sessions; the handles of the branches that the engine still has.

        Their contexts are kept for a while: their controller may come back.
        """
        self._host.connections.discard(self)  # nobody's share goes to sessions that are about to end
        for number, session in list(self._sessions.items()):
            self._host.kept.keep(self._kept_under(self._client), number, session.context, self._host.now())
            self._end(number)
        self._host.left(self)
        return list(self._handles.values())

    def drain(self) -> None:
        """No new sessions are taken here: tell the controller."""
        self._post(Drain())

    def dismiss(self) -> int:
        """End all sessions, and tell the controller; how many there were."""
        numbers = list(self._sessions)
        for number in numbers:
            self._end(number)
            self._reject(number, "overloaded", DRAINING)
        return len(numbers)

    def _greet(self, frame: bytes) -> bool:
        _, version = greeting(frame)
        if version not in (None, PROTOCOL_VERSION):
            self._post(Refuse("version", f"this drafter speaks version {PROTOCOL_VERSION}, not {version}"))
            return False
        [message] = decode(frame, Sender.CONTROLLER)
        if not isinstance(message, Hello):
            raise RemoteProtocolError("the first message is not hello")
        model = self._model
        refusal: Refuse | None = None
        if not self._same_vocabulary(message):
            ours = Tokens(model.tokens, message.apart)
            first = ours.first_difference(message.digests)
            tokens = () if first is None else ours.chunk(first)
            reason = f"the tokenizer of {model.name} maps ids to other tokens than the target's"
            refusal = Refuse("vocabulary", reason, first or 0, tokens)
        answer: Message = refusal or Welcome(
            PROTOCOL_VERSION,
            model.name,
            model.vocab_size,
            message.fingerprint,
            model.max_sessions,
            model.max_nodes,
            model.max_context,
            self._host.load,
        )
        self._greeted = refusal is None
        self._client = message.client
        self._post(answer)
        if self._greeted and self._host.draining:
            self.drain()
        return self._greeted

    def _same_vocabulary(self, hello: Hello) -> bool:
        """Whether ids mean the same on both sides, but for those that the controller never sends."""
        if hello.fingerprint == self._model.fingerprint:
            return True
        return bool(hello.apart) and hello.fingerprint == Tokens(self._model.tokens, hello.apart).fingerprint

    def _take(self, message: Message) -> None:
        match message:
            case Open():
                self._open(message)
            case Commit(session=number):
                session = self._sessions.get(number)
                if session is not None:
                    self._commit(session, message)
                elif number > self._last_number:
                    raise RemoteProtocolError(f"commit to session {number}, which was never opened")
            case Want(session=number):
                session = self._sessions.get(number)
                if session is not None:
                    self._do(number, session.wanted(message.tokens, self._host.now()))
            case Close(session=number):
                self._end(number)
            case Ping(number=number):
                self._post(Pong(number, self._host.load))
            case _:
                raise RemoteProtocolError(f"unexpected {type(message).__name__.lower()} message")

    def _open(self, opened: Open) -> None:
        number, model = opened.session, self._model
        if number <= self._last_number:
            raise RemoteProtocolError(f"session number {number} does not rise above {self._last_number}")
        self._last_number = number
        if opened.limits.max_nodes > model.max_nodes:
            raise RemoteProtocolError(f"session {number} wants {opened.limits.max_nodes} nodes of {model.max_nodes}")
        if opened.total > model.max_context:
            self._reject(number, "too_long")
        elif len(self._sessions) >= model.max_sessions:
            self._reject(number, "overloaded", SESSIONS)
        elif why := self._host.refusal(opened.total):
            self._reject(number, "overloaded", why)
        elif max(opened.tokens, default=0) >= model.vocab_size:
            self._reject(number, "vocabulary")
        else:
            self._begin(opened)

    def _begin(self, opened: Open) -> None:
        number, now = opened.session, self._host.now()
        if opened.resumes is not None:
            opened = self._resumed(opened, opened.resumes, now)
        session = self._sessions[number] = self._new_session(opened)
        self._heard_s[number] = now
        self._host.opened(self, number, opened.total)
        self._do(number, session.start(now))
        self._width = 0  # which the new one has not got yet
        self._host.share()

    def _commit(self, session: DrafterSession, commit: Commit) -> None:
        """Follow a commit, and count the tokens in it that had been drafted: all new ones that did not become nodes."""
        number, tree, now = commit.session, session.tree, self._host.now()
        known, last_id = tree.committed_length, tree.last_id
        del self._heard_s[number]
        self._heard_s[number] = now  # the last one now
        actions = session.committed(commit, now)
        new = tree.committed_length - known
        self._host.used[self.client_name] += new - (tree.last_id - last_id)
        self._host.grew(self, number, new)
        self._do(number, actions)
        main = session.main_branch  # perhaps a side branch until now
        if main is not None:
            self._host.lead(self._handles.get((number, main), 0))

    def _expire(self) -> None:
        """End sessions of which nothing was said for long: those heard of longest ago are the first."""
        oldest_s = self._host.now() - SESSION_IDLE_S
        while self._heard_s and next(iter(self._heard_s.values())) < oldest_s:
            number = next(iter(self._heard_s))
            self._host.expired += 1
            self._end(number)
            self._reject(number, "unknown")

    def _resumed(self, opened: Open, resumes: Resumed, now: float) -> Open:
        """The same with what is kept of its context; the controller is told how much that is."""
        kept = self._host.kept.take(self._kept_under(resumes.client), resumes.session, now)[: opened.total]
        self._post(Have(opened.session, len(kept)))
        return replace(opened, tokens=tuple(kept), length=opened.total, resumes=None)

    def _kept_under(self, client: str) -> str:
        """Under what a connection's contexts are kept: no client gets those of another's token."""
        return client and f"{self.client_name} {client}"

    def _session_settings(self) -> dict[str, Any]:
        """What the drafter decides of its sessions; see `DrafterSession`."""
        return {
            "vocab_size": self._model.vocab_size,
            "max_context": self._model.max_context,
            "calibration": self._calibration,
            "width": 1,  # until all have their share
        }

    def _new_session(self, opened: Open) -> DrafterSession:
        settings = self._session_settings()
        sink = self._host.sink
        if sink is None:
            return DrafterSession(opened, **settings)
        return RecordedDrafterSession(opened, key=f"{self._client}#{opened.session}", sink=sink, **settings)

    def _do(self, number: int, actions: list[Action]) -> None:
        session = self._sessions.get(number)
        for action in actions:
            match action:
                case StartBranch(branch=branch):
                    main = session is not None and session.main_branch == branch
                    self._handles[number, branch] = self._host.start(self, number, action, main=main)
                case StopBranch(branch=branch):
                    self._host.stop(self._handles.get((number, branch), 0))
                case Reject(code=code):
                    self._forget_session(number)
                    self._reject(number, code)
                case _:
                    self._post(action)

    def _end(self, number: int) -> None:
        session = self._sessions.get(number)
        if session is not None:
            self._do(number, session.close(self._host.now()))
            self._forget_session(number)

    def _forget_session(self, number: int) -> None:
        if self._sessions.pop(number, None) is not None:
            del self._heard_s[number]
            self._host.closed(self, number)

    def _reject(self, number: int, code: str, why: str = "") -> None:
        """Tell that a session is refused or over, and count it."""
        self._host.rejects[f"{code}/{why}" if why else code] += 1
        self._post(Reject(number, code))

    def _post(self, message: Message) -> None:
        """Queue a message for the writer."""
        self._outbox.append(message)
        self._wake()


def gathered(messages: Sequence[Message]) -> list[Message]:
    """The same messages with each session's successive nodes in one: one engine step gives every branch its own."""
    result: list[Message] = []
    last: dict[int, int] = {}
    for message in messages:
        if isinstance(message, Nodes):
            place = last.get(message.session)
            known = result[place] if place is not None else None
            if place is not None and isinstance(known, Nodes) and known.seen == message.seen:
                nodes = known.nodes + message.nodes
                if len(nodes) <= MAX_NODES_PER_MESSAGE:
                    result[place] = Nodes(known.session, known.seen, nodes)
                    continue
            last[message.session] = len(result)
        result.append(message)
    return result
