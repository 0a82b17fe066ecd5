"""What Model Runner V2 is told in each step, and what becomes of its output; the pool's part is played."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import LogLines

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller.mrv2.steps import RemoteDrafts, Told
from vllm_wanspec.controller.requests import Requests
from vllm_wanspec.core.block import NO_WALK, Walked

LIMIT = 4


class PlayedPool:
    """Notes what it is told, and gives out what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.contexts: dict[str, list[int]] = {}
        self.drafts: dict[str, list[int]] = {}
        self.error: Exception | None = None

    def step_begins(self, tokens: int, drafts: int) -> tuple[int, int]:
        return tokens, drafts

    def begin(
        self, finished: list[str], new: Sequence[Any], trees: Sequence[Any] = (), ends: Sequence[int] = ()
    ) -> None:
        self.calls.append(("begin", finished, [(name, list(context)) for name, context in new], list(ends)))
        for name in finished:
            self.contexts.pop(name, None)
        self.contexts.update((name, list(context)) for name, context in new)

    def place(self, request: str, slot: int | None) -> None:
        self.calls.append(("place", request, slot))

    def context(self, request: str) -> list[int] | None:
        return self.contexts.get(request)

    def step(self, rows: Sequence[Any], told: Sequence[Walked] = (), began: Any = None) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("step", [(name, list(tokens)) for name, tokens in rows], list(told), began))

    def draft(self, requests: Sequence[str | None], limit: int) -> list[list[int]]:
        return [self.drafts.get(name, [])[:limit] if name is not None else [] for name in requests]

    def lengths(self, requests: Sequence[str], limit: int, *, uniform: bool) -> list[int]:
        lengths = [limit if name in self.drafts else 0 for name in requests]
        return [limit] * len(lengths) if uniform and any(lengths) else lengths


class PlayedBinding:
    """Notes what it binds; each draft is told as its request's name says."""

    def __init__(self, told: dict[str, Walked] | None = None) -> None:
        self.bound: list[tuple[list[str], list[int], list[int], bool]] = []
        self.told = told
        self.error: Exception | None = None

    def bind(self, requests: Sequence[str], slots: Any, placed: Sequence[Sequence[int]], fixed: bool) -> Told | None:
        if self.error is not None:
            raise self.error
        self.bound.append((list(requests), list(slots), [len(row) for row in placed], fixed))
        if self.told is None:
            return None
        told, rows = dict(self.told), list(requests)
        return lambda: [told.get(name, NO_WALK) for name in rows]


class World:
    def __init__(self, *, wishes: bool = False, told: dict[str, Walked] | None = None, **more: Any) -> None:
        self.pool, self.binding = PlayedPool(), PlayedBinding(told)
        self.shared: list[list[int]] = []
        self.requests = Requests(self.pool, TreeSettings(), max_model_len=100)  # type: ignore[arg-type]
        share = lambda slots: self.shared.append(list(slots))  # noqa: E731
        self.drafts = RemoteDrafts(self.requests, self.binding, LIMIT, share=share, wishes=wishes, **more)


def new(name: str, prompt: list[int], prefill: list[int] | None = None, **changes: Any) -> SimpleNamespace:
    params = SimpleNamespace(max_tokens=50, extra_args=None)
    fields = {"req_id": name, "prompt_token_ids": prompt, "prefill_token_ids": prompt if prefill is None else prefill}
    return SimpleNamespace(**fields | {"mm_features": [], "prompt_embeds": None, "sampling_params": params} | changes)


def output(
    rows: dict[str, list[int]] | None = None,
    *,
    fresh: Sequence[Any] = (),
    finished: Sequence[str] = (),
    preempted: Sequence[str] = (),
    structured: bool = False,
) -> SimpleNamespace:
    """As much of a scheduler's output as is looked at; per row the drafts that it has laid out."""
    rows = rows or {}
    return SimpleNamespace(
        scheduled_new_reqs=list(fresh),
        finished_req_ids=set(finished),
        preempted_req_ids=set(preempted) or None,
        scheduled_spec_decode_tokens={name: tokens for name, tokens in rows.items() if tokens},
        num_scheduled_tokens={name: 1 + len(tokens) for name, tokens in rows.items()},
        total_num_scheduled_tokens=sum(1 + len(tokens) for tokens in rows.values()),
        has_structured_output_requests=structured,
    )


HOLD = [-1] * LIMIT


# Requests go and come


def test_requests_come_with_their_slots_and_go() -> None:
    world = World()
    world.drafts.added(output(fresh=[new("a", [1, 2]), new("b", [3])]), {"a": 5, "b": 0, "other": 1})
    assert world.pool.calls == [
        ("begin", ["a", "b"], [("a", [1, 2]), ("b", [3])], [52, 51]),
        ("place", "a", 5),
        ("place", "b", 0),
    ]
    world.pool.calls.clear()
    world.drafts.finished(output(finished=["a"]))
    assert world.pool.calls == [("begin", ["a"], [], [])]


