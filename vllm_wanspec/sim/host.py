"""The drafter's host on virtual time: the real connections and sessions, over an engine that is stepped by hand.

Whoever steps the host owns it, with all that hangs on it; nothing happens between two calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_wanspec.core.drafter import StartBranch
from vllm_wanspec.drafter.host import DraftModel, Host
from vllm_wanspec.sim.engine import Branch, Engine
from vllm_wanspec.sim.models import Language

__all__ = ["SteppedHost", "draft_model"]

MODEL_NAME = "invented"
MAX_CONTEXT_TOKENS = 4096


def draft_model(language: Language, **changes: Any) -> DraftModel:
    """What a drafter of ``language`` says of itself, but for the changes."""
    values = {
        "name": MODEL_NAME,
        "fingerprint": language.fingerprint,
        "vocab_size": language.vocab_size,
        "max_context": MAX_CONTEXT_TOKENS,
    }
    return DraftModel(**{**values, **changes})


class SteppedHost(Host):
    """A host whose branches give tokens when they are told to, on the clock that it is given."""

    def __init__(self, engine: Engine, model: DraftModel, clock: Callable[[], float], **settings: Any) -> None:
        """Serve over ``engine``; ``clock`` is in seconds, settings are those of `Host`."""
        super().__init__(model, clock=clock, **settings)
        self.engine = engine
        self._branches: dict[int, Branch] = {}

    @property
    def handles(self) -> list[int]:
        """Of all branches that run, in the order of their start."""
        return list(self._branches)

    def step(self, handle: int, count: int) -> None:
        """A branch gives up to ``count`` tokens, and ends where these were its last; nothing if it runs no more."""
        branch = self._branches.get(handle)
        if branch is None or not count:
            return
        self.drafted(handle, self.engine.give(branch, count))
        if branch.left == 0 and handle in self._branches:
            owner = self._running[handle]
            self._cease(handle)
            owner.owner.ended(owner.number, owner.branch)

    def fail(self, reason: str) -> None:
        """All branches that run end in an error."""
        for handle in self.handles:
            self.failed(handle, reason)

    def resize(self, places: int) -> None:
        """Have other places for running branches, over all sessions."""
        self._turns.places = places
        self.share()
        self._fill()

    def _extend(self, handle: int, start: StartBranch) -> None:
        self._branches[handle] = self.engine.begin(start.tokens, start.max_tokens)

    def _cease(self, handle: int) -> None:
        self.engine.end(self._branches.pop(handle))
        self.gone(handle)
