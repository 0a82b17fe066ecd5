"""Outbox: what waits to be sent on one link, and in which order it goes.

Whatever a session says goes in its own order, and nothing of it before its context; between sessions short messages
pass long contexts, which travel in pieces and take turns. A session that is closed before it has begun is never sent.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vllm_wanspec.core.messages import (
    MAX_COMMIT_TOKENS,
    Close,
    Commit,
    Have,
    Message,
    Open,
    Want,
    pieces,
    rest_of,
    weight,
)
from vllm_wanspec.errors import RemoteProtocolError

MAX_WAITING = 65536
"""Messages; more wait for nobody who reads."""


@dataclass(slots=True)
class _Upload:
    """A context on its way: what is still to be sent of it (None: the drafter has yet to say), and what comes after."""

    opened: Open
    parts: Iterator[Open | Commit] | None
    begun: bool = False
    held: list[Message] = field(default_factory=list)


class Outbox:
    """Filled from any thread, emptied by the link's own."""

    def __init__(self) -> None:
        """Start empty."""
        self._messages: deque[Message | int] = deque()
        self._opens: dict[int, Open] = {}
        self._uploads: dict[int, _Upload] = {}
        self._served: set[int] = set()

    @property
    def overflows(self) -> bool:
        """Whether more waits than ever should."""
        return len(self._messages) > MAX_WAITING

    @property
    def context_tokens(self) -> int:
        """Tokens of the contexts that wait to be sent or are on their way."""
        uploads = [upload.opened for upload in list(self._uploads.values())]
        return sum(opened.total for opened in [*list(self._opens.values()), *uploads])

    def __bool__(self) -> bool:
        """Whether anything can be sent now."""
        return bool(self._messages) or any(upload.parts is not None for upload in self._uploads.values())

    def put(self, message: Message) -> None:
        """Add a message."""
        if isinstance(message, Open):
            self._opens[message.session] = message
            self._messages.append(message.session)
        elif not isinstance(message, Close) or self._opens.pop(message.session, None) is None:
            self._messages.append(message)

    def extend(self, commits: Iterable[Message]) -> None:
        """Add what sessions that have been opened go on with: on the serving path, so that it is one call."""
        self._messages.extend(commits)

    def clear(self) -> None:
        """Forget everything: the connection is another."""
        self._messages.clear()
        self._opens.clear()
        self._uploads.clear()
        self._served.clear()

    def take(self) -> list[Message]:
        """What goes next: all that is short, and some pieces of contexts."""
        batch: list[Message] = []
        for _ in range(len(self._messages)):
            message = self._messages.popleft()
            if isinstance(message, int):
                opened = self._opens.pop(message, None)
                if opened is not None:
                    self._uploads[message] = _Upload(opened, pieces(opened))
            elif isinstance(message, Commit | Close | Want):
                self._sort(message, batch)
            else:
                batch.append(message)
        self._add_pieces(batch)
        return batch

    def resume(self, have: Have) -> None:
        """Go on with a context of which the drafter has the first tokens.

        Raises:
            RemoteProtocolError: It cannot have so many, or was not asked.
        """
        upload = self._uploads.get(have.session)
        if upload is None:
            if have.session in self._served:
                raise RemoteProtocolError(f"says what it has of session {have.session}, which does not resume")
            return  # closed meanwhile
        opened = upload.opened
        if upload.parts is not None or have.position > opened.total:
            raise RemoteProtocolError(f"has {have.position} tokens of session {have.session}'s {opened.total}")
        upload.parts = rest_of(opened.session, opened.tokens, have.position, opened.total)

    def forget(self, session: int) -> None:
        """The drafter has rejected a session: nothing more of it is sent."""
        self._uploads.pop(session, None)
        self._served.discard(session)

    def _sort(self, message: Commit | Close | Want, batch: list[Message]) -> None:
        """Put a session's message where it belongs."""
        number = message.session
        upload = self._uploads.get(number)
        if isinstance(message, Close):
            if number in self._served or (upload is not None and upload.begun):
                batch.append(message)
            self._uploads.pop(number, None)
            self._served.discard(number)
        elif upload is not None:
            upload.held.append(message)
        elif number in self._served:
            batch.append(message)

    def _add_pieces(self, batch: list[Message]) -> None:
        """One piece of each context in turn, until they are as much as one piece can be."""
        room = MAX_COMMIT_TOKENS
        waiting = [number for number, upload in self._uploads.items() if upload.parts is not None]
        while waiting and room > 0:
            number = waiting.pop(0)
            upload = self._uploads.pop(number)
            piece = next(upload.parts, None) if upload.parts is not None else None
            if piece is None:
                batch += upload.held
                self._served.add(number)
                continue
            batch.append(piece)
            room -= weight(piece)
            upload.begun = True
            if isinstance(piece, Open) and piece.resumes is not None:
                upload.parts = None
            else:
                waiting.append(number)
            self._uploads[number] = upload  # behind the others
