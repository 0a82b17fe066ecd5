"""The capacity bench's measurement: closed loops of clients at every arm of a load, checked against plain's texts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import aiohttp
from rich.console import Console

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.client import Completion, CompletionClient, first_difference
from vllm_wanspec.lab.harness.launch import MODEL_NAME, wait_for_link
from vllm_wanspec.lab.harness.models import WARM_UP, WARM_UP_TOKENS, Prompt, repeat_cut
from vllm_wanspec.lab.harness.pacing_counts import check_counted
from vllm_wanspec.lab.harness.probes import Probe, paced_of
from vllm_wanspec.lab.harness.servers import Server
from vllm_wanspec.lab.harness.view import progress_bar
from vllm_wanspec.lab.harness.wan_control import Wan
from vllm_wanspec.lab.target.capacity_figures import Row, title
from vllm_wanspec.lab.target.capacity_plan import DRAFTER, Arm, CapacityOptions, Load, Plan
from vllm_wanspec.lab.target.clients import Pieces, Text, serve_clients
from vllm_wanspec.lab.target.kinds import PLAIN

#: Tokens of a block of vLLM's prefix cache on a machine without a GPU; a multiple of a GPU's.
BLOCK_TOKENS = 32
#: So many requests of each client at least: between them others go on.
MIN_REQUESTS = 2


async def take_texts(plain: CompletionClient, prompts: Sequence[Prompt], options: CapacityOptions) -> list[Text]:
    """Return the first prompts whose texts are as long as wanted and do not repeat themselves.

    Prompts are cut so that all but their last token fills whole blocks: a prefix cache that knows them leaves one row.

    Raises:
        ConfigError: There are too few of them.
        ClientError: A request failed.
    """
    texts: list[Text] = []
    for prompt in prompts:
        if len(texts) == options.prompts:
            break
        ids = (await plain.complete(prompt.text, 1)).prompt_ids
        cut = ids[: (len(ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS + 1]
        done = await plain.complete(cut, options.max_tokens)
        if len(cut) > 1 and len(done.token_ids) == options.max_tokens == repeat_cut(done.token_ids):
            texts.append(Text(prompt.module, cut, done.token_ids))
    if len(texts) < options.prompts:
        problem = f"only {len(texts)} of {len(prompts)} prompts have texts of {options.max_tokens} tokens"
        raise ConfigError(f"--prompts: {problem} without repeating themselves, and {options.prompts} are wanted")
    return texts


def schedule(texts: Sequence[Text], clients: int) -> list[list[Text]]:
    """Return each client's requests: as many of every text, whatever the number of clients."""
    each = len(texts) // math.gcd(len(texts), clients)
    each *= math.ceil(MIN_REQUESTS / each)
    return [[texts[(client * each + number) % len(texts)] for number in range(each)] for client in range(clients)]


def client_rates(arrivals: Sequence[Pieces]) -> tuple[tuple[float, ...], float]:
    """Return each client's tokens per second while all are served, and for how many seconds they were.

    From a client's first piece in that time to its last; of what never ran together, from its first piece to its last.
    """
    begin_s = max(pieces[0][0] for pieces in arrivals)
    end_s = min(pieces[-1][0] for pieces in arrivals)
    together = begin_s < end_s
    rates = []
    for pieces in arrivals:
        counted = [piece for piece in pieces if begin_s <= piece[0] <= end_s] if together else pieces
        seconds = counted[-1][0] - counted[0][0] if counted else 0.0
        rates.append(sum(tokens for _, tokens in counted[1:]) / seconds if seconds > 0.0 else 0.0)
    return tuple(rates), end_s - begin_s if together else 0.0


@dataclass(frozen=True, slots=True)
class Station:
    """Where an arm's requests go, and what is read around them."""

    client: CompletionClient
    probe: Probe


