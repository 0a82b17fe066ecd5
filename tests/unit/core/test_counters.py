"""What sessions count and learn together."""

from vllm_wanspec.core.counters import Counters, Shared
from vllm_wanspec.core.policy.length import StepCost


def test_counters_are_listed_by_name() -> None:
    counters = Counters(hits=3)
    listed = dict(counters.items())
    assert listed["hits"] == 3
    assert listed["accepted_main_line"] == listed["accepted_branch"] == listed["accepted_lookup"] == 0
    assert all(isinstance(value, int | float) for value in listed.values())


def test_before_anything_is_known_tokens_cost_nothing() -> None:
    assert Shared().cost == StepCost(1.0, 1.0, 0.0)
    assert Shared().times is not Shared().times
