"""Sixteen streams at one drafter: none starves, and the engine's queue stays short."""

import asyncio
import contextlib
import itertools
import json
import statistics
import time
from dataclasses import dataclass, field
from random import Random

import aiohttp
import pytest

from vllm_wanspec.core.messages import Limits
from vllm_wanspec.drafter.host import DEFAULT_RUNNING_BRANCHES
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.sim.controller import DrafterClient, DraftTokenizer, Stream

from .fleet import TOKEN, Drafter
from .scrape import Page, read_page, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

STREAMS = 16
PASSING = 4
"""Of them: streams that are closed and replaced by new ones again and again."""
WARM_UP_S = 3.0
MEASURED_S = 10.0
PASSING_S = 1.2
STEP_S = 0.04
COMMIT_TOKENS = 3
SLOWEST_TO_MEAN = 0.5
MOST_WAITING = STREAMS
MOST_STOPPING = DEFAULT_RUNNING_BRANCHES
"""Branches that were stopped count as running until the engine has let go of them."""
LIMITS = Limits(
    lookahead=48,
    max_nodes=512,
    max_branches=4,
    running_branches=16,
    branch_depth=8,
    entropy_threshold_nats=0.0,
    min_probability=0.0,
)


@dataclass
class Load:
    """The streams, and what each place has drafted in streams that are over."""

    client: DrafterClient
    contexts: "itertools.cycle[list[int]]"
    rng: Random
    places: list[Stream] = field(default_factory=list)
    past: list[int] = field(default_factory=lambda: [0] * STREAMS)
    opened: int = 0

    async def open(self) -> Stream:
        self.opened += 1
        return await self.client.open(next(self.contexts), LIMITS, self.rng)

    async def drive(self, place: int) -> None:
        """One place's steps, for ever; the last places' streams come and go."""
        passing = place >= STREAMS - PASSING
        # Out of step with each other, as targets are.
        due_s = time.monotonic() + STEP_S * place / STREAMS
        ends_s = time.monotonic() + PASSING_S * (1 + place / STREAMS)
        while True:
            due_s = max(due_s + STEP_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            await self.places[place].commit(COMMIT_TOKENS)
            if passing and time.monotonic() > ends_s:
                ends_s += PASSING_S
                self.past[place] += self.places[place].drafted
                await self.places[place].close()
                self.places[place] = await self.open()

    def drafted(self) -> list[int]:
        return [past + stream.drafted for past, stream in zip(self.past, self.places, strict=True)]


@dataclass
class Watch:
    """The most of each gauge that was seen."""

    running: float = 0.0
    waiting: float = 0.0
    readings: int = 0

    def see(self, page: Page) -> None:
        self.running = max(self.running, page.get("wanspec_running_branches"))
        self.waiting = max(self.waiting, page.get("vllm:num_requests_waiting"))
        self.readings += 1


def test_no_stream_starves_and_the_engine_s_queue_stays_short(drafter: Drafter, models: DemoModels) -> None:
    load, watch, drafted, seconds = asyncio.run(_measure(drafter, models))
    mean = statistics.mean(drafted)
    print(
        f"{STREAMS} streams, {load.opened} sessions in all, {seconds:.1f} s: {sum(drafted) / seconds:.0f} tokens/s; "
        f"slowest {min(drafted) / mean:.2f} × the mean of {mean:.0f}; at most {watch.running:.0f} branches running, "
        f"{watch.waiting:.0f} waiting, {watch.readings} readings"
    )
    assert load.opened >= STREAMS + 2 * PASSING, "hardly a session has come and gone"
    assert mean > MEASURED_S, "hardly anything was drafted"
    assert min(drafted) >= SLOWEST_TO_MEAN * mean, f"a stream starves: {sorted(drafted)}"
    assert watch.readings >= 10
    assert watch.running <= DEFAULT_RUNNING_BRANCHES + STREAMS + MOST_STOPPING
    assert watch.waiting <= MOST_WAITING


async def _measure(drafter: Drafter, models: DemoModels) -> tuple[Load, Watch, list[int], float]:
    tokenizer = DraftTokenizer.load(models.draft)
    prompts = [json.loads(line)["prompt"] for line in models.prompts.read_text("utf-8").splitlines() if line.strip()]
    contexts = itertools.cycle([tokenizer.encode(prompt) for prompt in prompts])
    watch = Watch()
    async with aiohttp.ClientSession() as http:
        async with DrafterClient.connect(http, drafter.url, tokenizer.fingerprint, TOKEN) as client:
            load = Load(client, contexts, Random(7))
            load.places = [await load.open() for _ in range(STREAMS)]
            tasks = [asyncio.create_task(load.drive(place)) for place in range(STREAMS)]
            await _watch(http, drafter, watch, tasks, WARM_UP_S)
            before, began_s = load.drafted(), time.monotonic()
            await _watch(http, drafter, watch, tasks, MEASURED_S)
            drafted = [now - then for now, then in zip(load.drafted(), before, strict=True)]
            seconds = time.monotonic() - began_s
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for stream in load.places:
                await stream.close()
            assert client.broken is None

            async def is_quiet() -> bool:
                return _is_quiet(await read_page(http, drafter.url + "/metrics"))

            await until(is_quiet, "nothing runs, waits or is open at the drafter")
    return load, watch, drafted, seconds


async def _watch(
    http: aiohttp.ClientSession, drafter: Drafter, watch: Watch, tasks: list[asyncio.Task[None]], seconds: float
) -> None:
    """Read the gauges for a time; a stream that fails ends it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                watch.see(await read_page(http, drafter.url + "/metrics"))
                done, _ = await asyncio.wait(tasks, timeout=0.25, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()


def _is_quiet(page: Page) -> bool:
    gauges = ("wanspec_sessions", "wanspec_running_branches", "vllm:num_requests_running", "vllm:num_requests_waiting")
    return all(page.get(gauge) == 0.0 for gauge in gauges)