def test_a_preempted_request_keeps_its_session_and_loses_its_slot() -> None:
    world = World()
    world.drafts.added(output(fresh=[new("a", [1, 2])]), {"a": 5})
    world.pool.contexts["a"] = [1, 2, 7, 8]
    world.pool.calls.clear()
    world.drafts.finished(output(preempted=["a"]))
    assert world.pool.calls == [("place", "a", None)]
    world.pool.calls.clear()
    world.drafts.added(output(fresh=[new("a", [1, 2], prefill=[1, 2, 7, 8])]), {"a": 3})
    assert world.pool.calls == [("place", "a", 3)]


@pytest.mark.parametrize("prefill", [[1, 2, 7], [1, 2, 7, 9], [1, 2, 7, 8, 9]])
def test_a_request_that_comes_back_with_another_text_begins_anew(prefill: list[int]) -> None:
    world = World()
    world.drafts.added(output(fresh=[new("a", [1, 2])]), {"a": 5})
    world.pool.contexts["a"] = [1, 2, 7, 8]
    world.pool.calls.clear()
    world.drafts.added(output(fresh=[new("a", [1, 2], prefill=prefill)]), {"a": 3})
    assert world.pool.calls == [("begin", ["a"], [("a", prefill)], [52]), ("place", "a", 3)]


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_params": None},
        {"mm_features": [1]},
        {"prompt_embeds": 1},
        {"prefill_token_ids": None},
        {"sampling_params": SimpleNamespace(max_tokens=1, extra_args=None)},
        {"sampling_params": SimpleNamespace(max_tokens=9, extra_args={"wanspec": "off"})},
    ],
    ids=str,
)
def test_requests_that_are_not_drafted_for_open_nothing(changes: dict[str, Any]) -> None:
    world = World()
    world.drafts.added(output(fresh=[new("a", [1, 2], **changes)]), {"a": 5})
    assert [call for call in world.pool.calls if call[0] == "begin" and call[2]] == []


def test_the_requests_of_a_warm_up_open_no_session() -> None:
    world = World(told={})
    world.drafts.warming_up = True
    world.drafts.added(output(fresh=[new("_warmup_0_", [0, 1])]), {"_warmup_0_": 0})
    world.drafts.bind(output({"_warmup_0_": [0, 0]}), ["_warmup_0_"], [0])
    step = world.drafts.take_step()
    assert step is not None
    assert world.drafts.ended(step, [[5]]) is None
    world.drafts.finished(output(finished=["_warmup_0_"]))
    assert world.pool.calls == []
    assert world.binding.bound == []
    assert world.shared == [[0]]  # which the other ranks, who warm up as well, expect


# Steps laid out after the one before has ended


def test_a_step_is_bound_committed_and_laid_out_anew() -> None:
    world = World()
    world.pool.drafts = {"a": [5, 6], "b": [7]}
    drafted = output({"a": [5, 6], "b": []})
    world.drafts.bind(drafted, ["a", "b"], [3, 1])
    assert world.binding.bound == [(["a", "b"], [3, 1], [2, 0], False)]
    step = world.drafts.take_step()
    assert step is not None and world.drafts.take_step() is None
    assert world.drafts.ended(step, [[5, 9], []]) is None
    assert world.pool.calls == [("step", [("a", [5, 9]), ("b", [])], [], (4, 2))]
    assert world.drafts.laid_out(["a", "b"]) == [[5, 6], []]  # b is in its prefill still


def test_what_the_grammar_has_seen_is_not_exchanged() -> None:
    world = World()
    world.drafts.bind(output({"a": [5, 6]}, structured=True), ["a"], [3])
    assert world.binding.bound == [(["a"], [3], [2], True)]
    world.drafts.bind_early(["a"], [3])
    assert len(world.binding.bound) == 1  # without async scheduling the scheduler has the drafts in time


# Steps laid out before the one before has ended


def test_drafts_that_a_device_made_are_told_with_the_output() -> None:
    world = World(wishes=True, told={"a": Walked([5, 6, 7, 8], 3), "b": Walked([9], 0)})
    world.drafts.bind(output({"a": HOLD[:2], "b": HOLD, "c": []}), ["a", "b", "c"], [0, 1, 2])
    step = world.drafts.take_step()
    assert step is not None
    world.pool.drafts = {"a": []}
    assert world.drafts.ended(step, [[5, 6, 1], [4], [3]]) == {"a": LIMIT, "b": 0, "c": 0}
    told = [Walked([5, 6], 1), Walked([9], 0), Walked([], 0)]
    assert world.pool.calls == [("step", [("a", [5, 6, 1]), ("b", [4]), ("c", [3])], told, (9, 6))]


def test_two_steps_may_be_under_way() -> None:
    world = World(wishes=True, told={"a": Walked([1], 0)})
    world.drafts.bind(output({"a": HOLD}), ["a"], [0])
    first = world.drafts.take_step()
    world.binding.told = {"a": Walked([2], 0)}
    world.drafts.bind(output({"a": HOLD}), ["a"], [0])
    second = world.drafts.take_step()
    assert first is not None and second is not None
    world.drafts.ended(first, [[1, 8]])
    world.drafts.ended(second, [[2, 9]])
    assert [call[2] for call in world.pool.calls] == [[Walked([1], 0)], [Walked([2], 0)]]


