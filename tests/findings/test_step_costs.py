"""What a step costs and yields: whether drafts are handed out where they pay, and only there, in played time."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from finding import finding
from worlds import Costs, Distance, DistantWorld, World, unconnected_pool

from vllm_wanspec.controller.v1.proposer import RemoteProposer
from vllm_wanspec.core.learned.calibration import OUTCOMES, Calibration
from vllm_wanspec.core.messages import Nodes
from vllm_wanspec.core.policy.expansion import lookahead_tokens
from vllm_wanspec.core.policy.lookup import LookupRates
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.sim.target import Runner, new_request

NEVER_SLOWER = 0.98
"""Of plain vLLM's tokens per second: the promise for a drafter of little or no use."""
SHORT = Costs(8e-3, 2e-5, 4e-5)
"""Steps over short contexts."""
LONG = Costs(8e-3, 3e-4, 4e-5)
"""Steps over long contexts, whose rows are what takes time."""


def shortening(costs: Costs, to: Costs, steps: int) -> Sequence[Costs]:
    """Contexts get shorter little by little, as long ones finish."""
    change = (to.row_s - costs.row_s) / steps
    return [costs._replace(row_s=costs.row_s + index * change) for index in range(steps)]


def best_fixed(rows: int, agreement: float, costs: Costs, most: int) -> float:
    """Tokens per second of the best fixed number of drafts per row, with enough of them always there."""
    expected = [(1 - agreement ** (count + 1)) / (1 - agreement) for count in range(most + 1)]
    return max(rows * expected[count] / costs.step_s(rows, rows * count) for count in range(most + 1))


@finding("1.1", "what a step without drafts takes is never measured again once 4 samples are known")
@pytest.mark.parametrize("policy", ["fixed", "marginal"])
def test_a_poor_drafter_costs_next_to_nothing_after_contexts_have_become_short(policy: str) -> None:
    world = World(64, speculation=4, agreement=0.3, seed=2, length={"policy": policy})
    world.run(120, LONG)
    for costs in shortening(LONG, SHORT, 60):
        world.step(costs)
    world.run(250, SHORT)
    plain = 64 / SHORT.step_s(64)
    assert world.run(250, SHORT) >= NEVER_SLOWER * plain


