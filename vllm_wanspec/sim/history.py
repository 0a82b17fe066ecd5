"""What a history on virtual time begins with, what goes through it, and what it leaves.

A `Setup` never changes. A `Request` belongs to the pair that plays it; whoever looks on may read it. `Logs` are only
ever added to, by the sessions that are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.events import Record, header
from vllm_wanspec.core.health import Bar
from vllm_wanspec.core.messages import Limits
from vllm_wanspec.sim.host import MODEL_NAME

__all__ = ["Logs", "Request", "Setup"]


@dataclass(frozen=True)
class Setup:
    """The initial conditions of a history.

    Attributes:
        limits: Of every session.
        seed: For the jitter, and for the tokens that branches give in a tick.
        max_context: The draft model's.
        places: For running branches, over all sessions.
        delay: Of both wires, in ticks.
        jitter: Of both wires, in ticks.
        burst: Most tokens of a branch in a tick.
    """

    limits: Limits
    seed: int = 3
    max_context: int = 10**6
    places: int = 16
    delay: int = 2
    jitter: int = 0
    burst: int = 1


@dataclass
class Logs:
    """Both event logs of a history that is recorded."""

    controller: list[Record] = field(default_factory=lambda: [header("controller", MODEL_NAME, wall_s=0.0, at_s=0.0)])
    drafter: list[Record] = field(default_factory=lambda: [header("drafter", MODEL_NAME, wall_s=0.0, at_s=0.0)])


class Request:
    """A request of the target: its context, and its session as a pool keeps it.

    Attributes:
        context: Prompt and output so far.
        number: Of its session on the connection; None while it has none there.
        opened: Sessions that it has had.
        preempted: The target does not run it now.
        accepted: Drafted tokens that were.
        bar: What the drafter's rejects of it mean.
    """

    def __init__(self, index: int, context: Sequence[int], session: ControllerSession) -> None:
        """Begin with a prompt."""
        self.index = index
        self.context = list(context)
        self.session = session
        self.number: int | None = None
        self.opened = 0
        self.preempted = False
        self.accepted = 0
        self.bar = Bar()
