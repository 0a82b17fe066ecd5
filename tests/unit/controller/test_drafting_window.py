"""The adaptive window (AWC) in the pool: it bounds each request's drafts, learns from commits and heeds steps' cost."""

import pytest
from pool_world import WRONG, World
from pools import LIMIT, pool_of

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.core.policy.length import AWC_MAX, StepCost, Window


def window_of(pool: DraftPool, name: str) -> Window:
    window = pool._sessions[name].core.window
    assert window is not None
    return window


def windowed(names: str = "a") -> World:
    """For each request the drafts 3 to 10 are there, and all windows are wide."""
    return World(names=names, length="awc", policy="none")


def test_each_request_has_a_window_of_its_own() -> None:
    world = windowed("abcd")
    for name, size in zip("abc", (0, 1, 3), strict=True):
        window_of(world.pool, name).size = size
    assert window_of(world.pool, "d").size == AWC_MAX > LIMIT
    assert world.pool.draft(list("abcd"), LIMIT) == [[], [3], [3, 4, 5], [3, 4, 5, 6]]


def test_a_request_whose_events_are_recorded_has_one_too() -> None:
    endpoints = [{"name": "d", "url": "http://127.0.0.1:9"}]
    settings = Settings.model_validate({"draft_endpoints": endpoints, "length": {"policy": "awc"}})
    records: list[dict[str, object]] = []
    pool = DraftPool(settings, fingerprint="f", vocab_size=9, speculation_length=LIMIT, sink=records.append, seed=1)
    pool._thread._loop.close()  # nothing is connected
    pool.begin([], [("a", [1, 2])])
    assert window_of(pool, "a").size == AWC_MAX
    assert records[0]["windowed"] is True


@pytest.mark.parametrize("policy", ["fixed", "marginal"])
def test_other_policies_have_none(policy: str) -> None:
    world = World(length=policy, policy="none")
    assert world.pool._sessions["a"].core.window is None
    assert world.pool.draft(["a"], LIMIT) == [[3, 4, 5, 6]]


@pytest.mark.parametrize(("size", "draft"), [(0, []), (1, [4]), (3, [4, 5, 1]), (AWC_MAX, [4, 5, 1, 2])])
def test_what_is_looked_up_keeps_within_the_window_too(size: int, draft: list[int]) -> None:
    length = {"policy": "awc", "shut_off": False}
    with pool_of("http://127.0.0.1:9", fallback=["ngram"], length=length) as pool:
        pool.begin([], [("a", [1, 2, 3, 4, 5, 1, 2])])
        window_of(pool, "a").size = size
        pool.step([("a", [3])])
        assert pool.draft(["a"], LIMIT) == [draft]


def test_two_misses_in_a_row_end_the_drafts_of_a_request_and_of_no_other() -> None:
    """Nothing of the first draft is taken: acceptance is 0, the raw window 0, clamped to 1; twice of that is off."""
    world = windowed("ab")
    sizes = []
    for _ in range(2):
        here = world.length["a"]
        world.miss("a")
        sizes.append(window_of(world.pool, "a").size)
        world.arrive("a", 8, echo=here + WRONG)
        world.arrive("b", LIMIT + 1)
    assert sizes == [1, 0]
    assert window_of(world.pool, "b").size == AWC_MAX
    there = world.length["b"]
    assert world.pool.draft(["a", "b"], LIMIT) == [[], list(range(there, there + LIMIT))]


@pytest.mark.parametrize(("token_s", "size"), [(0.0, AWC_MAX), (0.015, 3)])
def test_what_a_step_costs_bounds_the_window(token_s: float, size: int) -> None:
    """Of a draft one token is taken and the next is not: acceptance is 1 and then 1 + 0.1 (0 - 1) = 0.9.

    A step takes 30 ms, and half as long again per draft token where those cost anything. Tokens per step's time are
    1.9 / 1.5 = 1.27, 2.71 / 2 = 1.36, 3.44 / 2.5 = 1.38 and 4.10 / 3 = 1.37 with one to four drafts: three are best.
    """
    world = windowed()
    times = world.pool.shared.times
    for drafts in (0, 1, 2, 3) * 4:
        times.add(1 + drafts, drafts=drafts, full=False, seconds=0.03 + token_s * drafts)
    here = world.length["a"]
    world.step({"a": [here, here + WRONG]}, drafts=2, step_s=0.03 + token_s * 2)
    assert world.pool.shared.cost == StepCost(pytest.approx(0.03), pytest.approx(0.03), pytest.approx(token_s))
    assert window_of(world.pool, "a").size == size
