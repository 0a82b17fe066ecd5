"""Prompt lookup in the pool: for steps that no drafter serves, after short drafts, and within bounds."""

import pytest
from pool_world import LIMIT, World
from pools import peek, pool_of

from vllm_wanspec.controller.drafting import MAX_LOOKUP_ROWS
from vllm_wanspec.controller.pool import DraftPool


def handed_out(pool: DraftPool, rows: list[tuple[str, list[int]]], limit: int = LIMIT) -> list[list[int]]:
    pool.step(rows)
    return pool.draft([request for request, _ in rows], limit)


def test_without_a_drafter_the_text_itself_is_looked_up() -> None:
    with pool_of("http://127.0.0.1:9", fallback=["ngram"], length={"shut_off": False}) as pool:
        pool.begin([], [("a", [1, 2, 3, 4, 5, 1, 2])])
        assert handed_out(pool, [("a", [3])]) == [[4, 5, 1, 2]]
        assert handed_out(pool, [("a", [4, 5, 7])]) == [[]]
        counters = pool.counters
        assert (counters.fallback_tokens, counters.fallback_hits, counters.offered_tokens) == (4, 2, 4)
        assert (counters.accepted_main_line, counters.accepted_branch, counters.accepted_lookup) == (0, 0, 2)


def test_it_can_be_switched_off() -> None:
    with pool_of("http://127.0.0.1:9", fallback=[]) as pool:
        pool.begin([], [("a", [1, 2, 3, 4, 5, 1, 2])])
        assert handed_out(pool, [("a", [3])]) == [[]]


def test_never_longer_than_asked_for() -> None:
    with pool_of("http://127.0.0.1:9", fallback=["ngram"], length={"shut_off": False}) as pool:
        pool.begin([], [("a", [1, 2, 3, 4, 5, 1, 2])])
        assert handed_out(pool, [("a", [3])], limit=1) == [[4]]
        assert handed_out(pool, [("a", [4])], limit=0) == [[]]


@pytest.mark.parametrize("rows", [MAX_LOOKUP_ROWS, MAX_LOOKUP_ROWS + 1])
def test_not_in_large_batches(rows: int) -> None:
    names = [f"r{number}" for number in range(rows)]
    with pool_of("http://127.0.0.1:9", fallback=["ngram"], length={"shut_off": False}) as pool:
        pool.begin([], [(name, [1, 2, 3, 4, 5, 1, 2]) for name in names])
        drafts = handed_out(pool, [(name, [3]) for name in names])
        assert [bool(draft) for draft in drafts] == [rows <= MAX_LOOKUP_ROWS] * rows


def test_a_drafter_s_own_tokens_come_first() -> None:
    world = World(fallback=("ngram",))
    drafts = world.step({"a": peek(world.pool, "a")[:1]})
    known = peek(world.pool, "a")
    world.draft(drafts)
    assert known
    assert drafts[0][: len(known)] == known


def test_what_looked_up_steps_yield_is_kept_apart_from_what_drafters_give() -> None:
    with pool_of("http://127.0.0.1:9", fallback=["ngram"], length={"shut_off": False}) as pool:
        pool.begin([], [("a", [1, 2, 3, 4, 5, 1, 2])])
        handed_out(pool, [("a", [3])])
        handed_out(pool, [("a", [4, 5, 1])])
        assert pool.meter.tokens_per_dry_step.get(0.0) > 1.0
        assert pool.meter.tokens_per_drafted_step.get(0.0) == 0.0
