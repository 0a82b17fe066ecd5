"""Targets in played time: a real proposer and pool, costs of steps that the test sets, and a played drafter.

The target's token at position n is n % 1000. Where the draft model is wrong it says WRONG more. Whatever is drawn, is
drawn from the world's own seed.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from pool_world import PlayedTime

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.controller.v1.proposer import RemoteProposer
from vllm_wanspec.core.messages import Commit, Message, Nodes, Open, Welcome
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.sim.target import Runner, new_request

VOCAB_SIZE = 100_000
WRONG = 5000
PROMPT = [1, 2, 3]
CONTEXT = np.array([*PROMPT, *(position % 1000 for position in range(len(PROMPT), 20_000))], dtype=np.int32)
"""What every request's context begins with, however long it is."""
CHUNK = "chunk"
"""The request whose prompt is worked through in steps with prefill; it never gets to its first token."""


class Costs(NamedTuple):
    """What a step takes in seconds: in any case, per row, per draft token, and for the chunk of a prompt in it."""

    base_s: float
    row_s: float
    draft_s: float
    chunk_s: float = 0.0

    def step_s(self, rows: int, drafts: int = 0, chunks: int = 0) -> float:
        return self.base_s + rows * self.row_s + drafts * self.draft_s + chunks * self.chunk_s


def unconnected_pool(clock: Callable[[], float], *, drafters: int = 1, **more: object) -> DraftPool:
    """A pool whose drafters have welcomed it, though nothing is connected: what it sends stays in the outboxes."""
    speculation = more.pop("speculation", 8)
    vocab_size = more.pop("vocab_size", VOCAB_SIZE)
    endpoints = [{"name": f"d{index}", "url": "http://127.0.0.1:9"} for index in range(drafters)]
    settings = Settings.model_validate({"draft_endpoints": endpoints, "fallback": [], **more})
    pool = DraftPool(
        settings,
        fingerprint="f",
        vocab_size=vocab_size,  # type: ignore[arg-type]
        speculation_length=speculation,  # type: ignore[arg-type]
        clock=clock,
        seed=1,
    )
    pool._thread._loop.close()
    for link in pool.links:
        link.welcome = Welcome(1, "m", VOCAB_SIZE, "f", 9999, 4096, 10**6)
    return pool