def test_a_wish_is_the_same_for_all_rows_where_graphs_want_it() -> None:
    world = World(wishes=True, told={}, uniform=True)
    world.pool.drafts = {"a": []}
    world.drafts.bind(output({"a": [], "b": []}), ["a", "b"], [0, 1])
    step = world.drafts.take_step()
    assert step is not None
    assert world.drafts.ended(step, [[1], [2]]) == {"a": LIMIT, "b": LIMIT}


def test_drafts_under_a_grammar_are_bound_early_and_stay() -> None:
    told = {"a": Walked([5, 6], 0), "b": Walked([7], 1)}
    world = World(wishes=True, told=told)
    world.drafts.bind_early(["a", "b"], [0, 1])
    assert world.binding.bound == [(["a", "b"], [0, 1], [LIMIT, LIMIT], False)]
    assert world.drafts.laid_out(["a", "b"]) == [[5, 6], [7]]
    # The next step has its rows in another order, and one that was not there.
    world.binding.told = {}
    world.drafts.bind(output({"c": HOLD, "b": HOLD, "a": HOLD}, structured=True), ["c", "b", "a"], [2, 1, 0])
    assert len(world.binding.bound) == 1
    step = world.drafts.take_step()
    assert step is not None
    world.drafts.ended(step, [[1], [7, 2], [5, 3]])
    assert world.pool.calls[-1][2] == [Walked([], 0), Walked([7], 1), Walked([5, 6], 0)]
    # And the one after is bound late again.
    world.drafts.bind(output({"a": HOLD}), ["a"], [0])
    assert len(world.binding.bound) == 2


def test_lists_that_the_scheduler_gets_are_its_own() -> None:
    """vLLM cuts and fills them in place, those of rows without a draft too."""
    world = World(wishes=True, told={"a": NO_WALK, "b": NO_WALK, "c": Walked([5], 0)})
    world.drafts.bind_early(["a", "b", "c"], [0, 1, 2])
    for draft in world.drafts.laid_out(["a", "b", "c"]) or ():
        draft.extend([-1, -1])
    assert Walked([], 0) == NO_WALK
    assert world.drafts.laid_out(["a", "b", "c"]) == [[], [], [5]]


def test_without_early_drafts_the_scheduler_keeps_its_placeholders() -> None:
    world = World(wishes=True, told={})
    assert world.drafts.laid_out(["a"]) is None


# Several ranks


def test_other_ranks_share_and_do_nothing_else() -> None:
    shared: list[list[int]] = []
    drafts = RemoteDrafts(None, None, LIMIT, share=lambda slots: shared.append(list(slots)), wishes=True)
    drafts.added(output(fresh=[new("a", [1])]), {"a": 2})
    drafts.bind(output({"a": HOLD}), ["a"], [2])
    step = drafts.take_step()
    assert step is not None
    assert drafts.ended(step, [[1]]) is None
    drafts.bind_early(["a"], [2])
    drafts.bind(output({"a": HOLD}), ["a"], [2])
    drafts.finished(output(finished=["a"]))
    assert shared == [[2], [2]]
    assert drafts.laid_out(["a"]) is None


def test_the_ranks_share_whatever_has_gone_wrong_on_the_first(log: LogLines) -> None:
    world = World(wishes=True, told={})
    world.binding.error = RuntimeError("broken")
    for _ in range(2):
        world.drafts.bind(output({"a": HOLD}), ["a"], [2])
    world.drafts.bind_early(["a"], [2])
    world.drafts.bind(output({"a": []}), ["a"], [2])  # no drafts laid out: nothing to share
    assert world.shared == [[2], [2], [2]]
    assert len([line for line in log.lines() if "a fault of its own" in line]) == 1


# Faults of ours


def test_after_a_fault_there_are_no_drafts(log: LogLines) -> None:
    world = World()
    world.pool.drafts = {"a": [5]}
    world.drafts.bind(output({"a": []}), ["a"], [0])
    step = world.drafts.take_step()
    assert step is not None
    world.pool.error = RuntimeError("broken")
    assert world.drafts.ended(step, [[1]]) is None
    assert world.requests.failed
    assert world.drafts.laid_out(["a"]) == [[]]
    world.drafts.added(output(fresh=[new("b", [1])]), {"b": 1})
    world.drafts.finished(output(finished=["a"]))
    assert world.pool.calls == []


def test_after_a_fault_none_are_wished_for(log: LogLines) -> None:
    world = World(wishes=True, told={})
    world.drafts.bind(output({"a": []}), ["a"], [0])
    step = world.drafts.take_step()
    assert step is not None
    world.pool.error = RuntimeError("broken")
    for _ in range(2):
        assert world.drafts.ended(step, [[1]]) == {"a": 0}
