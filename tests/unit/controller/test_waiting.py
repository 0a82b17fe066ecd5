"""Waits for drafts about to arrive: in played time, and some on sockets."""

import threading
import time
from collections.abc import Callable

import pytest
from pool_world import WRONG, World
from pools import LIMIT, PROMPT, pool_of, served
from toys import wait_until

from vllm_wanspec.controller.waiting import WAIT_SLICE_S
from vllm_wanspec.core.draft import Draft
from vllm_wanspec.core.flat import FlatTree
from vllm_wanspec.core.turnaround import Turnaround

pytestmark = pytest.mark.usefixtures("short_waits")


def ready(names: str = "a", *, answer_s: float = 0.008, gap_s: float = 0.0005, **more: object) -> World:
    """All goes well, and then a draft is wrong: it is for the test to say what arrives after."""
    world = World(names=names, **more)  # type: ignore[arg-type]
    world.run_well()
    world.measured(answer_s=answer_s, gap_s=gap_s)
    assert world.pool.counters.waits == 0
    return world


# The adaptive wait


def test_a_step_is_held_back_for_drafts_about_to_arrive() -> None:
    world = ready()
    drafts = world.miss("a")
    here = world.length["a"]
    assert drafts == [[]]
    world.later(0.008, "a", LIMIT, echo=here - 1 + WRONG)
    assert world.draft(drafts) == pytest.approx(0.008)
    assert drafts == [list(range(here, here + LIMIT))]
    counters = world.pool.counters
    assert (counters.waits, counters.wait_seconds) == (1, pytest.approx(0.008))


