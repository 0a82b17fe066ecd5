"""The GPU check's measurement: the same greedy requests through all targets of a comparison, by turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import aiohttp
from rich.console import Console

from vllm_wanspec.lab.harness.client import Completion, CompletionClient, first_difference
from vllm_wanspec.lab.harness.launch import MODEL_NAME, wait_for_link
from vllm_wanspec.lab.harness.models import WARM_UP, WARM_UP_TOKENS, Prompt
from vllm_wanspec.lab.harness.scrape import read_samples
from vllm_wanspec.lab.harness.servers import Server
from vllm_wanspec.lab.harness.view import progress_bar
from vllm_wanspec.lab.stats import Timed, total
from vllm_wanspec.lab.target.clients import Text, serve_clients
from vllm_wanspec.lab.target.gpu_plan import DRAFTED_REMOTELY, GIVEN, GpuOptions, GpuPlan
from vllm_wanspec.lab.target.gpu_report import GpuRow
from vllm_wanspec.lab.target.kinds import PLAIN

#: What vLLM serves: engine steps, and draft tokens that were verified and accepted.
SAMPLES = {
    "steps": "vllm:iteration_tokens_total_count",
    "drafted": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
}
#: What a worker logs that runs the newer of the two runners.
V2_LINE = "Using V2 Model Runner"


@dataclass
class Tally:
    """What one target has done, under one number of requests at a time.

    Attributes:
        rounds: Times of each round.
        requests: How many have been served, those of the first round, which does not count, left out.
        before: The target's counters when the first round was over.
        ties: Texts that part from plain vLLM's at a floating-point tie, one line each.
        wrong: Those that differ without one, likewise.
    """

    rounds: list[Timed] = field(default_factory=list)
    requests: int = 0
    before: Mapping[str, float] = field(default_factory=dict)
    ties: dict[str, None] = field(default_factory=dict)
    wrong: dict[str, None] = field(default_factory=dict)


class GpuPart:
    """The measurement of one comparison, with its running servers.

    Args:
        options: The check's settings.
        plan: The servers as they were laid out.
        servers: As they run, by name.
        console: Where to show progress.
    """

    def __init__(self, options: GpuOptions, plan: GpuPlan, servers: Mapping[str, Server], console: Console) -> None:
        self._options, self._plan, self._servers, self._console = options, plan, servers, console

    async def measure(self, prompts: Sequence[Prompt]) -> list[GpuRow]:
        """Measure all targets.

        Raises:
            ClientError: A request failed.
            ServerError: A link did not come up.
        """
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            for kind in DRAFTED_REMOTELY:
                if kind in self._plan.metrics:
                    await wait_for_link(http, self._plan.metrics[kind], self._servers[kind], self._console)
            clients = {kind: CompletionClient(http, self._servers[kind].url, MODEL_NAME) for kind in self._plan.kinds}
            texts = await self._texts(clients, prompts)
            rows: list[GpuRow] = []
            with progress_bar(self._console) as progress:
                each = (self._options.rounds + 1) * len(prompts) * len(clients)
                task = progress.add_task("", total=each * len(self._options.at_a_time))
                for at_a_time in self._options.at_a_time:
                    progress.update(task, description=f"{self._plan.backend.name}, {at_a_time} at a time")
                    rows += await self._rows(http, clients, texts, at_a_time, lambda: progress.advance(task))
        return rows

    async def _texts(self, clients: Mapping[str, CompletionClient], prompts: Sequence[Prompt]) -> list[Text]:
        """What plain vLLM under our constraints makes of the prompts; every target runs a little before."""
        for client in clients.values():
            await client.complete(WARM_UP.text, WARM_UP_TOKENS)
        texts = []
        for prompt in prompts:
            done = await clients[PLAIN].complete(prompt.text, self._options.max_tokens, ignore_eos=True)
            texts.append(Text(prompt.module, done.prompt_ids, done.token_ids))
        return texts

    async def _rows(
        self,
        http: aiohttp.ClientSession,
        clients: Mapping[str, CompletionClient],
        texts: Sequence[Text],
        at_a_time: int,
        advance: Callable[[], None],
    ) -> list[GpuRow]:
        """All rounds; in each every batch of requests goes through all targets, in changing order."""
        tallies = {kind: Tally() for kind in clients}
        for number in range(self._options.rounds + 1):
            rng = Random(self._options.seed + number)
            times: dict[str, list[Timed]] = {kind: [] for kind in clients}
            for batch in _batches(texts, at_a_time):
                for kind in rng.sample([*clients], len(clients)):
                    requests = [[text] for text in batch]
                    served = await serve_clients(clients[kind], requests, advance, ignore_eos=True)
                    answers = [answer for one in served for answer in one.answers]
                    times[kind] += [timed(done) for _, done in answers]
                    if kind not in GIVEN:
                        await self._compare(clients[PLAIN], tallies[kind], answers)
            for kind, tally in tallies.items():
                if number:
                    tally.rounds.append(total(times[kind]))
                    tally.requests += len(texts)
                else:  # What is compiled, captured or learned at first does not count.
                    tally.before = await read_counts(http, self._servers[kind].url)
        return [await self._row(http, kind, at_a_time, tally) for kind, tally in tallies.items()]

    async def _row(self, http: aiohttp.ClientSession, kind: str, at_a_time: int, tally: Tally) -> GpuRow:
        now = await read_counts(http, self._servers[kind].url)
        grown = {name: now[name] - tally.before.get(name, 0.0) for name in now}
        # With one request at a time each has one step for its prompt, and its first token.
        steps = grown["steps"] - tally.requests if at_a_time == 1 and "steps" in grown else None
        row = GpuRow(
            backend=self._plan.backend.name,
            tensor_parallel=self._plan.tensor_parallel,
            given=self._plan.given,
            kind=kind,
            at_a_time=at_a_time,
            rounds=tuple(tally.rounds),
            steps=steps,
            drafted=grown.get("drafted", 0.0),
            accepted=grown.get("accepted", 0.0),
            v2=V2_LINE in self._servers[kind].log_path.read_text("utf-8", "replace"),
            ties=tuple(tally.ties),
            wrong=tuple(tally.wrong),
        )
        self._console.print(str(row), style="dim", highlight=False)
        return row

    async def _compare(self, plain: CompletionClient, tally: Tally, answers: Sequence[tuple[Text, Completion]]) -> None:
        for text, done in answers:
            place = first_difference(text.expected, done.token_ids)
            line = f"{text.name}, token {(place or 0) + 1}"
            if place is None or line in tally.ties or line in tally.wrong:
                continue
            tie = await plain.is_tie(text.prompt_ids, text.expected, done.token_ids, place)
            (tally.ties if tie else tally.wrong)[line] = None


def _batches(texts: Sequence[Text], size: int) -> Iterator[Sequence[Text]]:
    """So many texts at a time; the last batch begins anew where there are too few."""
    for first in range(0, len(texts), size):
        yield [texts[place % len(texts)] for place in range(first, first + size)] if len(texts) >= size else texts


def timed(done: Completion) -> Timed:
    """Return the time from a completion's first tokens to its last, and the tokens after the first ones."""
    return Timed(done.last_ms - done.ttft_ms, len(done.token_ids) - done.pieces[0][1])


async def read_counts(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Return what of `SAMPLES` a server serves, summed over its engines.

    Raises:
        ClientError: Its metrics cannot be read.
    """
    found: dict[str, float] = {}
    for name, sample in SAMPLES.items():
        values = [value for known, _, value in await read_samples(http, f"{url}/metrics", sample) if known == sample]
        if values:
            found[name] = sum(values)
    return found
