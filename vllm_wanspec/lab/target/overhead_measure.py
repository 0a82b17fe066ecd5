"""The overhead bench's measurements: targets without drafts, and a drafter's route beside its bare engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_wanspec.emulate.pacing import MAX_BASE_MS
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.drafter.overhead_direct import direct_window
from vllm_wanspec.lab.drafter.streams import DraftTokenizer
from vllm_wanspec.lab.drafter.width_measure import SteadyRow
from vllm_wanspec.lab.drafter.width_steady import SteadyLoad, SteadyWorkload
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import Completion, CompletionClient, first_difference
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.cpu import CpuClock
from vllm_wanspec.lab.harness.launch import (
    DRAFTER_NAME,
    LINK_DEADLINE_S,
    MODEL_NAME,
    NAMED,
    plain_command,
    vllm_spec,
    write_config,
)
from vllm_wanspec.lab.harness.models import WARM_UP, WARM_UP_TOKENS, DemoModels, Prompt
from vllm_wanspec.lab.harness.scrape import read_samples, wait_until_linked
from vllm_wanspec.lab.harness.servers import HOST, Server, ServerError, ServerSpec, free_ports, wanspec_command
from vllm_wanspec.lab.target.overhead_report import DRAFTER, MIN_PROMPTS, MIN_ROUNDS, TARGET, Comparison

__all__ = ["DrafterPart", "OverheadOptions", "TargetPart", "TargetPlan", "plan_targets"]

SPECULATIVE_TOKENS = 8
EMPTY, SILENT, DEAD = "empty", "silent", "dead"
SILENT_DRAFTER = "silent-drafter"
#: The service that once discarded what it was sent: no free port, which is one that others may be given.
NOBODY = 9
WATCHED = ("steps", "opened_sessions", "received_nodes", "offered_tokens", "waits", "wait_seconds")
WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class OverheadOptions:
    """The overhead bench's settings.

    Args:
        parts: Which of "target" and "drafter" to measure.
        prompts: Sent to each target in each round.
        max_tokens: Generated for each.
        widths: Running branches at the drafter.
        load: What its sessions ask for.
        rounds: Of everything.
        instances: Processes of each kind of target: the same program is some per cent faster in one than in another.
        window_s: Seconds of a window at the drafter.
        seed: Of the order of targets and widths.
        models: Folder with ``target/``, ``draft/`` and ``prompts.jsonl``; None takes the checkout's.
    """

    parts: tuple[str, ...] = (TARGET, DRAFTER)
    prompts: int = MIN_PROMPTS
    max_tokens: int = 96
    widths: tuple[int, ...] = (1, 8, 32)
    load: SteadyLoad = field(default_factory=SteadyLoad)
    rounds: int = MIN_ROUNDS
    instances: int = 3
    window_s: float = 3.0
    seed: int = 0
    models: Path | None = None


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """The servers of the target's part.

    Args:
        specs: Servers by name.
        metrics: Where the controllers serve their counters, by the name of their target.
    """

    specs: Mapping[str, ServerSpec]
    metrics: Mapping[str, str]


def plan_targets(models: DemoModels, folder: Path, instances: int = 1) -> TargetPlan:
    """Lay out targets of three kinds and a drafter that never ends its first step; writes YAML files to ``folder``.

    A target's name is its kind, a hyphen and a number.
    """
    drafter_port, *ports = free_ports(1 + 5 * instances)
    target_core, draft_core = machine.pin_cores()
    # Its steps take a minute, and give tokens to what was there at their beginning: no request lives that long.
    drafter = [sys.executable, "-m", "vllm_wanspec.sim.useless", "--port", str(drafter_port)]
    drafter += ["--model", str(models.target), "--pace", f"{MAX_BASE_MS:g}"]
    specs = {SILENT_DRAFTER: ServerSpec(SILENT_DRAFTER, drafter, drafter_port, machine.server_env(), draft_core)}
    empty = {
        "method": "custom_class",
        "model": "vllm_wanspec.lab.harness.proposers.EmptyProposer",
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
            specs[name] = vllm_spec(
                name, [*argv, *NAMED], ports.pop(), target_core, None, folder / f"{name}.pacing.json"
            )
    return TargetPlan(specs, metrics)


class TargetPart:
    """The target's part: each prompt through all targets, one at a time."""

    def __init__(
        self, options: OverheadOptions, metrics: Mapping[str, str], prompts: Sequence[Prompt], console: Console
    ) -> None:
        self.differences: list[str] = []
        self._options, self._metrics, self._prompts, self._console = options, metrics, prompts, console

    async def measure(self, servers: dict[str, Server]) -> list[Comparison]:
        """Take all rounds."""
        names = [name for name in servers if name != SILENT_DRAFTER]
        rounds: dict[str, list[float]] = {EMPTY: [], SILENT: [], DEAD: []}
        async with aiohttp.ClientSession() as http:
            for name in names:
                if _kind(name) == SILENT:
                    await self._linked(http, name, servers[name])
            clients = {name: CompletionClient(http, servers[name].url, MODEL_NAME) for name in names}
            with machine.on_core(machine.pin_cores()[1]), _progress(self._console) as progress:
                for client in clients.values():
                    await client.complete(WARM_UP.text, WARM_UP_TOKENS)
                before = {name: await self._counters(http, name) for name in self._metrics}
                task = progress.add_task("", total=self._options.rounds * len(self._prompts) * len(names))
                for number in range(self._options.rounds):
                    progress.update(task, description=f"target, round {number + 1}")
                    paces = await self._round(clients, number, lambda: progress.advance(task))
                    for kind, pace in paces.items():
                        rounds[kind].append(pace)
            grown = {name: (await self._counters(http, name)).since(before[name]) for name in self._metrics}
        rows = []
        for kind in (SILENT, DEAD):
            counts = Counters.total(found for name, found in grown.items() if _kind(name) == kind).values
            rows.append(Comparison(TARGET, f"{kind} drafter", tuple(rounds[kind]), tuple(rounds[EMPTY]), counts))
        # Nodes do arrive: a drafter tells which of its own a commit has led to.
        drafted = rows[0].details.get("offered_tokens")
        if drafted:
            raise WanspecError(f"the silent drafter has drafted {drafted:.0f} tokens")
        return rows

    async def _linked(self, http: aiohttp.ClientSession, name: str, server: Server) -> None:
        url = self._metrics[name]
        if not await wait_until_linked(http, url, DRAFTER_NAME, LINK_DEADLINE_S, server.check_alive):
            raise ServerError(f"{name}: no link to the silent drafter after {LINK_DEADLINE_S:.0f} s")

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

    async def _counters(self, http: aiohttp.ClientSession, name: str) -> Counters:
        return Counters.of(await read_samples(http, self._metrics[name]), WATCHED)

    def _compare(self, prompt: Prompt, done: Mapping[str, Completion]) -> None:
        right = next(completion for name, completion in done.items() if _kind(name) == EMPTY)
        for name, completion in done.items():
            place = first_difference(right.token_ids, completion.token_ids)
            if place is not None:
                self.differences.append(f"{_kind(name)} drafter, {prompt.module}, token {place + 1}")


