"""The invented pair: statistics of the standard profile, agreement as asked, small vocabularies and short contexts."""

import math

import pytest

from vllm_wanspec.sim.models import LEAST_AGREEMENT, Language, Profile, RandomTokens


def test_the_standard_profile_has_the_statistics_of_real_pairs() -> None:
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


def contexts(count: int, vocab_size: int) -> list[list[int]]:
    """All different, and none longer than three tokens."""
    return [[n % vocab_size, n // vocab_size % vocab_size, n // vocab_size**2] for n in range(count)]


@pytest.mark.parametrize("vocab_size", [32, 64, 1 << 17])
@pytest.mark.parametrize("agreement", [LEAST_AGREEMENT, 0.5, 0.52, 0.7, 0.8, 0.95, 0.99])
def test_both_models_agree_as_often_as_asked(agreement: float, vocab_size: int) -> None:
    language = Language(3, vocab_size, Profile.agreeing(agreement))
    found, promised = [], []
    for context in contexts(20_000, vocab_size):
        step = language.step(context)
        found.append(step.token == language.target(context))
        promised.append(math.exp(step.logprob))
    assert sum(found) / len(found) == pytest.approx(agreement, abs=0.015)
    assert sum(promised) / len(promised) == pytest.approx(agreement, abs=0.01)  # and the draft model says so


@pytest.mark.parametrize("agreement", [LEAST_AGREEMENT, 0.5, 0.75, 0.95])
def test_the_draft_model_is_calibrated_and_ranks_its_tokens(agreement: float) -> None:
    language = Language(0, 64, Profile.agreeing(agreement))
    promised, hits = [0.0] * 10, [0] * 10
    counts = [0] * 10
    for context in contexts(20_000, 64):
        step, right = language.step(context), language.target(context)
        ranked = [(step.token, step.logprob), *step.alternatives]
        logprobs = [logprob for _, logprob in ranked]
        assert len({token for token, _ in ranked}) == 8
        assert logprobs == sorted(logprobs, reverse=True)
        assert logprobs[0] > logprobs[1]
        assert max(logprobs) < 0.0
        assert sum(map(math.exp, logprobs)) <= 1.0
        for token, logprob in ranked:
            bucket = min(9, int(10 * math.exp(logprob)))
            counts[bucket] += 1
            promised[bucket] += math.exp(logprob)
            hits[bucket] += token == right
    for total, expected, found in zip(counts, promised, hits, strict=True):
        if total > 500:
            assert found / total == pytest.approx(expected / total, abs=0.03)
    assert max(counts) > 10_000


@pytest.mark.parametrize("agreement", [0.0, 0.29, 1.0, 1.5, math.nan])
def test_an_agreement_that_no_pair_has(agreement: float) -> None:
    with pytest.raises(ValueError, match=r"agreement must be from 0\.3 to below 1, not"):
        Profile.agreeing(agreement)


def test_it_is_the_same_everywhere_and_follows_the_last_three_tokens() -> None:
    one, two = Language(seed=5), Language(seed=5)
    assert one.step([9, 1, 2, 3]) == two.step([8, 1, 2, 3])
    assert one.target([9, 1, 2, 3]) == two.target([1, 2, 3])
    assert one.target([1, 2, 3]) != Language(seed=6).target([1, 2, 3])
    assert one.prompt(1, 50) != one.prompt(2, 50)


def test_a_short_context_is_one_that_begins_with_zeros() -> None:
    language = Language(2, 64)
    for short, full in (([7], [0, 0, 7]), ((3, 7), (0, 3, 7)), ([], [0, 0, 0])):
        assert language.step(short) == language.step(full)
        assert language.target(short) == language.target(full)
        assert language.verify(short, []) == [language.target(full)]
    assert len({language.target([token]) for token in range(64)}) > 20


def test_lines_of_both_models_follow_from_single_tokens() -> None:
    language = Language(4, 64)
    for model, line in ((language.target, language.continuation([5], 40)), (language.draft, language.drafted([5], 40))):
        context = [5]
        for token in line:
            assert token == model(context)
            context.append(token)
        assert len(line) == 40
    assert language.draft([5]) == language.step([5]).token


def test_verification_ends_with_the_target_s_own_token() -> None:
    language, context = Language(), [1, 2, 3]
    line = language.continuation(context, 4)
    assert language.verify(context, []) == line[:1]
    assert language.verify(context, line[:3]) == line
    assert language.verify(context, [line[0], line[1] + 1, line[2]]) == line[:2]


def test_languages_of_one_size_share_their_vocabulary() -> None:
    assert Language(1, 64).fingerprint == Language(2, 64).fingerprint != Language(1, 128).fingerprint
    assert sorted(Language(1, 64).vocabulary.values()) == list(range(64))


@pytest.mark.parametrize("vocab_size", [0, 16, 1000])
def test_a_vocabulary_that_it_cannot_have(vocab_size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Language(vocab_size=vocab_size)


def test_random_tokens_are_of_the_vocabulary_and_sure() -> None:
    model = RandomTokens(50, seed=1)
    steps = [model.step([1, 2, 3]) for _ in range(200)]
    tokens = {step.token for step in steps}
    assert tokens <= set(range(50))
    assert len(tokens) > 40
    assert all(step.token not in {token for token, _ in step.alternatives} for step in steps)
    assert all(step.logprob > logprob for step in steps for _, logprob in step.alternatives)