class LoadPart:
    """The measurement of one load, with its running servers.

    Args:
        options: The run's settings.
        load: Paces and numbers of clients.
        plan: The servers as they were laid out.
        servers: As they run, by name.
        console: Where to show progress.
    """

    def __init__(
        self, options: CapacityOptions, load: Load, plan: Plan, servers: Mapping[str, Server], console: Console
    ) -> None:
        self._options, self._load, self._plan, self._servers, self._console = options, load, plan, servers, console

    async def measure(self, prompts: Sequence[Prompt], texts: Sequence[Text] = ()) -> tuple[list[Row], list[Text]]:
        """Measure all arms.

        Args:
            prompts: Candidates.
            texts: Those that an earlier load has taken; else they are taken.

        Returns:
            The rows, and the texts.

        Raises:
            ClientError: A request failed, or a link did not come up.
        """
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            for name, url in self._plan.metrics.items():
                await wait_for_link(http, url, self._servers[name], self._console)
            stations = {arm.name: self._station(http, arm) for arm in self._options.arms}
            with progress_bar(self._console) as progress:
                plain = stations[PLAIN].client
                taken = list(texts) or await take_texts(plain, prompts, self._options)
                await asyncio.gather(*(self._fill_cache(station.client, taken) for station in stations.values()))
                check_counted(self._plan.stats)
                cells = list(self._cells())
                task, rows, trip_ms = progress.add_task("", total=len(cells)), [], None
                links = list(self._plan.metrics.values())
                wan = Wan(http, self._plan.control_url, links, self._check_alive, self._options.time_scale)
                for arm, rtt_ms, clients in cells:
                    what = f"{self._load.name}: {title(arm, rtt_ms)}, γ = {arm.gamma}, {clients} clients"
                    progress.update(task, description=what)
                    if rtt_ms is not None and rtt_ms != trip_ms:
                        trip_ms = rtt_ms
                        await self._set_round_trip(wan, rtt_ms, stations)
                    rows.append(await self._take(stations[arm.name], plain, arm, rtt_ms, schedule(taken, clients)))
                    self._say(f"{what}: {rows[-1].rate:.1f} tokens/s each")
                    progress.advance(task)
        return rows, taken

    def _cells(self) -> Iterator[tuple[Arm, float | None, int]]:
        """Arms without a drafter first, then all others at each round trip."""
        arms = self._options.arms
        blocks: list[tuple[Arm, float | None]] = [(arm, None) for arm in arms if not arm.is_remote]
        blocks += [(arm, rtt_ms) for rtt_ms in self._options.rtt_ms for arm in arms if arm.is_remote]
        for arm, rtt_ms in blocks:
            for clients in self._load.clients:
                yield arm, rtt_ms, clients

    def _station(self, http: aiohttp.ClientSession, arm: Arm) -> Station:
        server = self._servers[arm.name]
        drafter = f"{self._servers[DRAFTER].url}/metrics" if arm.is_remote else None
        paced = {"target": self._plan.stats[arm.name]} | ({"drafter": self._plan.stats[DRAFTER]} if drafter else {})
        probe = Probe(http, f"{server.url}/metrics", self._plan.metrics.get(arm.name), drafter, {}, paced)
        return Station(CompletionClient(http, server.url, MODEL_NAME), probe)

    async def _fill_cache(self, client: CompletionClient, texts: Sequence[Text]) -> None:
        """Let a server see the prompts, and run a little."""
        await asyncio.gather(*(client.complete(text.prompt_ids, 2) for text in texts))
        await client.complete(WARM_UP.text, WARM_UP_TOKENS)

    async def _set_round_trip(self, wan: Wan, rtt_ms: float, stations: Mapping[str, Station]) -> None:
        if not await wan.set(rtt_ms * self._options.time_scale):
            self._console.print(f"warning: the links do not measure R = {rtt_ms:g} ms", style="yellow")
        remote = [arm.name for arm in self._options.arms if arm.is_remote]
        await asyncio.gather(*(stations[name].client.complete(WARM_UP.text, WARM_UP_TOKENS) for name in remote))

    async def _take(
        self,
        station: Station,
        plain: CompletionClient,
        arm: Arm,
        rtt_ms: float | None,
        requests: Sequence[Sequence[Text]],
    ) -> Row:
        """Serve all clients at once, each its requests in turn."""
        before = await station.probe.read()
        found = await serve_clients(station.client, requests)
        counters = (await station.probe.settled((rtt_ms or 0.0) * self._options.time_scale)).since(before)
        answers = [answer for one in found for answer in one.answers]
        ties, wrong = await self._differences(plain, answers, title(arm, rtt_ms))
        rates, window_s = client_rates([one.pieces for one in found])
        return Row(
            load=self._load.name,
            arm=arm,
            rtt_ms=rtt_ms,
            clients=len(requests),
            rates=rates,
            window_s=window_s,
            tokens=sum(len(done.token_ids) - done.pieces[0][1] for _, done in answers),
            steps=sum(len(done.pieces) - 1 for _, done in answers),
            drafted=counters.get("num_draft_tokens") or 0.0,
            paced=paced_of(counters, arm.name, DRAFTER),
            emulated_rtt_ms=None if rtt_ms is None else rtt_ms * self._options.time_scale,
            measured_rtt_ms=station.probe.rtt_ms,
            ties=ties,
            wrong=wrong,
        )

    async def _differences(
        self, plain: CompletionClient, answers: Sequence[tuple[Text, Completion]], arm: str
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Outputs that part from plain's: at ties, and elsewhere; each once."""
        ties: dict[str, None] = {}
        wrong: dict[str, None] = {}
        for text, done in answers:
            place = first_difference(text.expected, done.token_ids)
            if place is None:
                continue
            line = f"{arm}: {text.name}, token {place + 1}"
            tie = await plain.is_tie(text.prompt_ids, text.expected, done.token_ids, place)
            (ties if tie else wrong)[line] = None
        for line in wrong:
            self._console.print(f"error: different output: {line}", style="bold red", highlight=False)
        return tuple(ties), tuple(wrong)

    def _check_alive(self) -> None:
        for server in self._servers.values():
            server.check_alive()

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False)
