"""A pool whose time is played: its drafter is not connected, and what it would send is delivered by hand.

The target's token at position n is n; drafts are so too, or wrong.
"""

import threading
from collections.abc import Callable

from pools import LIMIT

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.controller.waiting import WAIT_SLICE_S
from vllm_wanspec.core.learned.estimates import Smoothed, StepTimes
from vllm_wanspec.core.messages import Nodes, Welcome
from vllm_wanspec.core.tree import NodeRecord

STEP_S = 0.03
VOCAB_SIZE = 100_000
WRONG = 50_000
"""Added to a token: what the draft model says where it is wrong."""


class PlayedTime(threading.Condition):
    """The pool's condition; while it waits, the world goes on."""

    def __init__(self, world: "World") -> None:
        super().__init__(threading.Lock())
        self._world = world

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        assert 0.0 < timeout <= WAIT_SLICE_S
        self.release()
        try:
            self._world.pass_time(timeout)
        finally:
            self.acquire()
        return True


class World:
    """A pool and one drafter."""

    def __init__(
        self,
        *,
        queued: Callable[[], int | None] = lambda: 0,
        names: str = "a",
        length: str = "fixed",
        fallback: tuple[str, ...] = (),
        **late: object,
    ) -> None:
        self.now = 100.0
        self.coming: list[tuple[float, Callable[[], None]]] = []
        settings = Settings.model_validate(
            {
                "draft_endpoints": [{"name": "d", "url": "http://127.0.0.1:9"}],
                "length": {"policy": length},
                "fallback": fallback,
                "late": {"policy": "adaptive", "max_wait_ms": 15, **late},
            }
        )
        self.pool = DraftPool(
            settings,
            fingerprint="f",
            vocab_size=VOCAB_SIZE,
            speculation_length=LIMIT,
            clock=lambda: self.now,
            queued=queued,
            seed=1,
        )
        self.pool._thread._loop.close()  # nothing is connected
        self.pool._arrived = PlayedTime(self)
        [self.link] = self.pool.links
        self.link.welcome = Welcome(1, "m", VOCAB_SIZE, "f", 99, 4096, 10**6)
        self.names = list(names)
        self.pool.begin([], [(name, [0, 1, 2]) for name in names])
        self.length = dict.fromkeys(names, 3)
        self.last = dict.fromkeys(names, (0, 0, 3))  # a session's last id, the node to go on from, its position
        for name in names:
            self.arrive(name, 8)

    def pass_time(self, seconds: float) -> None:
        """Until something arrives, but no longer than ``seconds``."""
        end = self.now + seconds
        due = min((item for item in self.coming if item[0] <= end), key=lambda item: item[0], default=None)
        if due is None:
            self.now = end
            return
        self.coming.remove(due)
        self.now = max(self.now, due[0])
        due[1]()

    def arrive(self, name: str, count: int, *, echo: int | None = None, wrong: bool = False) -> None:
        """The drafter's next ``count`` tokens, below the node of a token ``echo`` that was not drafted."""
        number, parent, position = self.last[name]
        records = []
        if echo is not None:
            tree = self.pool._sessions[name].core.tree
            assert tree is not None
            assert list(tree.pending) == [echo]
            number += 1
            parent, position = number, self.length[name]
        for _ in range(count):
            number += 1
            records.append(NodeRecord(number, parent, position + WRONG * wrong, -0.1, 1.2))
            parent, position = number, position + 1
        self.last[name] = (number, parent, position)
        session = self.pool._sessions[name].number
        self.pool.link_received(self.link, [Nodes(session, self.length[name], tuple(records))])

    def pending(self, name: str) -> bool:
        """Whether the drafter must begin anew."""
        tree = self.pool._sessions[name].core.tree
        return tree is not None and bool(tree.pending)

    def later(self, after_s: float, name: str, count: int, **more: int | None) -> None:
        self.coming.append((self.now + after_s, lambda: self.arrive(name, count, **more)))  # type: ignore[arg-type]

    def step(self, rows: dict[str, list[int]], *, drafts: int = 0, step_s: float = STEP_S) -> list[list[int]]:
        """One verification step; gives the lists that the drafts for the next one go into."""
        self.pool.step_begins(len(rows) + drafts, drafts)
        self.now += step_s
        for name, tokens in rows.items():
            self.length[name] += len(tokens)
        self.pool.step(list(rows.items()))
        return [[] for _ in rows]

    def draft(self, drafts: list[list[int]]) -> float:
        """The drafts are taken; how long that held the next step back."""
        before_s = self.now
        drafts[:] = self.pool.draft(list(self.names), LIMIT)
        return self.now - before_s

    def run_well(self, steps: int = 40) -> None:
        """Steps in which all drafts are right and there: full yield for all requests."""
        times = self.pool.shared.times
        while times.plain.samples < StepTimes.MIN_SAMPLES:  # known before, so that no step goes without to learn it
            times.add(len(self.names), drafts=0, full=False, seconds=STEP_S)
        for _ in range(steps):
            rows = {name: list(range(self.length[name], self.length[name] + LIMIT + 1)) for name in self.names}
            drafts = self.step(rows, drafts=LIMIT * len(rows))
            for name in self.names:
                self.arrive(name, LIMIT + 1)
            assert self.draft(drafts) == 0.0
            assert all(len(draft) == LIMIT for draft in drafts)

    def measured(self, *, answer_s: float, gap_s: float) -> None:
        """Set what was measured of the drafter."""
        turnaround = self.link.turnaround
        turnaround.answer_s, turnaround.gap_s = Smoothed(), Smoothed()
        turnaround.answer_s.add(answer_s)
        turnaround.gap_s.add(gap_s)

    def miss(self, *names: str) -> list[list[int]]:
        """A step in which all the drafts of ``names`` were wrong, and those of the others right."""
        rows = {}
        for name in self.names:
            here = self.length[name]
            rows[name] = [here + WRONG] if name in names else list(range(here, here + LIMIT + 1))
        return self.step(rows, drafts=LIMIT * len(rows))