class DrafterPart:
    """The drafter's part: at each width our route and the direct client in turn."""

    def __init__(
        self, options: OverheadOptions, tokenizer: DraftTokenizer, texts: list[list[int]], console: Console
    ) -> None:
        self._options, self._tokenizer, self._texts, self._console = options, tokenizer, texts, console

    async def measure(self, servers: dict[str, Server]) -> list[Comparison]:
        """Take all rounds."""
        options, (route, direct) = self._options, servers.values()
        found: dict[int, list[tuple[SteadyRow, SteadyRow]]] = {width: [] for width in options.widths}
        clocks = [CpuClock(server.pid, server.spec.core) for server in (route, direct)]
        async with aiohttp.ClientSession() as http:
            workload = SteadyWorkload(http, route.url, self._tokenizer, self._texts, clocks[0])

            async def ours(width: int, seconds: float) -> SteadyRow:
                return await workload.window(options.load, width, seconds)

            async def base(width: int, seconds: float) -> SteadyRow:
                return await direct_window(http, direct.url, options.load, width, seconds, clocks[1])

            with machine.on_core(machine.pin_cores()[0]), _progress(self._console) as progress:
                for side in (ours, base):
                    await side(max(options.widths), WARM_UP_S)
                rng = Random(options.seed)
                task = progress.add_task("", total=options.rounds * len(options.widths))
                for number in range(options.rounds):
                    for width in rng.sample(options.widths, len(options.widths)):
                        progress.update(task, description=f"drafter, round {number + 1}: {width} branches")
                        order = (ours, base) if number % 2 else (base, ours)
                        rows = {side: await side(width, options.window_s) for side in order}
                        if not all(row.is_near for row in rows.values()):
                            few = f"fewer than {width} branches ran in a window of {options.window_s:g} s"
                            raise WanspecError(f"{few}: take longer windows")
                        found[width].append((rows[ours], rows[base]))
                        progress.advance(task)
        return [_drafter_comparison(width, pairs) for width, pairs in found.items()]


def _drafter_comparison(width: int, pairs: Sequence[tuple[SteadyRow, SteadyRow]]) -> Comparison:
    """Tokens per second at one width, and beside them the medians of what else was seen."""
    rates = [[row.events_per_s for row in side] for side in zip(*pairs, strict=True)]
    details = {
        f"{name}{suffix}": sorted(getattr(pair[side], name) for pair in pairs)[len(pairs) // 2]
        for side, suffix in enumerate(("", "_base"))
        for name in ("running", "step_ms", "starts_per_s", "api_cpu", "engine_cpu", "others_cpu", "measured_s")
    }
    return Comparison(DRAFTER, f"{width} branch{'es' * (width > 1)}", tuple(rates[0]), tuple(rates[1]), details)


def _kind(name: str) -> str:
    """The kind of a target by its name."""
    return name.rpartition("-")[0]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
