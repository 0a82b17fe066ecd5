"""What one frame costs: decoding the nodes in it and hanging them into their trees.

No connection and no drafter: the frames are made here, and the pool believes that a drafter has welcomed it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import closing

from vllm_wanspec.core.messages import PROTOCOL_VERSION, Nodes, Welcome, decode, encode
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.lab.target.hotpath_report import Frames
from vllm_wanspec.lab.target.played import make_pool, make_settings
from vllm_wanspec.sim.host import draft_model
from vllm_wanspec.sim.models import TAIL, TOP_K, Language

__all__ = ["SPREAD_SESSIONS", "measure_frames"]

FRAME_NODES = 64
SPREAD_SESSIONS = 8
"""Sessions that share a frame in the second measurement: one position each, as most live frames are."""
FRAMES_DEEP = 4
"""Frames of one session whose nodes are live at a time: trees of 256 nodes."""


def measure_frames(count: int, sessions: int = 1, on_frame: Callable[[], None] = lambda: None) -> Frames:
    """Decode frames of 64 nodes and apply them to the trees of some sessions; commits prune these in between.

    What a commit leaves for `link_received` to clean up is part of the time; the commit is not.
    """
    language = Language()
    pool = make_pool(make_settings("http://127.0.0.1:9"), language, limit=8)
    link, model = pool.links[0], draft_model(language)
    link.welcome = Welcome(
        PROTOCOL_VERSION,
        model.name,
        model.vocab_size,
        model.fingerprint,
        model.max_sessions,
        model.max_nodes,
        model.max_context,
    )
    writers = []
    for index in range(sessions):
        context = language.prompt(index, 300)
        writers.append(_NodeWriter(language, context, link.next_number))
        pool.begin([], [(f"request-{index}", context)])
    times_ns, sizes = [], []
    deep = FRAMES_DEEP * sessions
    with closing(pool._thread._loop):  # the link's thread never starts
        for number in range(count + deep):
            frame = encode([writer.message(FRAME_NODES // TOP_K // sessions) for writer in writers])
            began_ns = time.perf_counter_ns()
            pool.link_received(link, decode(frame))
            times_ns.append(time.perf_counter_ns() - began_ns)
            sizes.append(len(frame))
            if number >= deep - 1:
                pool.step([(f"request-{index}", writer.oldest()) for index, writer in enumerate(writers)])
            on_frame()
    return Frames(FRAME_NODES, sessions, tuple(times_ns[deep:]), sum(sizes[deep:]) / count)


class _NodeWriter:
    """Writes one session's nodes: eight at each position, the next ones below the best of them."""

    def __init__(self, language: Language, context: list[int], session: int) -> None:
        self._language = language
        self._session = session
        self._tail, self._length = list(context[-TAIL:]), len(context)
        self._tip = self._last_id = 0
        self._lines: deque[list[int]] = deque()

    def message(self, positions: int) -> Nodes:
        """The nodes of some more positions."""
        nodes, line = [], []
        for _ in range(positions):
            step = self._language.step(self._tail)
            first = self._last_id + 1
            for index, (token, logprob) in enumerate(((step.token, step.logprob), *step.alternatives), start=first):
                nodes.append(NodeRecord(index, self._tip, token, logprob, step.entropy_nats))
            self._tip, self._last_id = first, first + len(step.alternatives)
            self._tail = [*self._tail[1:], step.token]
            line.append(step.token)
        self._lines.append(line)
        return Nodes(self._session, self._length, tuple(nodes))

    def oldest(self) -> list[int]:
        """The best tokens of the oldest message that has not been asked for."""
        return self._lines.popleft()