@finding("1.2", "a threshold above the first token's chance offers nothing, and nothing measures the costs again")
def test_drafts_come_back_when_tokens_have_become_cheap() -> None:
    world = World(8, speculation=4, agreement=0.6, seed=2, length={"policy": "marginal"})
    long, short = LONG._replace(draft_s=1e-5), SHORT._replace(draft_s=1e-5)
    for _ in range(400):
        if world.rng.random() < 0.1:
            world.resize(world.rng.randint(4, 48))
        world.step(long)
    world.resize(48)
    for index, costs in enumerate(shortening(long, short, 40)):
        world.step(costs)
        if index % 2 == 0:
            world.resize(48 + 48 * index // 38)
    world.run(200, short)
    assert world.run(100, short) >= 0.9 * best_fixed(96, 0.6, short, 4)


@finding("1.3", "either all drafts are offered or none, though one per row pays best")
def test_the_length_between_all_and_nothing_is_found() -> None:
    costs = Costs(8e-3, 2e-5, 6e-5)
    world = World(64, speculation=8, agreement=0.6, seed=3, length={"policy": "marginal"})
    world.run(200, costs)
    assert world.run(150, costs) >= 0.95 * best_fixed(64, 0.6, costs, 8)


@finding("1.4", "rows are those of the last step without prefill: 60 are taken for 1")
def test_a_wait_is_held_against_all_rows_though_every_step_has_prefill() -> None:
    world = World(1, speculation=4, agreement=0.9, seed=4, late={"policy": "adaptive", "max_wait_ms": 15})
    costs = Costs(30e-3, 0.0, 0.0, chunk_s=30e-3)
    world.run(50, costs)
    world.resize(60)
    world.run(50, costs, chunk=True)
    world.link.turnaround.answer_s.add(0.010)
    world.silent.update(world.names[:3])  # the answer to their next miss takes its time
    before = world.pool.counters.wait_seconds
    world.run(20, costs, chunk=True)
    # 10 ms hold back a sixth of a step, some 35 tokens, for three requests of which each gains 4 at most.
    assert world.pool.counters.wait_seconds - before < 0.002  # what is all but there may be waited for


@finding("1.4", "steps with prefill teach nothing of costs, so drafts that do not pay are never withheld")
def test_a_useless_drafter_costs_next_to_nothing_though_every_step_has_prefill() -> None:
    costs = SHORT._replace(chunk_s=5e-3)
    world = World(64, speculation=4, agreement=0.05, seed=5)
    world.run(300, costs, chunk=True)
    plain = 64 / costs.step_s(64, chunks=1)
    assert world.run(200, costs, chunk=True) >= NEVER_SLOWER * plain


@finding("1.5", "rows without a session count as rows that yield nothing")
def test_rows_without_a_session_yield_their_tokens_too() -> None:
    now = 100.0
    pool = unconnected_pool(lambda: now)
    remote, runner = RemoteProposer.over(pool, pool._settings.tree, 8), Runner(8, 1)
    names = ["a", "b", "c", "d"]
    new = [new_request("a", [1]), *(new_request(name, [1], mm_features=[object()]) for name in names[1:])]
    lengths = np.ones(4, dtype=np.int32)
    for _ in range(200):
        scheduled = SimpleNamespace(
            scheduled_new_reqs=new,
            finished_req_ids=set(),
            num_spec_tokens_to_schedule=None,
            scheduled_spec_decode_tokens={},
            num_scheduled_tokens=dict.fromkeys(names, 1),
            total_num_scheduled_tokens=4,
        )
        remote.begin_step(runner, scheduled)
        now += 0.030
        runner.input_batch.req_ids, new = names, []
        lengths += np.array([3, 1, 1, 1], dtype=np.int32)
        remote.propose([[1, 2, 3], [1], [1], [1]], lengths, None)
    assert pool.meter.tokens_per_step.get(0.0) == pytest.approx(1.5)


@finding("1.5", "with a maximum below vLLM's, steps of short rows are taken for those that run as full graphs")
def test_full_rows_are_those_of_all_the_tokens_that_vllm_schedules() -> None:
    now = 100.0
    pool = unconnected_pool(lambda: now, length={"max": 4})
    pool.begin([], [("a", [1])])
    for _ in range(8):
        pool.step_begins(5, 4)
        now += 0.030
        pool.step([("a", [1])])
    assert pool.shared.times.full.samples == 0.0


@finding("1.5", "the adaptive window prices a row as if it were alone in the batch")
def test_an_adaptive_window_knows_what_drafts_cost_a_batch() -> None:
    costs = Costs(8e-3, 2e-5, 6e-5)
    world = World(64, speculation=8, agreement=0.6, seed=3, length={"policy": "awc", "shut_off": False})
    world.run(200, costs)
    assert world.run(150, costs) >= 0.9 * best_fixed(64, 0.6, costs, 8)


def test_finished_requests_are_not_waited_for() -> None:
    world = World(0, speculation=4, agreement=0.9, seed=6, late={"policy": "fixed", "max_wait_ms": 5})
    costs = Costs(30e-3, 0.0, 0.0)
    asked = SimpleNamespace(extra_args=None, max_tokens=3, min_tokens=0, stop_token_ids=[], ignore_eos=True)
    world.join("short", sampling_params=asked)
    world.silent.add("short")
    world.run(2, costs)
    before = world.pool.counters.wait_seconds
    world.step(costs)
    assert world.tokens == 3
    assert world.pool.counters.wait_seconds == before


@finding("1.6", "what one drafter sends teaches the calibration that the sessions of all drafters share")
def test_a_drafter_that_is_surely_wrong_does_not_spoil_another() -> None:
    pool = unconnected_pool(lambda: 100.0, drafters=2, length={"shut_off": False})
    bad, good = pool.links
    bad.welcome, welcome = None, bad.welcome
    pool.begin([], [("before", [1, 2, 3])])  # the good one has a history: what it is sure of is right
    for index in range(1000):
        record = NodeRecord(index + 1, index, 7, -0.005, 0.03)
        pool.link_received(good, [Nodes(1, 3 + index, (record,))])
        pool.step([("before", [7])])
    good.welcome, bad.welcome, back = None, welcome, good.welcome
    pool.begin([], [("bad", [1, 2, 3])])
    tree = pool._sessions["bad"].core.tree
    assert tree is not None
    for index in range(3000):
        number = 2 * index + 1
        pool.link_received(bad, [Nodes(1, 3 + index, (NodeRecord(number, number - 1, 100, -0.001, 0.005),))])
        pool.step([("bad", [7])])  # which takes the id after that
    good.welcome, bad.welcome = back, None
    pool.begin([], [("after", [1, 2, 3])])
    sure = tuple(NodeRecord(index + 1, index, 10 + index, -0.005, 0.03) for index in range(8))
    pool.link_received(good, [Nodes(2, 3, sure)])
    drafted = pool._sessions["after"].core.draft(8, 0.25, 100.0).drafted
    assert drafted == list(range(10, 18))


@finding("1.6", "agreement is that of all time, whatever came since")
def test_agreement_follows_what_happens_now() -> None:
    calibration = Calibration()
    for outcome, count in ((OUTCOMES.index("agreed"), 20_000), (OUTCOMES.index("outside"), 10_000)):
        for _ in range(count):
            calibration.saw_outcome(0.9, outcome)
    assert calibration.agreement() < 0.3


@finding("1.6", "lookup's rates are those of all time, whatever came since")
def test_lookup_rates_follow_what_happens_now() -> None:
    rates = LookupRates()
    for taken, count in ((5, 20_000), (6, 10_000)):
        for _ in range(count):
            rates.saw(3, [5], [taken])
    assert rates.chance[3] < 0.3


def lookaheads(world: World) -> list[int]:
    """What the drafter was told of how far to draft, in whatever messages carry limits."""
    return [message.limits.lookahead for message in world.sent if hasattr(message, "limits")]


@finding("1.7", "the step time that lookahead follows from includes prefill")
def test_a_few_chunks_of_a_prompt_do_not_shorten_lookahead() -> None:
    world = World(1, speculation=8, agreement=0.8, seed=7)
    world.link._rtt_s.add(0.100)
    decoding = Costs(10e-3, 0.0, 0.0, chunk_s=390e-3)
    world.run(60, decoding)
    world.run(6, decoding, chunk=True)
    world.resize(2)
    world.run(1, decoding)
    assert lookaheads(world)[-1] >= 0.8 * lookahead_tokens(0.100, 0.010, 8)


@finding("1.7", "lookahead is fixed when a session opens, by a step time that was only assumed")
def test_lookahead_of_an_open_session_follows_the_step_time() -> None:
    world = World(1, speculation=8, agreement=0.8, seed=7)
    world.link._rtt_s.add(0.100)
    world.run(300, Costs(10e-3, 0.0, 0.0))
    assert lookaheads(world)[-1] >= 0.8 * lookahead_tokens(0.100, 0.010, 8)


# The late rule is right: these hold it in place.

SLOW_AND_NEAR = (Distance(0.005, 0.002), Costs(100e-3, 0.0, 1e-4), 0.9)
"""A drafter so near to so slow a target that waiting for it pays."""


def gain(rows: int, place: tuple[Distance, Costs, float], late: dict[str, object], steps: int = 300) -> float:
    """Tokens per second with this late policy, in those without any waits."""
    distance, costs, agreement = place
    rates = []
    for policy in ({"policy": "none"}, late):
        world = DistantWorld(rows, distance, speculation=8, agreement=agreement, seed=5, late=policy)
        world.run(150, costs)
        rates.append(world.run(steps, costs))
    return rates[1] / rates[0]


@pytest.mark.parametrize(("most_ms", "least"), [(15.0, 1.08), (60.0, 1.2)])
def test_waiting_pays_where_the_drafter_is_near_and_the_target_slow(most_ms: float, least: float) -> None:
    assert gain(1, SLOW_AND_NEAR, {"policy": "adaptive", "max_wait_ms": most_ms}, steps=800) >= least


@pytest.mark.parametrize(
    ("rows", "distance", "step_s"),
    [(1, Distance(0.030, 0.0065), 0.035), (1, Distance(0.020, 0.003), 0.010), (8, Distance(0.030, 0.0065), 0.035)],
)
def test_the_rule_never_waits_where_fixed_waits_lose(rows: int, distance: Distance, step_s: float) -> None:
    place = (distance, Costs(step_s, 0.0, 1e-4), 0.8)
    assert gain(rows, place, {"policy": "fixed", "max_wait_ms": 15}) < 0.98
    assert gain(rows, place, {"policy": "adaptive"}) >= 0.99


@finding("1.8", "the longest wait is a setting of 15 ms and not derived from what waiting is worth")
def test_as_shipped_the_rule_waits_as_long_as_it_pays() -> None:
    farther = (Distance(0.020, 0.003), Costs(100e-3, 0.0, 1e-4), 0.9)
    assert gain(1, farther, {"max_wait_ms": 60.0}) >= 1.08  # so much is there to be had
    assert gain(1, farther, {}) >= 1.08
