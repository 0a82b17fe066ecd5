"""The tree bench's requests: plain reference texts first, then each prompt through every arm in turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.compare.demo_report import Divergence
from vllm_wanspec.lab.compare.demo_setup import DemoPlan
from vllm_wanspec.lab.compare.trees_figures import Row
from vllm_wanspec.lab.compare.trees_setup import DEFAULT_ARM, OFF, Arm, TreesOptions, arm_orders
from vllm_wanspec.lab.harness.client import Completion, CompletionClient, first_difference
from vllm_wanspec.lab.harness.counters import CONTROLLER_COUNTERS, DRAFTER_COUNTERS, Counters
from vllm_wanspec.lab.harness.launch import DRAFTER_NAME, LINK_DEADLINE_S, MODEL_NAME
from vllm_wanspec.lab.harness.models import MIN_CUT, WARM_UP, WARM_UP_TOKENS, Prompt, repeat_cut
from vllm_wanspec.lab.harness.pacing_counts import STATS_SETTLE_S, Paced, check_paced, read_paced
from vllm_wanspec.lab.harness.scrape import read_samples, wait_until_linked
from vllm_wanspec.lab.harness.servers import Server, ServerError
from vllm_wanspec.lab.stats import Timed

__all__ = ["Measurement", "Reference", "arrival_time"]

#: After a request its session ends once word has crossed the WAN; counters rise until then.
SETTLE_MIN_S = 0.1
SETTLE_MAX_S = 1.0
SETTLE_POLL_S = 0.05
RISING = ("branch_seconds", "drafted_tokens", "received_nodes")
PLAIN = Arm("off", OFF)


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt and what the target makes of it alone.

    Args:
        index: Number of the prompt.
        prompt: The prompt.
        expected: The target's own text up to where it begins to repeat.
        generated: Tokens of its whole text.
        plain: Time and tokens of that part, decoded plainly.
    """

    index: int
    prompt: Prompt
    expected: Completion
    generated: int
    plain: Timed

    @property
    def cut(self) -> int:
        """Tokens to generate in each arm."""
        return len(self.expected.token_ids)

    @property
    def is_usable(self) -> bool:
        """Whether there is enough of it."""
        return self.cut >= MIN_CUT


