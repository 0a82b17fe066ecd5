"""``wanspec demo``: a real target with remote drafts beside a plain one, on one machine.

Drafter, WAN proxy and both targets are processes of their own; this module starts them, sends
prompts, compares, and stops everything, whatever happens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import aiohttp
from rich.console import Console

from vllm_wanspec.lab.compare.demo_report import Arm, DemoResult, Divergence, print_report, write_json
from vllm_wanspec.lab.compare.demo_setup import PORTS_NEEDED, DemoOptions, DemoPlan, plan_servers
from vllm_wanspec.lab.compare.demo_view import ArmView
from vllm_wanspec.lab.harness.client import ClientError, Completion, CompletionClient, first_difference
from vllm_wanspec.lab.harness.launch import DRAFTER_NAME, DYING_S, LINK_DEADLINE_S, MODEL_NAME, START_DEADLINE_S
from vllm_wanspec.lab.harness.models import WARM_UP, WARM_UP_TOKENS, Prompt, choose_prompts, find_models
from vllm_wanspec.lab.harness.pacing_counts import STATS_SETTLE_S, Paced, check_paced, read_paced
from vllm_wanspec.lab.harness.running import Outputs, check_outputs, log_folder, require_vllm
from vllm_wanspec.lab.harness.scrape import read_samples, wait_until_linked
from vllm_wanspec.lab.harness.servers import Server, ServerError, ServerGroup, free_ports
from vllm_wanspec.lab.harness.view import starting

__all__ = ["Measurement", "read_counters", "run_demo"]

COUNTERS = tuple(
    f"wanspec_{name}_total"
    for name in ("hits", "misses", "late_drafts", "steps", "committed_tokens", "local_draft_passes")
)


def run_demo(options: DemoOptions, console: Console) -> bool:
    """Run the demo and print its report.

    Args:
        options: The demo's settings.
        console: Where to show progress and report.

    Returns:
        Whether both targets gave the same output, up to floating-point ties.

    Raises:
        ConfigError: Models, prompts or a path are missing or wrong.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed.
    """
    began_s = time.monotonic()
    models = find_models(options.models)
    prompts = choose_prompts(models.prompts, options.prompts)
    check_outputs(Outputs(options.json_path))
    require_vllm()
    with log_folder(options.log_dir, "--logs", console) as folder:
        plan = plan_servers(options, models, free_ports(PORTS_NEEDED), folder)
        with ServerGroup(folder) as group:
            measurement = _start_and_measure(group, plan, options, prompts, console)
            console.print("stopping the servers", style="dim")
    result = measurement.result(time.monotonic() - began_s)
    print_report(result, console)
    if options.json_path is not None:
        write_json(result, options.json_path)
    return result.identical


def _start_and_measure(
    group: ServerGroup, plan: DemoPlan, options: DemoOptions, prompts: Sequence[Prompt], console: Console
) -> Measurement:
    servers = {spec.name: group.start(spec) for spec in plan.specs}
    with starting(console, list(servers.values())) as view:
        group.wait_ready(servers.values(), START_DEADLINE_S, on_ready=view.ready)
    measurement = Measurement(plan, options, prompts, console)
    try:
        asyncio.run(measurement.run(servers[plan.plain], servers[plan.wanspec]))
    except ClientError:
        # A dying server explains a failed request better than the request does.
        group.check_alive(within_s=DYING_S)
        raise
    group.check_alive()
    return measurement


class Measurement:
    """Sends the prompts to both targets and compares the answers.

    Args:
        plan: The running servers.
        options: The demo's settings.
        prompts: What to send.
        console: Where to show it.
    """

    def __init__(self, plan: DemoPlan, options: DemoOptions, prompts: Sequence[Prompt], console: Console) -> None:
        self._plan = plan
        self._options = options
        self._prompts = prompts
        self._console = console
        self.plain: list[Completion] = []
        self.wanspec: list[Completion] = []
        self.counters: dict[str, float] = {}
        self.paced: dict[str, Paced] = {}
        self.divergences: list[Divergence] = []

    async def run(self, plain: Server, wanspec: Server) -> None:
        """Fill in the results.

        Raises:
            ServerError: The target's link to the drafter did not come up.
            ClientError: A request failed.
        """
        async with aiohttp.ClientSession() as http:
            await self._wait_for_link(http, wanspec)
            plain_client = CompletionClient(http, plain.url, MODEL_NAME)
            wanspec_client = CompletionClient(http, wanspec.url, MODEL_NAME)
            for client in (plain_client, wanspec_client):
                await client.complete(WARM_UP.text, WARM_UP_TOKENS)
            before_paced = await self._read_paced()
            await self._run_arm("plain vLLM", plain_client, self.plain)
            before = await read_counters(http, self._plan.metrics_url)
            await self._run_arm("WANSpec", wanspec_client, self.wanspec)
            after = await read_counters(http, self._plan.metrics_url)
            self.counters = {name: after[name] - before[name] for name in COUNTERS}
            after_paced = await self._read_paced()
            self.paced = {name: now.since(before_paced[name]) for name, now in after_paced.items()}
            await self._compare(plain_client)

    def result(self, seconds: float) -> DemoResult:
        """Return the results of a run that took some seconds in all."""
        return DemoResult(
            options=self._options,
            plain=Arm(tuple(self.plain)),
            wanspec=Arm(tuple(self.wanspec)),
            counters=self.counters,
            divergences=self.divergences,
            paced=self.paced,
            seconds=seconds,
        )

    async def _run_arm(self, title: str, client: CompletionClient, results: list[Completion]) -> None:
        options = self._options
        with ArmView(self._console, title, len(self._prompts), options.max_tokens) as view:
            for prompt in self._prompts:
                view.begin(prompt)
                done = await client.complete(prompt.text, options.max_tokens, on_text=view.stream)
                results.append(done)
                second_arm = results is self.wanspec
                view.end(done, show=second_arm, note=self._against_plain() if second_arm else "")

    def _against_plain(self) -> str:
        """Return how the last WANSpec answer compares with the plain one."""
        plain = self.plain[len(self.wanspec) - 1]
        same = first_difference(plain.token_ids, self.wanspec[-1].token_ids) is None
        pace = f" (plain {plain.tpot_ms:.1f})" if plain.tpot_ms is not None else ""
        return f"{pace}, {'identical' if same else 'different'}"

    async def _read_paced(self) -> dict[str, Paced]:
        """Return the pacing counts, once the servers have written down their last forwards."""
        await asyncio.sleep(STATS_SETTLE_S)
        paced = read_paced(self._plan.stats)
        check_paced(self._plan.stats, paced)
        return paced

    async def _compare(self, plain_client: CompletionClient) -> None:
        for prompt, plain, other in zip(self._prompts, self.plain, self.wanspec, strict=True):
            position = first_difference(plain.token_ids, other.token_ids)
            if position is None:
                continue
            tie = await plain_client.is_tie(plain, other, position)
            pair = [ids[position] if position < len(ids) else None for ids in (plain.token_ids, other.token_ids)]
            self.divergences.append(Divergence(prompt, position, tie, *pair))

    async def _wait_for_link(self, http: aiohttp.ClientSession, wanspec: Server) -> None:
        with self._console.status("waiting for the link to the drafter"):
            up = await wait_until_linked(
                http, self._plan.metrics_url, DRAFTER_NAME, LINK_DEADLINE_S, wanspec.check_alive
            )
        if not up:
            problem = f"the target's link to the drafter was not up after {LINK_DEADLINE_S:.0f} s"
            raise ServerError(f"{problem}; end of {wanspec.log_path}:\n{wanspec.log_tail()}")


async def read_counters(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Return the controller's counters by name; one without a sample yet is 0.

    Raises:
        ClientError: The metrics cannot be read.
    """
    counters = dict.fromkeys(COUNTERS, 0.0)
    for name, _, value in await read_samples(http, url):
        if name in counters:
            counters[name] += value
    return counters
