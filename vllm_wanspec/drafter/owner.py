"""What a host needs of whoever has sessions at it."""

from collections.abc import Sequence
from typing import Protocol

from vllm_wanspec.core.drafter import DraftStep


class BranchOwner(Protocol):
    """Whoever has sessions at a host, and their branches: a connection. The host tells it what the engine does.

    ``client_name`` is under which name its tokens are counted: one of few, as its peer cannot choose it.
    """

    client_name: str

    def __hash__(self) -> int:
        """By identity."""

    @property
    def sessions(self) -> int:
        """Open sessions."""

    def resize(self, width: int) -> None:
        """Let each session run ``width`` branches."""

    def drafted(self, number: int, branch: int, steps: Sequence[DraftStep]) -> None:
        """The engine gave tokens for a session's branch."""

    def ended(self, number: int, branch: int) -> None:
        """The engine has given all that a session's branch asked for."""

    def failed(self, number: int, branch: int, reason: str) -> None:
        """The engine cannot serve a session's branch."""

    def forget(self, number: int, branch: int) -> None:
        """The engine is through with a session's branch."""

    def drain(self) -> None:
        """No new sessions are taken here: tell the peer."""

    def dismiss(self) -> int:
        """End all sessions, and tell the peer; how many there were."""
