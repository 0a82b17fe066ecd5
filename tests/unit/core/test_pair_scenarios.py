"""Single scenarios of the pair, each with a name and figures that it must reach."""

from collections.abc import Sequence

import pytest
from pair import PROMPTS, Setup, World, sessions_of
from pair_checks import shape
from pair_finish import check_quiet, finish
from toys import VOCAB_SIZE

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.messages import Commit, Limits
from vllm_wanspec.core.states import ControllerState
from vllm_wanspec.sim.models import Language, Profile

NARROW = Limits(24, 256)
WIDE = Limits(24, 256, 4, 8, 4)


def run(world: World, steps: int, gap: int) -> None:
    for _ in range(steps):
        world.tick(gap)
        world.step()
        world.check()


@pytest.mark.parametrize(("limits", "hits"), [(NARROW, 20), (WIDE, 40)], ids=["main line", "branches"])
def test_far_enough_ahead_most_steps_are_served(limits: Limits, hits: int) -> None:
    world = World(Setup(limits, burst=4))
    run(world, 100, 6)
    assert (len(world.requests[0].context) - len(PROMPTS[0])) / 100 > 2.0
    assert world.shared.counters.hits >= hits


def test_branches_save_steps_that_the_main_line_alone_would_lose() -> None:
    lengths = []
    for limits in (NARROW, WIDE):
        world = World(Setup(limits, agreement=0.5, delay=4))
        run(world, 300, 8)
        lengths.append(len(world.requests[0].context))
    main_line, branches = lengths
    assert branches > 1.1 * main_line


def test_a_branch_that_runs_becomes_the_main_line_without_a_new_request() -> None:
    world = World(Setup(WIDE, agreement=0.5, delay=0))
    run(world, 200, 4)
    totals = world.totals()
    assert totals["promoted branch"] >= 5
    assert totals["drafts right after a re-root"] >= 10


def test_without_a_drafter_generation_goes_on() -> None:
    world = World(Setup(NARROW))
    world.disconnect()
    run(world, 50, 1)
    [request] = world.requests
    assert request.context[len(PROMPTS[0]) :] == world.language.continuation(PROMPTS[0], 50)
    assert world.seen["drafted"] == 0
    assert request.session.state is ControllerState.UNSERVED


@pytest.mark.parametrize("limits", [Limits(24, 64), Limits(24, 64, 4, 6, 4)], ids=["main line", "branches"])
def test_memory_and_ids_over_a_long_session(limits: Limits) -> None:
    world = World(Setup(limits, requests=2))
    for _ in range(1_500):
        world.tick(4)
        world.step()
        assert world.up.in_flight + world.down.in_flight < 50
    world.check()
    assert world.shared.counters.opened_sessions == 2
    for request in world.requests:
        assert request.session.tree is not None
        assert request.session.tree.last_id > 2 * 1_500
    check_quiet(world)


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_a_commit_that_arrives_twice_changes_nothing(count: int) -> None:
    world = World(Setup(WIDE, delay=0))
    run(world, 15, 2)
    for _ in range(15):
        run(world, 1, 2)
        world.settle()
        [request] = world.requests
        assert request.number is not None
        session = sessions_of(world)[request.number]
        before = shape(session.tree.cursor)
        position = max(0, len(request.context) - count)
        assert session.committed(Commit(request.number, position, tuple(request.context[position:])), 0.0) == []
        assert shape(session.tree.cursor) == before


def test_a_wide_session_shrinks_to_one_branch_and_grows_again() -> None:
    world = World(Setup(Limits(40, 512, 6, 12, 8)))
    run(world, 10, 5)
    world.resize(1)
    run(world, 40, 5)
    assert world.host.running <= 1
    world.resize(12)
    widest = 0
    for _ in range(20):
        run(world, 1, 2)
        widest = max(widest, world.host.running)
    assert 4 < widest <= 12


def test_commits_far_ahead_of_the_drafter_are_caught_up() -> None:
    world = World(Setup(WIDE, delay=10))
    world.tick(15)
    [request] = world.requests
    for _ in range(3):
        world.commit(request, world.language.continuation(request.context, 300))
        world.tick(1)
    assert request.session.state is ControllerState.BLIND
    finish(world)
    assert request.session.state is ControllerState.SERVED


class Padded(Language):
    """A draft model whose padded vocabulary has ids that nobody else knows, and that now and then draws one."""

    def draft(self, context: Sequence[int]) -> int:
        return self.step(context).token

    def step(self, context: Sequence[int]) -> DraftStep:
        step = super().step(context)
        outside = context[-1] % 7 == 0
        return DraftStep(VOCAB_SIZE + 1, -0.1, 1.0, step.alternatives) if outside else step


def test_an_engine_that_leaves_the_vocabulary_is_not_asked_for_ever() -> None:
    world = World(Setup(NARROW), language=Padded(3, VOCAB_SIZE, Profile.agreeing(0.8)))
    run(world, 60, 6)
    engine = world.host.engine
    before = engine.started
    world.tick(200)
    assert engine.started - before <= 2
    assert world.seen["accepted"] > 20
    assert engine.started < 400
