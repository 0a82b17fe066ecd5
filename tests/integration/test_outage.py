"""The drafter dies in the middle of a workload and comes back: nobody notices but the clock."""

import asyncio

import aiohttp
import pytest

from vllm_wanspec.lab.harness.client import Completion

from .fleet import EACH_RUNNER, START_DEADLINE_S, Drafter, Target
from .scrape import Drafts, drafts_decide, is_up, read_drafts, until
from .workload import PlainTruth, Request, Run, client_of, send, vary

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), EACH_RUNNER]

AT_ONCE = 6
USED = Drafts(accepted=300, rejected=300)
LONGEST_PROMPT = 800


class Outage:
    """Keeps a target busy while its drafter is killed and started again."""

    def __init__(self, http: aiohttp.ClientSession, target: Target, drafter: Drafter, requests: list[Request]) -> None:
        self.http = http
        self.target = target
        self.drafter = drafter
        self.requests = requests
        self.run = Run([])
        self.served: list[tuple[Request, Completion]] = []
        self.over = False
        self.in_flight_at_kill = 0

    async def play(self) -> None:
        async with asyncio.timeout(2 * START_DEADLINE_S), asyncio.TaskGroup() as group:
            for place in range(AT_ONCE):
                group.create_task(self.keep_busy(place))
            group.create_task(self.kill_and_restart())

    async def keep_busy(self, place: int) -> None:
        """Send requests one after the other, each place its own share, until the outage is over."""
        client, turn = client_of(self.http, self.target), 0
        while self.run.tokens < 24 * place:
            await asyncio.sleep(0.002)
        while not self.over or turn == 0:
            request = self.requests[(place + turn * AT_ONCE) % len(self.requests)]
            self.served.append((request, await send(client, request, self.run)))
            turn += 1

    async def kill_and_restart(self) -> None:
        http, target = self.http, self.target
        await self.use_drafts("drafts are used before the outage")
        self.in_flight_at_kill = self.run.streaming
        await asyncio.to_thread(self.drafter.kill)

        async def is_down() -> bool:
            return not await is_up(http, target, "main")

        await until(is_down, "the target knows that its drafter is gone")
        self.drafter.start()
        await until(lambda: is_up(http, target, "main"), "the drafter is back", START_DEADLINE_S)
        await self.use_drafts("drafts are used again")
        self.over = True

    async def use_drafts(self, what: str) -> None:
        """Wait until so many more drafts have been accepted and rejected."""
        begin = await read_drafts(self.http, self.target)

        async def used() -> bool:
            drafts = await read_drafts(self.http, self.target) - begin
            return drafts.accepted >= USED.accepted and drafts.rejected >= USED.rejected

        await until(used, what)


def test_drafter_killed_and_started_again(
    drafter: Drafter, wanspec: Target, plain: PlainTruth, prompts: list[tuple[int, ...]]
) -> None:
    requests = vary([prompt for prompt in prompts if len(prompt) < LONGEST_PROMPT][:24])

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, wanspec, "main"), "the drafter serves the target")
            outage = Outage(http, wanspec, drafter, requests)
            async with drafts_decide(http, wanspec):
                await outage.play()
            assert outage.in_flight_at_kill >= 4
            assert len(outage.served) >= 16
            await plain.check(http, [r for r, _ in outage.served], [got for _, got in outage.served])

    asyncio.run(main())
