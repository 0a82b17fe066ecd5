"""The event logs of whole histories, played again: new sessions decide exactly as the recorded ones did."""

import copy
import json
import random
from typing import Any

import pytest
from pair import CheckedConnection, Setup, World
from pair_finish import finish

from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.events import Record, RecordedControllerSession, header, replay
from vllm_wanspec.core.messages import Limits, Nodes
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.wire import encode
from vllm_wanspec.sim.history import Logs

WIDE = Limits(24, 256, 4, 8, 4, 0.5, 0.01)
SETUPS = [
    Setup(WIDE, seed=1, requests=3),
    Setup(Limits(16, 64, 3, 6, 3, None, 0.0), seed=2, agreement=0.5, requests=2, delay=1, burst=3),
    Setup(Limits(5, 20), seed=3, agreement=0.95, delay=4, jitter=3),
    Setup(Limits(40, 512, 6, 12, 8, 0.0, 0.0), seed=4, delay=0, burst=2, max_context=120, max_branch_tokens=5),
]


def recorded(setup: Setup) -> Logs:
    """A history with all kinds of calls, driven by the setup's seed."""
    logs = Logs()
    world = World(setup, logs)
    rng = random.Random(setup.seed)
    disturbances = [
        world.restart_drafter,
        world.restart_controller,
        lambda: world.begin_again(world.requests[0]),
        lambda: world.host.fail("out of memory"),
        lambda: the_link(world).reject(world.requests[0].number or 0, "overloaded"),
        lambda: world.resize_each(rng.randint(1, 8)),
        lambda: world.commit_again(world.requests[-1], 3),
        lambda: hostile(world),
    ]
    for _ in range(3):
        for disturb in rng.sample(disturbances, len(disturbances)):
            for _ in range(rng.randint(1, 8)):
                world.tick(rng.randint(1, 6))
                world.step(limit=rng.randint(1, 6), least=rng.choice((0.0, 0.3)))
            disturb()
    finish(world)
    return logs


def the_link(world: World) -> CheckedConnection:
    assert world.connection is not None
    return world.connection


def hostile(world: World) -> None:
    """A node below one that was never sent: refused, and the link dropped."""
    number = world.requests[0].number
    if number is not None:
        orphan = NodeRecord(2**40, 2**40 - 1, 1, -1.0, 1.0)
        assert world.feed_controller(encode([Nodes(number, 0, (orphan,))]))
        world.disconnect()
        world.connect()


def read_back(log: list[Record]) -> list[dict[str, Any]]:
    """A log as it comes from the file."""
    return [json.loads(json.dumps(record)) for record in log]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: f"seed{setup.seed}")
def test_replay_gives_out_what_was_recorded(setup: Setup) -> None:
    logs = recorded(setup)
    for log in (read_back(logs.controller), read_back(logs.drafter)):
        calls = [record for record in log if "out" in record]
        played = list(replay(log))
        assert [record for record, _ in played] == calls
        for record, out in played:
            assert out == record["out"], record
        assert sum(bool(record["out"]) for record in calls) > 50


def test_both_logs_have_every_call() -> None:
    logs = recorded(SETUPS[0])
    controller = {record.get("call") for record in logs.controller}
    drafter = {record.get("call") for record in logs.drafter}
    assert controller == {None, "begin", "open", "commit", "receive", "draft", "link_lost", "close"}
    assert drafter == {None, "open", "commit", "drafted", "ended", "failed", "resize", "close"}


def test_what_prompt_lookup_learns_from_its_guesses_is_learnt_again() -> None:
    """As the pool calls it: the draft that was made last goes with the commit that tells what became of it."""
    log: list[Record] = [header("controller", "m", wall_s=1e9, at_s=0.0)]
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    session = RecordedControllerSession(text, Shared(), key="r", sink=log.append, now=0.0)
    guess = session.fall_back(session.draft(2, 0.0, 1.0), 2, 0.0, 1.0)
    session.commit([4, 5], 2.0, guess)
    surer = session.fall_back(session.draft(8, 0.0, 3.0), 8, 0.5, 3.0)
    assert surer.tokens == [6, 1]  # 0.75 each; it was 0.5 before the guess came true
    session.commit([9], 4.0, surer)
    for record, out in replay(read_back(log)):
        assert out == record["out"], record


def differences(log: list[dict[str, Any]]) -> int:
    return sum(out != record["out"] for record, out in replay(log))


def test_an_altered_log_is_noticed() -> None:
    logs = recorded(SETUPS[1])
    controller, drafter = read_back(logs.controller), read_back(logs.drafter)

    changed = copy.deepcopy(controller)
    draft = next(r for r in changed if r.get("call") == "draft" and r["out"])
    draft["out"][0] += 1
    assert differences(changed) == 1

    changed = copy.deepcopy(controller)
    received = next(r for r in changed if r.get("call") == "receive" and r["message"][0] == 6)
    received["message"][3][0][2] ^= 1  # another token: later drafts have it
    assert differences(changed) >= 1

    changed = copy.deepcopy(drafter)
    given = next(r for r in changed if r.get("call") == "drafted" and r["steps"])
    given["steps"][0][0] ^= 1
    assert differences(changed) >= 1

    changed = copy.deepcopy(drafter)
    opened = next(r for r in changed if r.get("call") == "open")
    opened["settings"]["max_branch_tokens"] = 1
    assert differences(changed) >= 1
