"""Logs of a real pool and a real drafter: they are understood, and tell what the sessions counted themselves."""

from pathlib import Path

import pytest
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, toy, wait_until

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.eventlog import EventLog
from vllm_wanspec.trace.chrome import trace_events
from vllm_wanspec.trace.page import page_data, render
from vllm_wanspec.trace.target import Outcome
from vllm_wanspec.trace.timeline import load, summarize
from vllm_wanspec.trace.tree import Fate

TOY = toy(seed=8)
PROMPT = [3, 2, 1]
LIMIT, STEPS = 4, 30


def play(pool: DraftPool) -> None:
    pool.begin([], [("a", PROMPT)])
    context, draft = list(PROMPT), []
    for _ in range(STEPS):
        tokens = TOY.verify(context, draft)
        context += tokens
        pool.step([("a", tokens)])
        [draft] = pool.draft(["a"], LIMIT)
    pool.begin(["a"], [])


@pytest.fixture
def run(tmp_path: Path, short_waits: None) -> tuple[DraftPool, list[Path]]:
    paths = [tmp_path / f"{side}.jsonl" for side in ("controller", "drafter")]
    near, far = (EventLog(path, path.stem, "toy") for path in paths)
    with DrafterServer(TOY, sink=far.record) as server:
        endpoints = [{"name": "eu", "url": server.url}]
        pool = DraftPool(
            Settings.model_validate({"draft_endpoints": endpoints, "fallback": [], "late": {"policy": "fixed"}}),
            fingerprint=FINGERPRINT,
            vocab_size=VOCAB_SIZE,
            speculation_length=LIMIT,
            sink=near.record,
            seed=1,
        )
        pool.start()
        wait_until(lambda: pool.links[0].welcome)
        play(pool)
        wait_until(lambda: server.sessions == 0)
        pool.stop()
    near.close()
    far.close()
    return pool, paths


def test_they_tell_what_the_sessions_counted(run: tuple[DraftPool, list[Path]]) -> None:
    pool, paths = run
    counted = pool.counters
    [figures] = summarize(paths)
    [timeline] = load(paths, [figures])
    target, fates = timeline.target, timeline.target.count_fates()
    assert (figures.id, figures.drafters, len(target.steps), figures.steps) == ("a", ["eu"], STEPS, counted.steps)
    assert figures.tokens - figures.first_tokens == counted.committed_tokens
    assert figures.hits + figures.caught == counted.hits > 0
    assert (figures.misses, figures.blind) == (counted.misses, counted.blind_steps)
    assert sum(step.outcome is Outcome.CAUGHT for step in target.steps) == counted.branch_hits
    assert figures.waits == len(target.waits) == counted.waits
    assert sum(arrival.added for arrival in target.arrivals) == counted.added_nodes
    assert fates[Fate.STALE] == counted.stale_nodes
    assert fates[Fate.LATE] == counted.late_hits
    assert fates[Fate.ACCEPTED] == figures.accepted > 0
    assert [node.id for node in target.nodes] == list(range(1, len(target.nodes) + 1))
    assert fates["drafted"] == counted.received_nodes


def test_both_logs_are_joined(run: tuple[DraftPool, list[Path]]) -> None:
    _, paths = run
    [timeline] = load(paths, summarize(paths))
    target = timeline.target
    [session] = timeline.sessions
    assert session.key == target.links[0].peer
    assert [(receipt.position, receipt.tokens) for receipt in session.receipts] == [
        (step.position, len(step.tokens)) for step in target.steps
    ]
    up, down = timeline.delays_s()
    assert len(up) == STEPS
    assert len(down) == len(target.arrivals) > 0
    assert min(*up, *down) >= 0.0
    assert all(branch.ending for branch in session.branches)
    assert any(branch.main for branch in session.branches)
    echoes = {node.id for node in target.nodes if node.fate is Fate.ECHO}
    begun_anew = [branch.main for branch in session.branches if branch.node in echoes]
    assert begun_anew
    assert all(begun_anew)
    assert '"id":"a"' in render(page_data(timeline, {}))
    assert len([event for event in trace_events([timeline]) if event["ph"] == "s"]) == STEPS
