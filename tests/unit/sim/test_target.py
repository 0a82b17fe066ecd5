"""The played target: what it tells a proposer, what it makes of its drafts, and in what time."""

from types import SimpleNamespace
from typing import Any

from toys import toy

from vllm_wanspec.sim.target import OUTPUT_S, PlayedTarget, Workload, new_request, scheduled

TOY = toy(seed=9)
WORKLOAD = Workload(rows=3, prompt_tokens=6, output_tokens=20, step_ms=30.0, token_ms=0.5, limit=4)


class Clock:
    """Time that passes in sleeps alone."""

    def __init__(self) -> None:
        self.now = 50.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Perfect:
    """A proposer that drafts as the target would, ``count`` tokens; it remembers what it is told."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.words: list[SimpleNamespace] = []
        self.contexts: dict[str, list[int]] = {}
        self._names: list[str] = []

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        self.words.append(scheduler_output)
        self._names = list(runner.input_batch.req_ids)

    def propose(self, sampled: list[list[int]], lengths: Any, token_ids: Any) -> list[list[int]]:
        drafts = []
        for row, name in enumerate(self._names):
            context = token_ids[row, : lengths[row]].tolist()
            assert context[len(context) - len(sampled[row]) :] == sampled[row]
            self.contexts[name] = context
            drafts.append(TOY.continuation(context, self.count))
        return drafts


def played(proposer: Perfect, steps: int) -> tuple[list[Any], Clock]:
    clock = Clock()
    target = PlayedTarget(proposer, TOY, WORKLOAD, clock=lambda: clock.now, sleep=clock.sleep)
    return [target.step() for _ in range(steps)], clock


def test_right_drafts_are_all_accepted() -> None:
    proposer = Perfect(4)
    times, _ = played(proposer, 30)
    assert times[0].decoding == times[0].yielded == 0  # prefill
    for step in times[1:]:
        assert step.yielded == 5 * step.decoding
        assert step.offered in (4 * 3, 4 * 2, 4, 0)
    assert min(step.propose_ns for step in times) > 0
    for context in proposer.contexts.values():
        assert context[6:] == TOY.continuation(context[:6], len(context) - 6)


def test_without_drafts_a_step_gives_a_token_a_row() -> None:
    times, _ = played(Perfect(0), 10)
    assert [step.yielded for step in times[1:]] == [step.decoding for step in times[1:]]
    assert sum(step.offered for step in times) == 0


def test_the_scheduler_says_who_comes_who_goes_and_what_is_verified() -> None:
    proposer = Perfect(2)
    played(proposer, 60)
    first, second, *_ = proposer.words
    assert [request.req_id for request in first.scheduled_new_reqs] == ["request-1", "request-2", "request-3"]
    assert first.num_scheduled_tokens == dict.fromkeys(("request-1", "request-2", "request-3"), 6)
    assert set(second.num_scheduled_tokens.values()) == {1 + 2}
    assert all(len(draft) == 2 for draft in second.scheduled_spec_decode_tokens.values())
    come = [request.req_id for words in proposer.words for request in words.scheduled_new_reqs]
    gone = [name for words in proposer.words for name in words.finished_req_ids]
    assert len(come) == len(set(come)) == len(gone) + 3 > 6
    assert set(gone) < set(come)


def test_steps_take_the_workload_s_time() -> None:
    proposer = Perfect(2)
    times, clock = played(proposer, 20)
    tokens = sum(words.total_num_scheduled_tokens for words in proposer.words)
    assert abs(clock.now - 50.0 - (20 * 0.030 + tokens * 0.0005 + 20 * OUTPUT_S)) < 1e-6
    assert len(times) == 20


def test_what_is_waited_on_purpose_is_told_apart() -> None:
    waited = iter([0.0, 0.25])
    target = PlayedTarget(Perfect(1), TOY, WORKLOAD, waited_s=lambda: next(waited), clock=lambda: 0.0, sleep=bool)
    assert target.step().wait_ns == 250_000_000


def test_words_of_a_scheduler() -> None:
    request = new_request("a", [1, 2], sampling_params=None)
    assert (request.req_id, request.prompt_token_ids, request.sampling_params) == ("a", [1, 2], None)
    words = scheduled([request], {"gone"}, {"a": 2, "b": 3}, {"b": [7, 8]}, limit=3)
    assert (words.total_num_scheduled_tokens, words.num_spec_tokens_to_schedule) == (5, 3)
    assert words.scheduled_spec_decode_tokens == {"b": [7, 8]}
