"""The virtual network: delay, bounds of the jitter, order, and what a cut loses."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_wanspec.sim.network import Wire


def wire(delay: int = 0, jitter: int = 0) -> Wire:
    return Wire(delay, jitter, random.Random(1))


def arrivals(line: Wire, until: int, since: int = 0) -> dict[bytes, int]:
    return {frame: now for now in range(since, until + 1) for frame in line.arrived(now)}


@pytest.mark.parametrize("delay", [0, 1, 7])
def test_a_frame_arrives_exactly_after_the_delay(delay: int) -> None:
    line = wire(delay)
    line.send(5, [b"a", b"b"])
    assert (line.in_flight, line.last) == (2, b"b")
    assert arrivals(line, 4 + delay) == {}
    assert line.arrived(5 + delay) == [b"a", b"b"]
    assert (line.in_flight, line.last) == (0, b"b")


def test_jitter_is_drawn_for_each_frame_within_its_bounds() -> None:
    stays = set()
    line = wire(3, 6)
    for now in range(0, 4000, 20):  # far apart: none waits for another
        line.send(now, [b"%d" % now])
        stays.update(at - now for at in arrivals(line, now + 19, now).values())
    assert stays == set(range(3, 10))


moments = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.integers(0, 8)), min_size=1, max_size=30)


@given(moments, st.integers(0, 99))
def test_frames_arrive_once_in_order_and_in_time_however_the_wire_changes(
    script: list[tuple[int, int, int]], seed: int
) -> None:
    line, now, sent, got = Wire(0, 0, random.Random(seed)), 0, {}, {}
    longest = 0
    for number, (gap, delay, jitter) in enumerate(script):
        for _ in range(gap):
            now += 1
            got.update(dict.fromkeys(line.arrived(now), now))
        line.delay, line.jitter = delay, jitter
        longest = max(longest, delay + jitter)
        sent[b"%d" % number] = (now, delay)
        line.send(now, [b"%d" % number])
        got.update(dict.fromkeys(line.arrived(now), now))
    for later in range(now, now + longest + 1):
        got.update(dict.fromkeys(line.arrived(later), later))
    assert list(got) == list(sent)
    for frame, at in got.items():
        began, delay = sent[frame]
        assert began + delay <= at <= began + longest


def test_equal_seeds_give_equal_jitter() -> None:
    lines = [Wire(2, 9, random.Random(seed)) for seed in (1, 1, 2)]
    for line in lines:
        for now in range(0, 200, 20):
            line.send(now, [b"%d" % now])
    first, second, other = (arrivals(line, 400) for line in lines)
    assert first == second != other


def test_a_cut_loses_what_is_in_flight_and_nothing_else() -> None:
    line = wire(4)
    line.send(0, [b"lost"])
    line.cut()
    assert line.in_flight == 0
    line.send(1, [b"kept"])
    assert arrivals(line, 50) == {b"kept": 5}
