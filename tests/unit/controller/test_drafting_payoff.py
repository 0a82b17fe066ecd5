"""Whether DraftPool hands out drafts at all, and what it measures of the target's steps, in played time."""

import pytest
from pool_world import WRONG, World
from pools import LIMIT

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.core.draft import Draft
from vllm_wanspec.core.learned.estimates import StepTimes
from vllm_wanspec.core.policy.length import LEARNING_STEPS, PROBE_STEPS


def running_well(names: str) -> World:
    world = World(names=names, policy="none")
    world.run_well()
    return world


# Whether drafts are handed out


def without_drafts() -> World:
    """A world that has seen some steps before the first draft came."""
    world = World(policy="none")
    for _ in range(8):
        world.step({"a": [world.length["a"]]}, step_s=0.02)  # the last ones used all up that was drafted at first
    return world


def run_badly(world: World, drafts: list[list[int]], steps: int) -> list[int]:
    """Steps for each of which there are drafts, all wrong; how many of them each step was given."""
    offered = []
    for _ in range(steps):
        count = len(drafts[0])
        offered.append(count)
        here = world.length["a"]
        drafts[:] = world.step({"a": [here]}, drafts=count, step_s=0.03 if count else 0.02)
        world.arrive("a", LIMIT, echo=here, wrong=True)
        world.draft(drafts)
    return offered


def test_a_useless_drafter_costs_a_step_now_and_then() -> None:
    world = without_drafts()
    drafts: list[list[int]] = [[]]
    offered = run_badly(world, drafts, 6 * PROBE_STEPS)
    with_drafts = [index for index, count in enumerate(offered) if count]
    assert sum(count > 0 for count in offered[PROBE_STEPS:]) <= 6
    assert len(with_drafts) >= 4  # it goes on probing
    counters = world.pool.counters
    assert counters.unpaid_steps >= 4 * PROBE_STEPS
    assert counters.offered_tokens == sum(offered) + len(drafts[0])


def test_a_useless_drafter_is_found_out_though_no_step_was_ever_without_its_drafts() -> None:
    world = World(policy="none")
    drafts = world.miss("a")
    world.arrive("a", LIMIT, echo=world.length["a"] - 1 + WRONG, wrong=True)
    world.draft(drafts)
    assert world.pool.shared.times.plain.samples == 0.0
    offered = run_badly(world, drafts, LEARNING_STEPS - 1)
    assert all(offered)
    assert world.pool.counters.unpaid_steps == 1
    run_badly(world, drafts, 8 * LEARNING_STEPS)
    assert world.pool.shared.times.plain.samples >= StepTimes.MIN_SAMPLES
    unpaid = world.pool.counters.unpaid_steps
    offered = run_badly(world, drafts, 2 * PROBE_STEPS)
    assert 1 <= sum(count > 0 for count in offered) <= 2  # the probes
    assert world.pool.counters.unpaid_steps - unpaid >= 2 * PROBE_STEPS - 2


def test_a_drafter_that_gets_better_is_used_again() -> None:
    world = without_drafts()
    drafts: list[list[int]] = [[]]
    for good in (False, True):
        for _ in range(3 * PROBE_STEPS):
            count = len(drafts[0])
            here = world.length["a"]
            tokens = list(range(here, here + 1 + (count if good else 0)))
            drafts = world.step({"a": tokens}, drafts=count, step_s=0.024 if count else 0.02)
            missed = world.pending("a")
            world.arrive("a", LIMIT if missed else len(tokens), echo=tokens[-1] if missed else None, wrong=not good)
            world.draft(drafts)
        assert bool(drafts[0]) is good


def test_steps_without_drafts_do_not_count_as_unpaid() -> None:
    world = running_well("a")
    for _ in range(50):
        drafts = world.miss("a")
        world.draft(drafts)
    assert world.pool.counters.unpaid_steps == 0


# What steps cost


def test_the_step_time_is_measured_between_begin_and_end() -> None:
    now = [100.0]
    settings = Settings.model_validate({"draft_endpoints": [{"name": "a", "url": "http://127.0.0.1:9"}]})
    pool = DraftPool(settings, fingerprint="", vocab_size=9, speculation_length=4, clock=lambda: now[0], seed=1)
    pool.step([])
    assert pool.meter.step_s.get(-1.0) == -1.0
    for _ in range(3):
        pool.step_begins()
        now[0] += 0.25
        pool.step([])
        now[0] += 60.0
    assert pool.meter.step_s.get(-1.0) == 0.25
    pool._thread._loop.close()


def test_steps_with_and_without_drafts_are_timed_apart() -> None:
    world = World(policy="none")
    for _ in range(8):
        world.step({"a": [world.length["a"]]}, step_s=0.02)
        world.step({"a": [world.length["a"]]}, drafts=2, step_s=0.025)
        world.step({"a": [world.length["a"]]}, drafts=LIMIT, step_s=0.022)
    times = world.pool.shared.times
    assert (times.plain.at(1), times.drafted.at(3), times.full.at(5)) == pytest.approx((0.02, 0.025, 0.022))


@pytest.mark.parametrize(("others", "pays"), [(["b"], True), ([None], False), (["ghost"], False)])
def test_drafts_are_full_only_where_every_row_has_them(others: list[str | None], pays: bool) -> None:
    world = running_well("ab")
    times = world.pool.shared.times
    for _ in range(200):  # steps with drafts cost four times as much as others, but for those that are full
        times.add(2, drafts=0, full=False, seconds=0.02)
        times.add(6, drafts=4, full=False, seconds=0.08)
        times.add(10, drafts=8, full=True, seconds=0.02)
    line = list(range(world.length["a"], world.length["a"] + LIMIT))
    assert world.pool.draft(["a", *others], LIMIT) == ([line, line] if pays else [[], []])


def test_the_yield_of_requests_that_had_drafts_is_kept_apart() -> None:
    world = running_well("ab")
    drafted, dry = (world.pool._sessions[name] for name in "ab")
    for _ in range(300):
        drafted.draft, drafted.offered, dry.offered = Draft([7, 7, 7], 2.0, 0.5), True, False
        world.pool.step_begins(5, 3)
        world.pool.step([("a", [7, 7, 7]), ("b", [7])])
    assert world.pool.meter.tokens_per_step.get(0.0) == pytest.approx(2.0, abs=0.01)
    assert world.pool.meter.tokens_per_drafted_step.get(0.0) == pytest.approx(3.0, abs=0.01)


def test_what_becomes_of_the_lists_that_were_handed_out_changes_nothing() -> None:
    world = World(policy="none")
    handed_out = world.pool.draft(["a"], LIMIT)
    assert handed_out == [list(range(3, 3 + LIMIT))]
    handed_out[0].clear()  # as vLLM does with drafts that do not fit its budget
    world.step({"a": [3, 4]})
    assert world.pool.meter.tokens_per_drafted_step.get(0.0) == 2.0


def test_steps_that_are_no_example_are_not_timed() -> None:
    world = World(policy="none")
    world.pool.step_begins(0, 0)
    world.now += 5.0
    world.pool.step([("a", [3])])
    times = world.pool.shared.times
    assert (times.plain.samples, times.drafted.samples, times.full.samples) == (0.0, 0.0, 0.0)
