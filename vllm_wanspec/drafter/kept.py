"""Contexts of sessions whose connections broke, for the controllers that come back for them.

A long context takes long to cross a WAN; what is here need not cross it again. It is known by the name that the
controller drew for the broken connection, which nobody else was told.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

KEPT_S = 60.0
"""A controller that is back later than that sends everything anew."""
MAX_KEPT_TOKENS = 4 * 1024 * 1024
"""At four bytes each."""


class KeptContexts:
    """At most so many tokens, for at most so long; the oldest go first."""

    def __init__(self, most_tokens: int = MAX_KEPT_TOKENS) -> None:
        """Start without any."""
        self._most = most_tokens
        self._tokens = 0
        self._contexts: OrderedDict[tuple[str, int], tuple[float, array[int]]] = OrderedDict()

    def __len__(self) -> int:
        """Contexts that are kept."""
        return len(self._contexts)

    def keep(self, client: str, session: int, context: Sequence[int], now: float) -> None:
        """Keep a session's context; ``now`` in seconds."""
        self._forget(client, session)
        if client and context and len(context) <= self._most:
            self._contexts[client, session] = now, array("i", context)
            self._tokens += len(context)
        self._expire(now)

    def take(self, client: str, session: int, now: float) -> Sequence[int]:
        """The context of a session, once; empty where none is kept."""
        self._expire(now)
        return self._forget(client, session)

    def _expire(self, now: float) -> None:
        while self._contexts:
            key, (since_s, _) = next(iter(self._contexts.items()))
            if self._tokens <= self._most and now - since_s <= KEPT_S:
                return
            self._forget(*key)

    def _forget(self, client: str, session: int) -> Sequence[int]:
        _, context = self._contexts.pop((client, session), (0.0, array("i")))
        self._tokens -= len(context)
        return context
