"""The pair without rules around it; with them, and in every disturbance, it is played in core/test_pair."""

from collections import Counter

import pytest
from toys import limits, toy

from vllm_wanspec.core.states import ControllerState
from vllm_wanspec.sim.history import Logs, Setup
from vllm_wanspec.sim.pair import Pair

TOY = toy(seed=2)
PROMPTS = ((1, 2, 3), (4,))


def pair(logs: Logs | None = None, **changes: object) -> Pair:
    settings = {"limits": limits(24, 256, max_branches=4, running_branches=8, branch_depth=4), "burst": 4, **changes}
    return Pair(TOY, Setup(**settings), PROMPTS, logs)  # type: ignore[arg-type]


def run(world: Pair, steps: int, gap: int = 6) -> Pair:
    for _ in range(steps):
        world.tick(gap)
        world.step()
    return world


def test_drafts_are_accepted_and_the_output_is_the_target_s_own() -> None:
    world = run(pair(), 100)
    assert world.now == 600
    for request, prompt in zip(world.requests, PROMPTS, strict=True):
        output = request.context[len(prompt) :]
        assert output == TOY.continuation(prompt, len(output))
        assert request.accepted == len(output) - 100 > 100
    assert world.seen["accepted"] == sum(request.accepted for request in world.requests)
    assert world.counts()["committed_tokens"] > 400


def histories(**changes: object) -> list[tuple[list[list[int]], Counter[str]]]:
    worlds = [run(pair(jitter=5, **changes), 40) for _ in range(2)]
    return [([request.context for request in world.requests], world.counts()) for world in worlds]


def test_a_history_follows_from_its_setup() -> None:
    one, same = histories(seed=5)
    assert one == same
    assert histories(seed=6)[0] != one


@pytest.mark.parametrize("delay", [3, 30])
def test_the_first_drafts_are_there_after_a_round_trip(delay: int) -> None:
    world = pair(delay=delay)
    world.tick(2 * delay - 1)
    assert world.requests[0].session.draft(4, 0.0, world.now_s).tokens == []
    world.tick(6)
    draft = world.requests[0].session.draft(4, 0.0, world.now_s).tokens
    assert draft
    assert draft == TOY.drafted(PROMPTS[0], len(draft))


def test_an_outage_costs_drafts_alone() -> None:
    world = run(pair(), 20)
    world.disconnect()
    drafted = world.seen["drafted"]
    run(world, 20)
    assert world.seen["drafted"] == drafted
    assert {request.session.state for request in world.requests} == {ControllerState.UNSERVED}
    world.connect()
    run(world, 30)
    assert world.seen["drafted"] > drafted
    assert world.seen["re-open"] == 2


def test_processes_that_begin_again_serve_what_is_there() -> None:
    logs = Logs()
    world = run(pair(logs), 20)
    steps = world.counts()["steps"]
    world.restart_controller()
    assert world.counts()["steps"] == steps
    assert len(run(world, 20).requests[0].context) > 43
    assert world.counts()["steps"] > steps
    before = world.host
    world.restart_drafter()
    assert world.host is not before
    accepted = world.seen["accepted"]
    assert run(world, 30).seen["accepted"] > accepted
    assert [record["side"] for record in logs.controller if "side" in record] == ["controller", "controller"]


def test_it_comes_to_rest() -> None:
    world = run(pair(delay=9), 10, gap=1)
    world.settle()
    assert (world.up.in_flight, world.down.in_flight, world.host.running) == (0, 0, 0)
    for request in world.requests:
        assert request.session.draft(24, 0.0, world.now_s).tokens == TOY.drafted(request.context, 24)


def test_a_context_that_no_drafter_takes_is_over() -> None:
    world = run(pair(max_context=20), 40)
    world.settle()
    assert all(world.is_over(request) for request in world.requests)  # the drafter has rejected what became too long
    assert world.seen["reject too_long"] == len(world.requests)
    assert [request.session.draft(4, 0.0, world.now_s).tokens for request in world.requests] == [[], []]
    world.restart_drafter()
    world.settle()
    assert all(world.is_over(request) for request in world.requests)
    assert world.seen["re-open"] == 0


def test_an_engine_that_fails_costs_its_sessions_and_no_more() -> None:
    world = run(pair(), 5, gap=1)
    assert world.host.running
    world.host.fail("out of memory")
    assert world.host.running == 0
    accepted = world.seen["accepted"]
    run(world, 60)
    assert world.seen["reject engine"] >= 1
    assert world.seen["accepted"] > accepted
