"""What a drafter's host counts; plain values, since they may come from another process."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class HostStats(NamedTuple):
    """A host's counts.

    Attributes:
        sessions: Open sessions.
        running: Branches that the engine is extending.
        drafted_tokens: Tokens that the engine gave for sessions.
        branches_started: Engine requests.
        branch_seconds: Time that branches have run, summed over them.
        first_tokens: Branches that have given a token.
        first_seconds: From their start to it, summed over them.
        gap_seconds: Between a branch's tokens, summed over all that are not its first.
        waiting: Branches that wait for one of the engine's places.
        waited_seconds: From asking for a place to getting it, summed over the branches that have started.
        context_tokens: In the contexts of all sessions.
        draining: 1 where no new sessions are taken, else 0.
        expired: Sessions that were ended because nothing was said of them.
        dismissed: Sessions that were ended because the drafter, or its engine, stops.
        rejects: Sessions refused or ended, by ``code`` of the reject and, where it is `overloaded`, ``code/why``.
        drafted: Tokens that the engine gave, by client.
        used: Tokens that were committed and had been drafted here, by client.
    """

    sessions: int = 0
    running: int = 0
    drafted_tokens: int = 0
    branches_started: int = 0
    branch_seconds: float = 0.0
    first_tokens: int = 0
    first_seconds: float = 0.0
    gap_seconds: float = 0.0
    waiting: int = 0
    waited_seconds: float = 0.0
    context_tokens: int = 0
    draining: int = 0
    expired: int = 0
    dismissed: int = 0
    rejects: Mapping[str, int] = MappingProxyType({})
    drafted: Mapping[str, int] = MappingProxyType({})
    used: Mapping[str, int] = MappingProxyType({})