def test_after_a_wait_only_sessions_whose_trees_have_changed_are_drafted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = ready("abc")
    drafts = world.miss("a", "b")
    calls: list[FlatTree] = []
    draft = FlatTree.draft

    def watched(self: FlatTree, *args: float) -> Draft:
        calls.append(self)
        return draft(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(FlatTree, "draft", watched)
    for name in "ab":
        world.later(0.008, name, LIMIT, echo=world.length[name] - 1 + WRONG)
    assert world.draft(drafts) > 0.0
    trees = [world.pool._sessions[name].core.tree for name in "abc"]
    assert calls == [*trees, *trees[:2]]
    assert all(drafts)


def test_it_goes_on_at_once_when_they_are_there() -> None:
    world = ready()
    drafts = world.miss("a")
    world.later(0.003, "a", LIMIT, echo=world.length["a"] - 1 + WRONG)  # sooner than expected
    assert world.draft(drafts) == pytest.approx(0.003)


def test_the_wait_ends_where_it_was_expected_to_though_nothing_came() -> None:
    world = ready()
    drafts = world.miss("a")
    waited_s = world.draft(drafts)
    assert waited_s == pytest.approx(0.008 + (LIMIT - 1) * 0.0005)
    assert drafts == [[]]
    assert world.pool.counters.wait_seconds == pytest.approx(waited_s)


@pytest.mark.parametrize("answer_s", [0.016, 0.1])
def test_what_comes_too_late_is_not_waited_for(answer_s: float) -> None:
    world = ready(answer_s=answer_s)
    assert world.draft(world.miss("a")) == 0.0
    assert world.pool.counters.waits == 0


def test_the_configured_maximum_holds_whatever_would_be_worth_it() -> None:
    world = ready(max_wait_ms=6)
    assert world.draft(world.miss("a")) == 0.0
    world = ready(max_wait_ms=9)
    assert 0.0 < world.draft(world.miss("a")) <= 0.009 + 1e-9


@pytest.mark.parametrize("queued", [lambda: 1, lambda: 7, lambda: None])
def test_no_step_is_held_back_while_requests_wait_or_where_that_is_unknown(queued: Callable[[], int | None]) -> None:
    world = ready(queued=queued)
    drafts = world.miss("a")
    world.later(0.001, "a", LIMIT, echo=world.length["a"] - 1 + WRONG)
    assert world.draft(drafts) == 0.0
    assert world.pool.counters.waits == 0


def test_the_wait_ends_when_a_request_comes() -> None:
    arrivals: list[float] = []
    world = ready(queued=lambda: len(arrivals))
    drafts = world.miss("a")
    world.coming.append((world.now + 0.003, lambda: arrivals.append(world.now)))
    world.later(0.008, "a", LIMIT, echo=world.length["a"] - 1 + WRONG)
    assert 0.003 <= world.draft(drafts) <= 0.003 + WAIT_SLICE_S
    assert world.pool.counters.waits == 1
    assert drafts == [[]]


def test_the_wait_ends_when_the_queue_is_no_longer_known() -> None:
    known: list[int | None] = [0]
    world = ready(queued=lambda: known[-1])
    drafts = world.miss("a")
    world.coming.append((world.now + 0.003, lambda: known.append(None)))
    assert 0.003 <= world.draft(drafts) <= 0.003 + WAIT_SLICE_S
    assert world.pool.counters.waits == 1


def test_one_of_many_does_not_hold_up_the_batch() -> None:
    world = ready(names="abcdefgh")
    drafts = world.miss("c")
    for name in "abdefgh":
        world.arrive(name, LIMIT + 1)
    assert world.draft(drafts) == 0.0
    assert [len(draft) for draft in drafts] == [LIMIT, LIMIT, 0, LIMIT, LIMIT, LIMIT, LIMIT, LIMIT]


def test_all_of_a_few_do() -> None:
    world = ready(names="abc")
    drafts = world.miss("a", "b", "c")
    for name in "abc":
        world.later(0.004, name, LIMIT, echo=world.length[name] - 1 + WRONG)
    world.measured(answer_s=0.004, gap_s=0.0005)
    assert world.draft(drafts) == pytest.approx(0.004)
    assert [len(draft) for draft in drafts] == [LIMIT] * 3


def test_the_wait_is_over_when_those_it_is_for_have_drafts() -> None:
    world = ready(names="ab")
    drafts = world.miss("a", "b")
    far = Turnaround()
    far.answer_s.add(0.5)
    world.pool._sessions["b"].core._clock.turnaround = far
    world.later(0.003, "a", LIMIT, echo=world.length["a"] - 1 + WRONG)
    assert world.draft(drafts) == pytest.approx(0.003)
    assert [len(draft) for draft in drafts] == [LIMIT, 0]


def test_a_request_that_no_drafter_serves_is_not_waited_for() -> None:
    world = ready()
    drafts = world.miss("a")
    world.link.welcome = None
    world.pool.link_lost(world.link)
    assert world.draft(drafts) == 0.0


def test_a_lost_link_ends_the_wait_at_once() -> None:
    world = ready()
    drafts = world.miss("a")

    def lose() -> None:
        world.link.welcome = None
        world.pool.link_lost(world.link)

    world.coming.append((world.now + 0.002, lose))
    assert world.draft(drafts) == pytest.approx(0.002)


def test_without_a_miss_there_is_nothing_to_wait_for() -> None:
    world = ready()
    world.run_well(20)
    assert world.pool.counters.waits == 0


# The other policies


def test_without_a_policy_nobody_waits() -> None:
    world = ready(policy="none")
    drafts = world.miss("a")
    world.later(0.001, "a", LIMIT, echo=world.length["a"] - 1 + WRONG)
    assert world.draft(drafts) == 0.0


@pytest.mark.parametrize("queued", [lambda: 0, lambda: 7, lambda: None])
def test_the_fixed_wait_asks_nobody(queued: Callable[[], int | None]) -> None:
    world = ready(policy="fixed", queued=queued, answer_s=9.0)
    assert world.draft(world.miss("a")) == pytest.approx(0.015)
    world.arrive("a", 0, echo=world.length["a"] - 1 + WRONG)
    drafts = world.step({"a": [world.length["a"]]})
    world.later(0.004, "a", 1, echo=world.length["a"] - 1)
    assert world.draft(drafts) == pytest.approx(0.004)  # one draft is enough


# On sockets, in real time


def test_the_wait_for_late_drafts_is_bounded() -> None:
    with served(late={"policy": "fixed", "max_wait_ms": 80}) as (pool, server):
        server.engine.held = True
        pool.begin([], [("a", PROMPT)])
        began_s = time.monotonic()
        assert pool.draft(["a"], LIMIT) == [[]]
        waited_s = time.monotonic() - began_s
        assert 0.075 <= waited_s < 1.0
        server.engine.held = False


def test_the_wait_ends_when_drafts_are_there() -> None:
    with served(late={"policy": "fixed", "max_wait_ms": 1000}) as (pool, _):
        pool.begin([], [("a", PROMPT), ("b", [1])])
        began_s = time.monotonic()
        drafts = pool.draft(["a", "b"], LIMIT)
        assert time.monotonic() - began_s < 0.9
        assert all(drafts)


def test_nobody_waits_for_requests_that_no_drafter_serves() -> None:
    with pool_of("http://127.0.0.1:9", late={"policy": "fixed", "max_wait_ms": 1000}) as pool:
        pool.begin([], [("a", PROMPT)])
        began_s = time.monotonic()
        pool.draft(["a"], LIMIT)
        assert time.monotonic() - began_s < 0.5


def test_a_lost_drafter_ends_the_wait() -> None:
    with served(late={"policy": "fixed", "max_wait_ms": 1000}) as (pool, server):
        server.engine.held = True
        pool.begin([], [("a", PROMPT)])
        wait_until(lambda: server.engine.running)
        stopper = threading.Thread(target=server.stop)
        began_s = time.monotonic()
        stopper.start()
        pool.draft(["a"], LIMIT)
        assert time.monotonic() - began_s < 0.95
        stopper.join()
