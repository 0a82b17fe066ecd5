"""The engine: what its branches say, by hand, as fast as it is asked, and at a pace; held back, and failing."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from toys import toy

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.sim.engine import HELD_POLL_S, Engine

TOY = toy(seed=3)
PACES = pytest.mark.parametrize("pace", [None, Pacing(1.0)], ids=["as asked", "paced"])


async def drafted(engine: Engine, tokens: tuple[int, ...], count: int) -> list[DraftStep]:
    return [step async for steps in engine.draft(tokens, count) for step in steps]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():
            await asyncio.sleep(0)


def run(scenario: Coroutine[None, None, Any]) -> Any:
    return asyncio.run(scenario)


def expected(tokens: tuple[int, ...], count: int) -> list[DraftStep]:
    context, steps = list(tokens), []
    for _ in range(count):
        steps.append(TOY.step(context))
        context.append(steps[-1].token)
    return steps


@PACES
def test_every_branch_gets_its_own_continuation(pace: Pacing | None) -> None:
    engine = Engine(TOY, pace)

    async def scenario() -> list[list[DraftStep]]:
        return await asyncio.gather(drafted(engine, (1, 2, 3), 5), drafted(engine, (4,), 3))

    assert run(scenario()) == [expected((1, 2, 3), 5), expected((4,), 3)]
    assert (engine.started, engine.running, engine.tokens) == (2, 0, 8)


def test_by_hand_a_branch_gives_what_is_asked_and_no_more_than_is_left() -> None:
    engine = Engine(TOY)
    one, other = engine.begin((1, 2), 5), engine.begin((9,), 2)
    assert engine.running == 2
    assert engine.give(one, 3) + engine.give(one, 3) == expected((1, 2), 5)
    assert engine.give(one) == []
    assert engine.give(other) == expected((9,), 1)
    for branch in (one, other, other):
        engine.end(branch)
    assert (engine.started, engine.running, engine.tokens) == (2, 0, 6)


def test_steps_take_as_long_as_the_pace_says_for_their_branches() -> None:
    engine = Engine(TOY, Pacing(4.0, 1.0))

    async def scenario() -> None:
        await asyncio.gather(*(drafted(engine, (n,), 10) for n in range(3)))

    run(scenario())
    stats = engine.stats()
    assert stats["tokens"] == 30
    assert stats["steps"] >= 10  # all branches in each
    assert stats["paced_s"] >= 10 * 0.007 - 1e-9
    assert stats["busy_s"] >= 0.95 * stats["paced_s"]


def test_tokens_that_are_not_fetched_come_together() -> None:
    async def scenario() -> list[int]:
        engine = Engine(TOY, Pacing(1.0))
        sizes = []
        async for steps in engine.draft((1,), 20):
            sizes.append(len(steps))
            if len(sizes) == 1:
                await until(lambda: engine.tokens >= 6)
        return sizes

    sizes = run(scenario())
    assert sum(sizes) == 20
    assert sizes[1] >= 5


def test_it_rests_between_branches_and_may_change_its_loop() -> None:
    engine = Engine(TOY, Pacing(1.0))
    for _ in range(2):
        assert run(drafted(engine, (1, 2), 4)) == expected((1, 2), 4)
    stats = engine.stats()
    assert 8 <= stats["steps"] <= 10
    assert stats["busy_s"] < 5.0  # nothing in between


@PACES
def test_a_held_engine_gives_nothing_until_it_is_let_go(pace: Pacing | None) -> None:
    async def scenario() -> list[DraftStep]:
        engine = Engine(TOY, pace)
        engine.held = True
        task = asyncio.create_task(drafted(engine, (1,), 6))
        await until(lambda: engine.running)
        looked_s = time.monotonic() + 10 * HELD_POLL_S
        await until(lambda: time.monotonic() > looked_s)
        assert engine.tokens == 0
        assert not task.done()
        engine.held = False
        return await task

    assert run(scenario()) == expected((1,), 6)


@PACES
def test_a_fault_ends_every_branch_until_it_is_gone(pace: Pacing | None) -> None:
    async def scenario() -> None:
        engine = Engine(TOY, pace)
        tasks = [asyncio.create_task(drafted(engine, (n,), 10_000)) for n in range(2)]
        await until(lambda: engine.tokens > 4)
        engine.fault = RuntimeError("out of memory")
        for failed in await asyncio.gather(*tasks, return_exceptions=True):
            assert failed is engine.fault
        assert engine.running == 0
        engine.fault = None
        assert await drafted(engine, (5,), 3) == expected((5,), 3)

    run(scenario())


@PACES
def test_a_branch_that_is_closed_is_gone(pace: Pacing | None) -> None:
    async def scenario() -> None:
        engine = Engine(TOY, pace)
        stream = engine.draft((1,), 10_000)
        await anext(stream)
        assert engine.running == 1
        await stream.aclose()
        assert engine.running == 0
        given = engine.tokens
        assert await drafted(engine, (5,), 3) == expected((5,), 3)
        assert engine.tokens == given + 3

    run(scenario())
