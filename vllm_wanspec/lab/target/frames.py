"""What one frame costs: decoding the nodes in it and hanging them into their trees.

No connection and no drafter: the frames are made here, and the pool believes that a drafter has welcomed it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from vllm_wanspec.core.messages import MAX_CONTEXT_TOKENS, PROTOCOL_VERSION, Nodes, Welcome
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.wire import Sender, decode, encode
from vllm_wanspec.lab.target.hotpath_report import quantiles
from vllm_wanspec.lab.target.played import make_pool, make_settings
from vllm_wanspec.sim.host import draft_model
from vllm_wanspec.sim.models import TAIL, TOP_K, Language

FRAME_NODES = 64
SPREAD_SESSIONS = 8
"""Sessions that share a frame in the second measurement: one position each, as most live frames are."""
FRAMES_DEEP = 4
"""Frames of one session whose nodes are live at a time: trees of 256 nodes."""


def measure_frames(count: int, sessions: int = 1, on_frame: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Decode frames of 64 nodes and apply them to the trees of some sessions; commits prune these in between.

    What a commit leaves for `link_received` to clean up is part of the time; the commit is not.

    Returns:
        ``us``, quantiles of the time in microseconds; ``bytes``, mean size; ``count``, of frames.
    """
    language = Language()
    pool = make_pool(make_settings("http://127.0.0.1:9"), language, limit=8)
    link, model = pool.links[0], draft_model(language)
    what_it_serves = (model.name, model.vocab_size, model.fingerprint)
    link.welcome = Welcome(PROTOCOL_VERSION, *what_it_serves, model.max_sessions, model.max_nodes, MAX_CONTEXT_TOKENS)
    writers, lines = [], deque[list[list[int]]]()
    for index in range(sessions):
        context = language.prompt(index, 300)
        writers.append(_messages(language, context, link.next_number, FRAME_NODES // TOP_K // sessions))
        pool.begin([], [(f"request-{index}", context)])
    times_ns, sizes = [], []
    deep = FRAMES_DEEP * sessions
    with closing(pool._thread._loop):  # the link's thread never starts
        for number in range(count + deep):
            written = [next(writer) for writer in writers]
            lines.append([line for _, line in written])
            frame = encode([message for message, _ in written])
            began_ns = time.perf_counter_ns()
            pool.link_received(link, decode(frame, Sender.DRAFTER))
            times_ns.append(time.perf_counter_ns() - began_ns)
            sizes.append(len(frame))
            if number >= deep - 1:
                pool.step([(f"request-{index}", line) for index, line in enumerate(lines.popleft())])
            on_frame()
    assert pool.counters.received_nodes == FRAME_NODES * (count + deep), "sessions ended before the last frame"
    times_us = quantiles([time_ns / 1e3 for time_ns in times_ns[deep:]])
    return {"us": times_us, "bytes": round(sum(sizes[deep:]) / count), "count": count}


def _messages(
    language: Language, context: list[int], session: int, positions: int
) -> Iterator[tuple[Nodes, list[int]]]:
    """One session's nodes, some positions at a time, and the best of them: eight each, the next ones below the best."""
    tail, tip, last_id = list(context[-TAIL:]), 0, 0
    while True:
        nodes, line = [], []
        for _ in range(positions):
            step = language.step(tail)
            children = ((step.token, step.logprob), *step.alternatives)
            for node, (token, logprob) in enumerate(children, start=last_id + 1):
                nodes.append(NodeRecord(node, tip, token, logprob, step.entropy_nats))
            tip, last_id = last_id + 1, last_id + len(children)
            tail = [*tail[1:], step.token]
            line.append(step.token)
        yield Nodes(session, len(context), tuple(nodes)), line
