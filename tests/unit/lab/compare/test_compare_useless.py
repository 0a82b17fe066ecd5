"""The drafter that sends nonsense."""

from __future__ import annotations

from vllm_wanspec.sim.useless import RandomTokens


def test_random_tokens_are_of_the_vocabulary_and_sure() -> None:
    model = RandomTokens(50, seed=1)
    steps = [model.step([1, 2, 3]) for _ in range(200)]
    tokens = {step.token for step in steps}
    assert tokens <= set(range(50))
    assert len(tokens) > 40
    assert all(step.token not in {token for token, _ in step.alternatives} for step in steps)
    assert all(step.logprob > logprob for step in steps for _, logprob in step.alternatives)