class Measurement:
    """Sends every request, one at a time, and keeps what each added to the counters.

    What it has found so far is complete at any time: a round is added when all arms of it are done.

    Args:
        plan: The running servers.
        options: The bench's settings.
        prompts: What to send.
        console: Where to show progress.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        plan: DemoPlan,
        options: TreesOptions,
        prompts: Sequence[Prompt],
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._options = options
        self._prompts = prompts
        self._console = console
        self._clock = clock
        self._paced_before: dict[str, Paced] = {}
        self.references: list[Reference] = []
        self.rows: list[Row] = []
        self.differences: list[tuple[str, Divergence]] = []

    async def run(self, drafter: Server, target: Server) -> None:
        """Take all measurements.

        Raises:
            ServerError: The target's link to the drafter did not come up.
            ClientError: A request failed.
            WanspecError: No text is long enough.
        """
        async with aiohttp.ClientSession() as http:
            with self._console.status("waiting for the link to the drafter"):
                if not await wait_until_linked(
                    http, self._plan.metrics_url, DRAFTER_NAME, LINK_DEADLINE_S, target.check_alive
                ):
                    problem = f"the target's link to the drafter was not up after {LINK_DEADLINE_S:.0f} s"
                    raise ServerError(f"{problem}; end of {target.log_path}:\n{target.log_tail()}")
            probe = _Probe(http, self._plan.metrics_url, f"{drafter.url}/metrics", self._options.rtt_ms, self._clock)
            client = _OptedOutClient(http, target.url, MODEL_NAME)
            for arm in (PLAIN, *self._options.arms):  # also finds out whether the target takes every override
                await client.complete(WARM_UP.text, WARM_UP_TOKENS, extra=arm.request_fields)
            await asyncio.sleep(STATS_SETTLE_S)
            self._paced_before = read_paced(self._plan.stats)
            check_paced(self._plan.stats, self._paced_before)
            await self._take_references(client)
            await self._take_rounds(client, probe)
            await asyncio.sleep(STATS_SETTLE_S)

    def paced(self) -> dict[str, Paced]:
        """Return the forwards that each server has paced since the warm-up; nothing if it did not come so far."""
        if not self._paced_before:
            return {}
        return {name: now.since(self._paced_before[name]) for name, now in read_paced(self._plan.stats).items()}

    def usable(self) -> list[Reference]:
        """Return the references that are long enough."""
        return [reference for reference in self.references if reference.is_usable]

    async def _take_references(self, client: CompletionClient) -> None:
        with self._progress() as progress:
            task = progress.add_task("plain texts", total=len(self._prompts))
            for index, prompt in enumerate(self._prompts):
                self.references.append(await self._reference(client, index, prompt))
                progress.advance(task)
        if not self.usable():
            raise WanspecError(f"every text ends or repeats itself before {MIN_CUT} tokens; nothing to measure")
        short = len(self.references) - len(self.usable())
        lengths = sum(reference.cut for reference in self.usable()) / len(self.usable())
        dropped = f", {short} that repeat themselves before {MIN_CUT} tokens dropped" if short else ""
        self._say(f"{len(self.usable())} prompts of {lengths:.0f} tokens on average{dropped}")

    async def _reference(self, client: CompletionClient, index: int, prompt: Prompt) -> Reference:
        arrivals_ms: list[float] = []

        def arrived(text: str, tokens: int) -> None:
            arrivals_ms.extend([self._clock() * 1000.0] * tokens)

        done = await client.complete(prompt.text, self._options.max_tokens, extra=PLAIN.request_fields, on_text=arrived)
        cut = repeat_cut(done.token_ids)
        expected = Completion(done.prompt_ids, done.token_ids[:cut], "", done.ttft_ms, done.last_ms, None)
        return Reference(index, prompt, expected, len(done.token_ids), arrival_time(arrivals_ms[:cut]))

    async def _take_rounds(self, client: CompletionClient, probe: _Probe) -> None:
        orders = arm_orders(self._options.arms, Random(self._options.seed))
        usable = self.usable()
        rounds = self._options.repeats * len(usable)
        with self._progress() as progress:
            task = progress.add_task("", total=rounds * len(self._options.arms))
            for number in range(rounds):
                repeat, reference = number // len(usable), usable[number % len(usable)]
                rows = []
                for arm in next(orders):
                    progress.update(task, description=f"{reference.prompt.module}: {arm.name}")
                    rows.append(await self._row(client, probe, reference, repeat, arm))
                    progress.advance(task)
                self.rows += sorted(rows, key=lambda row: self._place(row.arm))
                self._say(f"{number + 1} of {rounds}, {reference.prompt.module}, {self._paces(reference, rows)}")

    async def _row(self, client: CompletionClient, probe: _Probe, reference: Reference, repeat: int, arm: Arm) -> Row:
        before = await probe.read()
        done = await client.complete(reference.prompt.text, reference.cut, extra=arm.request_fields)
        after = await probe.settled()
        await self._compare(client, reference, arm, done)
        timed = Timed(done.last_ms - done.ttft_ms, len(done.token_ids) - 1)
        return Row(reference.index, repeat, arm.name, timed, done.last_ms / 1000.0, after.since(before))

    async def _compare(self, client: CompletionClient, reference: Reference, arm: Arm, done: Completion) -> None:
        expected = reference.expected
        position = first_difference(expected.token_ids, done.token_ids)
        if position is None:
            return
        tie = await client.is_tie(expected, done, position)
        pair = [ids[position] if position < len(ids) else None for ids in (expected.token_ids, done.token_ids)]
        found = Divergence(reference.prompt, position, tie, *pair)
        self.differences.append((arm.name, found))
        kind = "floating-point tie" if tie else "error: different output"
        self._console.print(f"{kind} in arm {arm.name}, {found}", style="dim" if tie else "bold red", highlight=False)

    def _place(self, name: str) -> int:
        return [arm.name for arm in self._options.arms].index(name)

    def _paces(self, reference: Reference, rows: Sequence[Row]) -> str:
        names = [arm.name for arm in self._options.arms]
        shown = {self._options.baseline, DEFAULT_ARM if DEFAULT_ARM in names else names[-1]}
        paces = [(row.arm, row.timed.per_token_ms or 0.0) for row in rows if row.arm in shown]
        paces.sort(key=lambda pair: self._place(pair[0]))
        texts = [f"{name} {pace:.1f}" for name, pace in [("off", reference.plain.per_token_ms or 0.0), *paces]]
        return f"{reference.cut} tokens, ms per token: {', '.join(texts)}"

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True)

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False)


class _Probe:
    """Reads the counters of controller and drafter."""

    def __init__(
        self, http: aiohttp.ClientSession, controller: str, drafter: str, rtt_ms: float, clock: Callable[[], float]
    ) -> None:
        self._http = http
        self._controller = controller
        self._drafter = drafter
        self._floor_s = rtt_ms / 1000.0 + SETTLE_MIN_S
        self._clock = clock

    async def read(self) -> Counters:
        """Return the counters now."""
        controller, drafter = await asyncio.gather(
            read_samples(self._http, self._controller), read_samples(self._http, self._drafter)
        )
        return Counters.total(
            [
                Counters.of(controller, CONTROLLER_COUNTERS),
                Counters(Counters.of(drafter, DRAFTER_COUNTERS).values),
            ]
        )

    async def settled(self) -> Counters:
        """Return the counters once the request just finished adds nothing more, or after a bounded time."""
        end_s = self._clock() + self._floor_s + SETTLE_MAX_S
        await asyncio.sleep(self._floor_s)
        last = await self.read()
        while self._clock() < end_s:
            await asyncio.sleep(SETTLE_POLL_S)
            now = await self.read()
            if all(now.get(name) == last.get(name) for name in RISING):
                return now
            last = now
        return last


class _OptedOutClient(CompletionClient):
    """Asks its questions about single tokens (ties) past the drafter."""

    async def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return await super()._answer(body | PLAIN.request_fields)


def arrival_time(arrivals_ms: Sequence[float]) -> Timed:
    """Return time and tokens of a text from when its tokens arrived."""
    if not arrivals_ms:
        return Timed(0.0, 0)
    return Timed(arrivals_ms[-1] - arrivals_ms[0], len(arrivals_ms) - 1)
