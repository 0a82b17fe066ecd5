"""The overhead bench's measurements: targets without drafts, and a drafter's route beside its bare engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import median

import aiohttp
from rich.console import Console

from vllm_wanspec.emulate.pacing import MAX_BASE_MS
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.drafter.direct import DirectWorkload
from vllm_wanspec.lab.drafter.loads import Drafter
from vllm_wanspec.lab.drafter.steady import SteadyWorkload
from vllm_wanspec.lab.drafter.width_figures import SteadyRow
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import Completion, CompletionClient, first_difference
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.cpu import CpuClock
from vllm_wanspec.lab.harness.launch import MODEL_NAME, NAMED, plain_command, vllm_spec, wait_for_link, write_config
from vllm_wanspec.lab.harness.models import WARM_UP, WARM_UP_TOKENS, DemoModels, Prompt
from vllm_wanspec.lab.harness.scrape import read_samples
from vllm_wanspec.lab.harness.servers import HOST, Server, ServerSpec, free_ports, service_command, wanspec_command
from vllm_wanspec.lab.harness.view import progress_bar
from vllm_wanspec.lab.target.overhead_report import DRAFTER, TARGET, Comparison, OverheadOptions
from vllm_wanspec.sim.controller import DraftTokenizer

SPECULATIVE_TOKENS = 8
EMPTY, SILENT, DEAD = "empty", "silent", "dead"
SILENT_DRAFTER = "silent-drafter"
#: The service that once discarded what it was sent: no free port, which is one that others may be given.
NOBODY = 9
WATCHED = ("steps", "opened_sessions", "received_nodes", "offered_tokens", "waits", "wait_seconds")
DETAILS = ("running", "step_ms", "starts_per_s", "api_cpu", "engine_cpu", "others_cpu", "measured_s")
WARM_UP_S = 1.0


def plan_targets(models: DemoModels, folder: Path, instances: int = 1) -> tuple[dict[str, ServerSpec], dict[str, str]]:
    """Lay out targets of three kinds and a drafter that never ends its first step; writes YAML files to ``folder``.

    Returns:
        The servers by name, and where controllers serve their counters by the name of their target: its kind, a
        hyphen and a number.
    """
    drafter_port, *ports = free_ports(1 + 5 * instances)
    target_core, draft_core = machine.pin_cores()
    # Its steps take a minute, and give tokens to what was there at their beginning: no request lives that long.
    drafter = service_command(drafter_port, "--model", str(models.target), "--pace", f"{MAX_BASE_MS:g}")
    specs = {SILENT_DRAFTER: ServerSpec(SILENT_DRAFTER, drafter, drafter_port, machine.server_env(), draft_core)}
    empty = {
        "method": "custom_class",
        "model": "vllm_wanspec.sim.proposers.EmptyProposer",
        "num_speculative_tokens": SPECULATIVE_TOKENS,
    }
    metrics = {}
    for number in range(1, instances + 1):
        for kind, endpoint in ((EMPTY, None), (SILENT, drafter_port), (DEAD, NOBODY)):
            name = f"{kind}-{number}"
            argv = plain_command(str(models.target))
            if endpoint is None:
                argv += ["--speculative-config", json.dumps(empty)]
            else:
                metrics_port = ports.pop()
                metrics[name] = f"http://{HOST}:{metrics_port}/metrics"
                config = write_config(folder / f"{name}.yaml", endpoint, metrics_port, fallback=[])
                argv = wanspec_command("serve", str(models.target), "--wanspec", str(config))
                argv += ["--speculative-tokens", str(SPECULATIVE_TOKENS)]
            # Not even counted: what is compared here is microseconds.
            specs[name] = vllm_spec(name, [*argv, *NAMED], ports.pop(), target_core, None, None)
    return specs, metrics


class TargetPart:
    """The target's part: each prompt through all targets, one at a time.

    Attributes:
        differences: Outputs that differ, one line each.
    """

    def __init__(
        self, options: OverheadOptions, metrics: Mapping[str, str], prompts: Sequence[Prompt], console: Console
    ) -> None:
        self.differences: list[str] = []
        self._options, self._metrics, self._prompts, self._console = options, metrics, prompts, console

    async def measure(self, servers: Mapping[str, Server]) -> list[Comparison]:
        """Take all rounds."""
        names = [name for name in servers if name != SILENT_DRAFTER]
        rounds: dict[str, list[float]] = {EMPTY: [], SILENT: [], DEAD: []}
        async with aiohttp.ClientSession() as http:
            for name in names:
                if _kind(name) == SILENT:
                    await wait_for_link(http, self._metrics[name], servers[name], self._console)
            clients = {name: CompletionClient(http, servers[name].url, MODEL_NAME) for name in names}
            with machine.on_core(machine.pin_cores()[1]), progress_bar(self._console) as progress:
                for client in clients.values():
                    await client.complete(WARM_UP.text, WARM_UP_TOKENS)
                before = await self._counters(http)
                task = progress.add_task("", total=self._options.rounds * len(self._prompts) * len(names))
                for number in range(self._options.rounds):
                    progress.update(task, description=f"target, round {number + 1}")
                    paces = await self._round(clients, number, lambda: progress.advance(task))
                    for kind, pace in paces.items():
                        rounds[kind].append(pace)
            grown = {name: now.since(before[name]) for name, now in (await self._counters(http)).items()}
        rows = []
        for kind in (SILENT, DEAD):
            counts = Counters.total(found for name, found in grown.items() if _kind(name) == kind).values
            rows.append(Comparison(TARGET, f"{kind} drafter", tuple(rounds[kind]), tuple(rounds[EMPTY]), counts))
        # Nodes do arrive: a drafter tells which of its own a commit has led to.
        drafted = rows[0].details.get("offered_tokens")
        if drafted:
            raise WanspecError(f"the silent drafter has drafted {drafted:.0f} tokens")
        return rows

    async def _round(
        self, clients: Mapping[str, CompletionClient], number: int, advance: Callable[[], None]
    ) -> dict[str, float]:
        """Milliseconds per token of each kind of target, over all prompts."""
        sums = dict.fromkeys((EMPTY, SILENT, DEAD), 0.0)
        rng = Random(self._options.seed + number)
        for prompt in self._prompts:
            done = {}
            for name in rng.sample([*clients], len(clients)):
                done[name] = await clients[name].complete(prompt.text, self._options.max_tokens, ignore_eos=True)
                sums[_kind(name)] += done[name].tpot_ms or 0.0
                advance()
            self._compare(prompt, done)
        return {kind: total / len(self._prompts) / self._options.instances for kind, total in sums.items()}

    async def _counters(self, http: aiohttp.ClientSession) -> dict[str, Counters]:
        return {name: Counters.of(await read_samples(http, url), WATCHED) for name, url in self._metrics.items()}

    def _compare(self, prompt: Prompt, done: Mapping[str, Completion]) -> None:
        right = next(completion for name, completion in done.items() if _kind(name) == EMPTY)
        for name, completion in done.items():
            place = first_difference(right.token_ids, completion.token_ids)
            if place is not None:
                self.differences.append(f"{_kind(name)} drafter, {prompt.module}, token {place + 1}")


def _kind(name: str) -> str:
    return name.rpartition("-")[0]


async def compare_routes(
    options: OverheadOptions,
    tokenizer: DraftTokenizer,
    texts: list[list[int]],
    servers: Mapping[str, Server],
    console: Console,
) -> list[Comparison]:
    """The drafter's part: at each width our route and the direct client, which the servers are, in turn."""
    found: dict[int, list[tuple[SteadyRow, SteadyRow]]] = {width: [] for width in options.widths}
    route, direct = servers.values()
    cpu, direct_cpu = (CpuClock(server.pid, server.spec.core) for server in (route, direct))
    async with aiohttp.ClientSession() as http:
        ours = SteadyWorkload(Drafter(http, route.url, tokenizer, itertools.cycle(texts), cpu), options.load)
        base = DirectWorkload(http, direct.url, direct_cpu, options.load)
        with machine.on_core(machine.pin_cores()[0]), progress_bar(console) as progress:
            for side in (ours, base):
                await side.window(max(options.widths), WARM_UP_S)
            rng = Random(options.seed)
            task = progress.add_task("", total=options.rounds * len(options.widths))
            for number in range(options.rounds):
                for width in rng.sample(options.widths, len(options.widths)):
                    progress.update(task, description=f"drafter, round {number + 1}: {width} branches")
                    order = (ours, base) if number % 2 else (base, ours)
                    rows = {side: await side.window(width, options.window_s) for side in order}
                    if not all(row.is_near for row in rows.values()):
                        few = f"fewer than {width} branches ran in a window of {options.window_s:g} s"
                        raise WanspecError(f"{few}: take longer windows")
                    found[width].append((rows[ours], rows[base]))
                    progress.advance(task)
    return [_compared(width, pairs) for width, pairs in found.items()]


def _compared(width: int, pairs: Sequence[tuple[SteadyRow, SteadyRow]]) -> Comparison:
    """Tokens per second at one width, and beside them the medians of what else was seen."""
    ours, base = zip(*pairs, strict=True)
    details = {
        f"{name}{suffix}": median(getattr(row, name) for row in side)
        for side, suffix in ((ours, ""), (base, "_base"))
        for name in DETAILS
    }
    rate, base_rate = (tuple(row.events_per_s for row in side) for side in (ours, base))
    return Comparison(DRAFTER, f"{width} branch{'es' * (width > 1)}", rate, base_rate, details)