class World:
    """A batch of requests at a target whose drafter answers at once: each row always has all drafts it can use."""

    def __init__(self, rows: int, *, speculation: int, agreement: float, seed: int, **sections: object) -> None:
        self.now = 100.0
        self.speculation, self.agreement = speculation, agreement
        self.rng = random.Random(seed)
        sections = {"late": {"policy": "none"}, **sections}
        self.pool = unconnected_pool(lambda: self.now, speculation=speculation, **sections)
        self.pool._arrived = PlayedTime(self)  # type: ignore[arg-type]
        [self.link] = self.pool.links
        self.remote = RemoteProposer.over(self.pool, self.pool._settings.tree, speculation)
        self.runner = Runner(0, 0)  # contexts are handed over apart
        self.names: list[str] = []
        self.length: dict[str, int] = {}
        self.drafts: dict[str, list[int]] = {}
        self.silent: set[str] = set()
        self.sent: list[Message] = []
        self.tokens = 0
        self.may_fail = False
        self._new: list[SimpleNamespace] = []
        self._finished: list[str] = []
        self._tips: dict[str, tuple[int, int, int]] = {}  # a session's last id, the node to go on from, its position
        self._count = itertools.count()
        self.resize(rows)

    def resize(self, rows: int) -> None:
        """With the next step the newest requests end, or new ones begin."""
        for name in self.names[rows:]:
            self._finished.append(name)
            del self.length[name], self.drafts[name]
        del self.names[rows:]
        while len(self.names) < rows:
            self.join(f"r{next(self._count)}")

    def join(self, name: str, **changes: object) -> None:
        """With the next step a request begins; ``changes`` as for `new_request`."""
        self._new.append(new_request(name, PROMPT, **changes))
        self.names.append(name)
        self.length[name], self.drafts[name] = len(PROMPT), []

    def step(self, costs: Costs, *, chunk: bool = False) -> int:
        """One verification step, with a chunk of some prompt in it where asked; how many drafts the next one gets."""
        drafts = sum(map(len, self.drafts.values()))
        self.remote.begin_step(self.runner, self._scheduled(chunk))
        step_s = costs.step_s(len(self.names), drafts, chunk)
        self.pass_time(max(step_s / 2, step_s + self.rng.gauss(0.0, 2e-4)))
        sampled = [self._verify(name) for name in self.names]
        lengths = [self.length[name] for name in self.names]
        self.tokens += sum(map(len, sampled))
        self.runner.input_batch.req_ids = [*self.names, CHUNK] if chunk else list(self.names)
        self._propose(sampled + [[]] * chunk, lengths + [1] * chunk)
        return sum(map(len, self.drafts.values()))

    def run(self, steps: int, costs: Costs, *, chunk: bool = False) -> float:
        """Tokens per second over so many steps."""
        began_s, before = self.now, self.tokens
        for _ in range(steps):
            self.step(costs, chunk=chunk)
        return (self.tokens - before) / (self.now - began_s)

    def pass_time(self, seconds: float) -> None:
        """Time goes on."""
        self.now += seconds

    def work(self) -> None:
        """What the drafter does between a step's commits and the next step's drafts."""
        for name in self.names:
            if name not in self.silent and self.pool.length(name) is not None:
                self._fill(name)
        self.take_sent()

    def take_sent(self) -> list[Message]:
        """What was sent to the drafter since this was asked last."""
        messages = self.link._outbox.take()
        self.sent += [message for message in messages if not isinstance(message, Commit)]
        return messages

    def _propose(self, sampled: list[list[int]], lengths: list[int]) -> None:
        contexts = np.broadcast_to(CONTEXT, (len(lengths), len(CONTEXT)))
        proposed = self.remote.propose(sampled, np.array(lengths, dtype=np.int32), contexts)
        self.work()
        self.runner._draft_token_ids = proposed
        taken = self.runner.take_draft_token_ids()
        if self.remote.failed and not self.may_fail:
            raise RuntimeError("the proposer has failed; its log line says why")
        self.drafts = dict(zip(self.names, taken, strict=False))

    def _scheduled(self, chunk: bool) -> SimpleNamespace:
        """What vLLM's scheduler says of the step."""
        tokens = {name: 1 + len(self.drafts[name]) for name in self.names}
        tokens.update({request.req_id: len(PROMPT) for request in self._new})
        if chunk:
            tokens[CHUNK] = 512
        output = SimpleNamespace(
            scheduled_new_reqs=self._new,
            finished_req_ids=set(self._finished),
            num_spec_tokens_to_schedule=None,
            scheduled_spec_decode_tokens={name: draft for name, draft in self.drafts.items() if draft},
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
        )
        self._new, self._finished = [], []
        return output

    def _verify(self, name: str) -> list[int]:
        here = self.length[name]
        right = [(here + index) % 1000 for index in range(len(self.drafts[name]) + 1)]
        good = 0
        for drafted, token in zip(self.drafts[name], right, strict=False):
            if drafted != token:
                break
            good += 1
        self.length[name] += good + 1
        return right[: good + 1]

    def _fill(self, name: str) -> None:
        """What a drafter without delay sends: drafts far beyond the commit, below what was committed undrafted."""
        live = self.pool._sessions[name]
        tree, known = live.core.tree, live.core.length  # no more than it was told of
        assert tree is not None
        number, parent, position = self._tips.get(name, (0, 0, len(PROMPT)))
        records = []
        if tree.pending:
            parent, position = tree.cursor_id, tree.committed_length - len(tree.pending)
        for _ in tree.pending:  # nodes on both sides, which are not sent
            number += 1
            parent, position = number, position + 1
        while position < known + 2 * self.speculation:
            number += 1
            right = self.rng.random() < self.agreement
            records.append(NodeRecord(number, parent, position % 1000 + WRONG * (not right), math.log(0.75), 0.9))
            parent, position = number, position + 1
        self._tips[name] = (number, parent, position)
        if records:
            self.pool.link_received(self.link, [Nodes(live.number, known, tuple(records))])


