"""The trees of requests that have a slot in the target's memory, where a device reads them.

Works with the pool's lock held. What a slot holds is always written whole, after each change of what is known.
"""

from array import array
from collections.abc import Mapping, Sequence

from vllm_wanspec.controller.live import LiveSession
from vllm_wanspec.core.block import UNDER_ROOT, Publication
from vllm_wanspec.core.words import TreeWords, chained


class Publishing:
    """Keeps what is published of each session.

    Attributes:
        on: Whether there is anywhere to publish.
    """

    def __init__(self, publication: Publication | None, sessions: Mapping[str, LiveSession], guessed: int) -> None:
        """Publish to ``publication``, where there is one.

        Args:
            publication: Takes the trees.
            sessions: By request; the pool's.
            guessed: Most tokens that prompt lookup goes on with.
        """
        self.on = publication is not None
        self._publication = publication
        self._sessions = sessions
        self._guessed = guessed

    def publish(self, live: LiveSession) -> None:
        """Have a session's tree in its slot, as far as there is one."""
        slot, publication = live.slot, self._publication
        if slot is None or publication is None:
            return
        tree, guess = live.core.tree, live.guess
        if tree is None:
            live.words = None
            tokens = () if guess is None else guess.tokens
            publication.publish(slot, live.core.length, chained(array("q"), UNDER_ROOT, tokens))
            return
        words = live.words
        if words is None or words.tree is not tree:
            words = live.words = TreeWords(tree)
        current = words.current(guess)
        publication.publish(slot, words.root, current)

    def place(self, live: LiveSession, slot: int | None) -> None:
        """A session has a slot from now on; or none any more, and the one that it had is another's."""
        if slot is not None:
            live.slot = slot
            self.publish(live)
            return
        if live.slot is not None and self._publication is not None:
            self._publication.clear(live.slot)
        live.slot = live.words = live.guess = None

    def look_ahead(self, rows: Sequence[tuple[str, Sequence[int]]], *, looks_up: bool) -> None:
        """Publish what is known after a step: the next one may be under way already, so it serves the one after too.

        Args:
            rows: Per batch row the request id and the tokens that were verified.
            looks_up: Whether prompt lookup goes on where drafts end.
        """
        for request, tokens in rows:
            live = self._sessions.get(request)
            if live is None or not tokens or live.slot is None:
                continue
            before = live.guess
            live.guess = live.core.guess(self._guessed) if looks_up else None
            # A tree's block serves on while the text follows it, and nodes that arrive renew it.
            if before is not None or live.guess is not None or (live.words is not None and live.words.outdated()):
                self.publish(live)
