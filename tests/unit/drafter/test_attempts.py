"""Failed attempts, on played time: how long answers are held back, how many at a time, and what the log says."""

import asyncio

import pytest
from conftest import LogLines
from played_loop import now_s, played

from vllm_wanspec.drafter import attempts
from vllm_wanspec.drafter.attempts import Attempts, RefusalLog

HOST = "192.0.2.1"


async def held_s(tried: Attempts, host: str = HOST) -> float:
    """How long the answer to a failure from there waits."""
    began_s = now_s()
    await tried.failed(host)
    return now_s() - began_s


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_answers_wait_longer_with_each_failure_and_never_too_long() -> None:
    async def scenario() -> None:
        tried = Attempts()
        assert [await held_s(tried) for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
        assert await held_s(tried, "192.0.2.2") == 1.0  # another's failures are not counted
        assert tried.held == 0

    played(scenario())


def test_failures_are_forgotten() -> None:
    async def scenario() -> None:
        tried = Attempts()
        assert [await held_s(tried) for _ in range(2)] == [1.0, 2.0]
        await asyncio.sleep(attempts.FORGET_S)
        assert await held_s(tried) == 1.0

    played(scenario())


def test_endless_failures_do_not_overflow() -> None:
    async def scenario() -> None:
        tried = Attempts()
        tried._failures["192.0.2.1"] = 10**6, now_s()
        assert await held_s(tried) == attempts.MAX_DELAY_S

    played(scenario())


def test_one_address_has_few_answers_held_back_and_then_is_not_heard() -> None:
    async def scenario() -> None:
        tried = Attempts()
        waiting = []
        for number in range(attempts.MAX_HELD_PER_ADDRESS):
            assert not tried.crowded(HOST), number
            waiting.append(asyncio.create_task(tried.failed(HOST)))
            await turn()
        assert tried.crowded(HOST)
        assert not tried.crowded("192.0.2.2")
        await asyncio.gather(*waiting)
        assert not tried.crowded(HOST)

    played(scenario())


def test_all_addresses_together_have_a_bounded_number_of_answers_held_back() -> None:
    async def scenario() -> None:
        tried = Attempts()
        waiting = [asyncio.create_task(tried.failed(f"198.51.100.{number}")) for number in range(attempts.MAX_HELD)]
        await turn()
        assert tried.held == attempts.MAX_HELD
        assert not tried.crowded(HOST)  # an honest controller is heard
        assert await held_s(tried) == 0.0  # one that is wrong is told so at once
        assert tried.crowded(HOST)  # and then not heard, so that it cannot go on guessing
        await asyncio.gather(*waiting)
        assert not tried.crowded(HOST)

    played(scenario())


def test_a_bounded_number_of_addresses_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(attempts, "MAX_ADDRESSES", 8)

    async def scenario() -> None:
        tried = Attempts()
        for number in range(20):
            await tried.failed(f"host-{number}")
        assert list(tried._failures) == [f"host-{number}" for number in range(12, 20)]

    played(scenario())


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("", "", True),
        ("\x1b[2J", "\x1b[2J", True),
    ],
)
def test_what_counts_as_one_address(first: str, second: str, same: bool) -> None:
    async def scenario() -> None:
        tried = Attempts()
        await tried.failed(first)
        assert (await held_s(tried, second) == 2.0) is same

    played(scenario())


def test_a_held_answer_that_nobody_waits_for_gives_its_place_back() -> None:
    async def scenario() -> None:
        tried = Attempts()
        waiting = asyncio.create_task(tried.failed(HOST))
        await turn()
        assert tried.held == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert tried.held == 0

    played(scenario())


def test_refusals_are_logged_once_a_minute_with_their_number(log: LogLines) -> None:
    async def scenario() -> None:
        refused = RefusalLog()
        for number in range(300):
            refused.note(f"controller at {HOST}:{number}", "wrong")
        assert log.warnings() == [f"controller at {HOST}:0 refused: wrong"]
        await asyncio.sleep(attempts.LOG_INTERVAL_S + 1.0)
        assert log.warnings()[1:] == [
            f"299 more attempts refused in the last minute; the last by controller at {HOST}:299: wrong"
        ]
        refused.note("controller at b", "wrong")  # still within a minute of that line
        assert len(log.warnings()) == 2
        await asyncio.sleep(attempts.LOG_INTERVAL_S)
        assert log.warnings()[2:] == ["1 more attempts refused in the last minute; the last by controller at b: wrong"]
        await asyncio.sleep(2 * attempts.LOG_INTERVAL_S)
        assert len(log.warnings()) == 3  # none, no line
        refused.note("controller at c", "wrong")
        assert log.warnings()[3:] == ["controller at c refused: wrong"]

    played(scenario())