class Distance(NamedTuple):
    """Round trip, and the drafter's times in seconds: per token of the main line, and to begin it anew."""

    rtt_s: float
    gap_s: float
    start_s: float = 0.003


class DistantWorld(World):
    """The same with a drafter that is far away and needs its time: it drafts the main line alone."""

    LOOKAHEAD = 64

    def __init__(self, rows: int, distance: Distance, **more: object) -> None:
        self.distance = distance
        self._events: list[tuple[float, int, Callable[[], bool]]] = []
        self._order = itertools.count()
        self._lines: dict[int, _Line] = {}
        super().__init__(rows, **more)  # type: ignore[arg-type]
        self.link._rtt_s.add(distance.rtt_s)

    def at(self, at_s: float, event: Callable[[], bool]) -> None:
        """Something happens then; it says whether something has arrived at the target."""
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def pass_time(self, seconds: float) -> None:
        """Time goes on; a wait (it is in slices) ends when something arrives, a step does not."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            at_s, _, event = heapq.heappop(self._events)
            self.now = max(self.now, at_s)
            event()
        self.now = end

    def work(self) -> None:
        arrival_s = self.now + self.distance.rtt_s / 2
        for message in self.take_sent():
            if isinstance(message, Open):
                self.at(arrival_s, lambda opened=message: self._open(opened))  # type: ignore[misc]
            elif isinstance(message, Commit):
                self.at(arrival_s, lambda commit=message: self._lines[commit.session].commit(commit))  # type: ignore[misc]

    def send(self, message: Nodes) -> None:
        """The drafter sends nodes."""

        def arrive() -> bool:
            self.pool.link_received(self.link, [message])
            return True

        self.at(self.now + self.distance.rtt_s / 2, arrive)

    def _open(self, opened: Open) -> bool:
        self._lines[opened.session] = _Line(self, opened)
        return False


class _Line:
    """One session at the distant drafter."""

    def __init__(self, world: DistantWorld, opened: Open) -> None:
        self._world = world
        self._session = opened.session
        self._known = len(opened.tokens)
        self._number = 0
        self._tip = (0, self._known)
        self._tokens: dict[int, int] = {}
        self._ids = {self._known: 0}
        self._run = 0
        self._idle = False
        self._begin()

    def commit(self, commit: Commit) -> bool:
        left = False
        for position, token in enumerate(commit.tokens, start=commit.position):
            if self._tokens.pop(position, None) != token:
                self._tokens = {}
                self._node(self._ids[position], position, token, 0.0, 0.0)  # on both sides, and not sent
                left = True
        self._known = commit.position + len(commit.tokens)
        self._ids = {position: node for position, node in self._ids.items() if position >= self._known}
        if left or self._idle:
            self._begin()
        return False

    def _begin(self) -> None:
        """The main line starts at the tip; what ran before is over."""
        self._run += 1
        self._idle = False
        self._next(self._world.distance.start_s)

    def _next(self, more_s: float = 0.0) -> None:
        run = self._run
        self._world.at(self._world.now + self._world.distance.gap_s + more_s, lambda: self._draft(run))

    def _draft(self, run: int) -> bool:
        if run != self._run:
            return False
        parent, position = self._tip
        if position - self._known >= self._world.LOOKAHEAD:
            self._idle = True
            return False
        token = position % 1000 if self._world.rng.random() < self._world.agreement else WRONG
        self._tokens[position] = token
        self._send([self._node(parent, position, token, math.log(0.8), 1.0)])
        self._next()
        return False

    def _node(self, parent: int, position: int, token: int, logprob: float, entropy_nats: float) -> NodeRecord:
        self._number += 1
        self._tip = (self._number, position + 1)
        self._ids[position + 1] = self._number
        return NodeRecord(self._number, parent, token, logprob, entropy_nats)

    def _send(self, records: Sequence[NodeRecord]) -> None:
        if records:
            self._world.send(Nodes(self._session, self._known, tuple(records)))
