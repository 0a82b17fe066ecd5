"""The made-up language, and the engine of the drafter without a model that speaks it."""

import asyncio

import pytest

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.sim.language import Language
from vllm_wanspec.sim.synthetic import SteppedEngine


def test_the_language_has_the_statistics_of_real_pairs() -> None:
    language, positions = Language(seed=1), 20_000
    context = language.prompt(1, 10)
    unsure = agreed = near = 0
    for _ in range(positions):
        step, right = language.step(context), language.target(context)
        tokens = [step.token, *(token for token, _ in step.alternatives)]
        assert len(set(tokens)) == 8
        assert all(0 <= token < language.vocab_size for token in tokens)
        unsure += step.entropy_nats >= 1.0
        agreed += right == step.token
        near += right in tokens[1:4]
        context = [*context[-2:], right]
    assert unsure / positions == pytest.approx(0.40, abs=0.02)
    assert agreed / positions == pytest.approx(0.75, abs=0.02)
    assert near / (positions - agreed) == pytest.approx(0.65, abs=0.03)


def test_its_draft_model_is_calibrated_and_ranks_its_tokens() -> None:
    language, context = Language(), [1, 2, 3]
    sure: list[bool] = []
    for _ in range(20_000):
        step, right = language.step(context), language.target(context)
        logprobs = [step.logprob, *(logprob for _, logprob in step.alternatives)]
        assert all(logprob < 0.0 for logprob in logprobs)
        assert logprobs == sorted(logprobs, reverse=True)
        if step.logprob > -0.1054:  # probability above 0.9
            sure.append(right == step.token)
        context = [*context[-2:], right]
    assert sum(sure) / len(sure) == pytest.approx(0.95, abs=0.015)


def test_it_is_the_same_everywhere_and_follows_the_last_three_tokens() -> None:
    one, two = Language(seed=5), Language(seed=5)
    assert one.step([9, 1, 2, 3]) == two.step([8, 1, 2, 3])
    assert one.target([9, 1, 2, 3]) == two.target([1, 2, 3])
    assert one.target([1, 2, 3]) != Language(seed=6).target([1, 2, 3])
    assert one.prompt(1, 50) != one.prompt(2, 50)


def test_verification_ends_with_the_targets_own_token() -> None:
    language, context = Language(), [1, 2, 3]
    line = []
    for _ in range(4):
        line.append(language.target([*context, *line]))
    assert language.verify(context, []) == line[:1]
    assert language.verify(context, line[:3]) == line
    assert language.verify(context, [line[0], line[1] + 1, line[2]]) == line[:2]


def test_a_vocabulary_that_it_cannot_have() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Language(vocab_size=1000)


def test_the_engine_gives_every_branch_its_own_continuation() -> None:
    language = Language()

    async def drafted(engine: SteppedEngine, tokens: tuple[int, ...], count: int) -> list[DraftStep]:
        return [step async for steps in engine.draft(tokens, count) for step in steps]

    async def run() -> tuple[list[list[DraftStep]], dict[str, float]]:
        engine = SteppedEngine(language, step_ms=1.0, branch_ms=0.0)
        stepping = asyncio.create_task(engine.run())
        found = await asyncio.gather(drafted(engine, (1, 2, 3), 5), drafted(engine, (4, 5, 6), 3))
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)
        return found, engine.stats()

    found, stats = asyncio.run(run())
    assert [len(steps) for steps in found] == [5, 3]
    for start, steps in zip(([1, 2, 3], [4, 5, 6]), found, strict=True):
        context = list(start)
        for step in steps:
            assert step == language.step(context)
            context.append(step.token)
    assert stats["tokens"] == 8
    assert stats["steps"] >= 5
    assert stats["busy_s"] >= 0.9 * stats["paced_s"]
