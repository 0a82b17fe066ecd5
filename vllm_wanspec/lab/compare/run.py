"""One run, from the first server to the report; what it has found so far is never lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from hashlib import sha256
from pathlib import Path

import aiohttp
from rich.console import Console

from vllm_wanspec.errors import ConfigError, WanspecError
from vllm_wanspec.lab.compare.arms import DRAFTER, Arm
from vllm_wanspec.lab.compare.lineup import Lineup, TargetPlan, plan_lineup, server_name, tuned_target
from vllm_wanspec.lab.compare.measure import Measurement, Station, remaining
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.prepass import best_setting, pre_pass
from vllm_wanspec.lab.compare.references import take_references, usable
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.harness.client import CompletionClient
from vllm_wanspec.lab.harness.launch import MODEL_NAME, dying_servers_explain, start, wait_for_link
from vllm_wanspec.lab.harness.models import MIN_CUT, Prompt
from vllm_wanspec.lab.harness.pacing_counts import check_counted, read_counts
from vllm_wanspec.lab.harness.probes import Probe
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.harness.running import Outputs, check_needs, check_outputs, log_folder
from vllm_wanspec.lab.harness.servers import Server, ServerGroup, ServerSpec
from vllm_wanspec.lab.harness.wan_control import Wan
from vllm_wanspec.lab.records import Journal, Load, Part, Serving, Setting
from vllm_wanspec.lab.report.writing import Publication
from vllm_wanspec.sim.proposers import write_references


def run_compare(
    options: Options,
    prompts: Sequence[Prompt],
    outputs: Outputs,
    console: Console,
    *,
    name: str,
    program: str,
    report: Callable[[Result], Publication | None],
) -> Result:
    """Run, or go on with a run; report what it found, also where something ends it early.

    Args:
        options: What to measure.
        prompts: Candidates, in order.
        outputs: Where the results go.
        console: Where to show progress.
        name: Of the command: where no result is written, its journal lies in ``build`` under this name.
        program: What the command's arguments come after.
        report: Says what is published of a result with any batch; None publishes nothing.

    Raises:
        ConfigError: A path is wrong, or there are too few prompts.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed.
    """
    check_outputs(outputs)
    check_needs()
    begun = Provenance.of_this_run(program)
    journal = _open_journal(options, prompts, begun, outputs.json_path or Path("build", f"{name}.json"))
    if journal.resumed:
        requests = sum(len(batch.requests) for batch in journal.batches)
        console.print(f"going on with {journal.path}: {requests} requests are done", highlight=False)
    ended_by: str | None = "the run was interrupted"
    try:
        with log_folder(outputs.log_dir, "--keep-log", console) as folder:
            Run(options, journal, prompts, folder, console).measure()
        ended_by = None
    except WanspecError as error:
        ended_by = str(error).partition("\n")[0]
        raise
    finally:
        finished = False
        try:
            result = Result.of(options, journal, begun, ended_by)
            if result.batches and (made := report(result)) is not None:
                made.publish(outputs, console)
            finished = ended_by is None
        finally:
            _close(journal, finished, console)
    return result


def _open_journal(options: Options, prompts: Sequence[Prompt], begun: Provenance, json_path: Path) -> Journal:
    """The journal beside the result file; one of another commit, other versions or prompts is of another run."""
    try:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot make {json_path.parent} for the journal ({error.strerror})"
        raise ConfigError(f"{problem}; give --json") from error
    texts = sha256("\0".join(f"{prompt.kind}\0{prompt.text}" for prompt in prompts).encode()).hexdigest()
    what = {"candidates": texts, "versions": begun.versions, "commit": begun.commit}
    return Journal(json_path.with_name(f"{json_path.name}.journal"), options.as_json() | what)


def _close(journal: Journal, finished: bool, console: Console) -> None:
    if finished:
        journal.remove()
        return
    journal.close()
    console.print(f"{journal.path} keeps what is done: the same command goes on from there", highlight=False)


class Run:
    """Starts servers as they are needed, and takes references, pre-pass and measurements in turn.

    Args:
        options: What to measure.
        journal: What has been done.
        prompts: Candidates, in order.
        folder: Existing folder for logs and statistics.
        console: Where to show progress.
    """

    def __init__(
        self, options: Options, journal: Journal, prompts: Sequence[Prompt], folder: Path, console: Console
    ) -> None:
        self.options = options
        self.journal = journal
        self.prompts = prompts
        self.console = console
        self._folder = folder
        self._servers: dict[str, Server] = {}
        self._plans: dict[str, TargetPlan] = {}

    def measure(self) -> None:
        """Do everything that the journal lacks; no server is started for nothing."""
        if not remaining(self.options, self.journal):
            return
        began_s = time.monotonic()
        try:
            with ServerGroup(self._folder) as group:
                with dying_servers_explain(group):
                    self.measure_with(group, plan_lineup(self.options, self._folder))
                self.console.print("stopping the servers", style="dim")
        finally:
            self.journal.add(Part(time.monotonic() - began_s))

    def measure_with(self, group: ServerGroup, lineup: Lineup) -> None:
        """Measure with servers of a group."""
        for spec in lineup.sources:
            self.start(group, spec)
        self._take_references(group, lineup)
        texts = [(one.prompt_ids, one.expected) for one in usable(self.journal, self.options)]
        write_references(lineup.oracle_path, texts)
        pre_pass(self.options, self.journal, self._folder, self.console)
        for plan in lineup.targets.values():
            self._start_target(group, plan)
        for arm in self.options.started:
            for setting in dict.fromkeys(self._setting(arm, load) for load in self.options.loads(arm)):
                if setting is not None:
                    self._start_target(group, tuned_target(self.options, arm, setting, self._folder))
        asyncio.run(self._rounds(lineup))

    def start(self, group: ServerGroup, *specs: ServerSpec) -> None:
        """Start servers and wait for them; those that share a core better one at a time."""
        self._servers |= start(group, specs, self.console)

    def _start_target(self, group: ServerGroup, plan: TargetPlan) -> None:
        """Start a target, unless it runs already."""
        if plan.spec.name not in self._servers:
            self.start(group, plan.spec)
            self._plans[plan.spec.name] = plan

    def _setting(self, arm: Arm, load: Load) -> Setting | None:
        return best_setting(self.options, self.journal.trials, arm, load)

    def _take_references(self, group: ServerGroup, lineup: Lineup) -> None:
        """Let the arm whose texts count take them; a tuned one's server lasts no longer than that."""
        first = self.options.texts_from
        if not first.is_tuned:
            self._start_target(group, lineup.targets[first.target.name])
            asyncio.run(self._references(self._servers[first.target.name]))
            return
        plan = tuned_target(self.options, first, self.options.candidates(first)[0], self._folder)
        with ServerGroup(self._folder) as alone:
            asyncio.run(self._references(start(alone, [plan.spec], self.console)[plan.spec.name]))

    async def _references(self, server: Server) -> None:
        async with aiohttp.ClientSession() as http:
            drafter = self._servers.get(DRAFTER) if self.options.ranked else None
            draft = None if drafter is None else CompletionClient(http, drafter.url, MODEL_NAME)
            with self.console.status("taking the target's own texts"):
                plain = self._plain(http, server)
                await take_references(self.journal, self.options, self.prompts, plain, draft)
        references = usable(self.journal, self.options)
        tokens = sum(len(reference.expected) for reference in references) / len(references)
        text = f"{len(references)} prompts of {tokens:.0f} tokens on average"
        short = len(self.journal.references) - len(references)
        text += f", {short} dropped that end or repeat themselves before {MIN_CUT}" if short else ""
        self.console.print(text, style="dim", highlight=False)

    def _plain(self, http: aiohttp.ClientSession, server: Server) -> CompletionClient:
        """Asks the target alone, past any drafter."""
        return CompletionClient(http, server.url, MODEL_NAME, fields=self.options.texts_from.plain_fields)

    async def _rounds(self, lineup: Lineup) -> None:
        async with self.measuring(lineup) as measurement:
            await measurement.run()

    @contextlib.asynccontextmanager
    async def measuring(self, lineup: Lineup) -> AsyncIterator[Measurement]:
        """Yield what measures over all servers, linked and warmed up; forwards within are counted."""
        options = self.options
        async with aiohttp.ClientSession() as http:
            answered = {arm.target.name for arm in options.started if arm.target.drafter}
            for name, plan in self._plans.items():
                if name in answered and plan.metrics is not None:
                    await wait_for_link(http, plan.metrics, self._servers[name], self.console)
            stations = {
                (arm.name, load): self._station(http, lineup, arm, load)
                for arm in options.started
                for load in options.loads(arm)
            }
            wan = self._wan(http, lineup)
            first = options.texts_from
            plain = self._plain(http, self._servers[self._server_name(first, options.loads(first)[0])])
            measurement = Measurement(options, self.journal, plain, stations, wan, self.console)
            await measurement.warm_up()
            check_counted({name: plan.stats for name, plan in self._plans.items()})
            self._note_servings()
            yield measurement

    def _note_servings(self) -> None:
        """Write down what each target runs with, now that it has run."""
        served: dict[str, list[str]] = {name: [] for name in self._plans}
        for arm in self.options.started:
            for name in dict.fromkeys(self._server_name(arm, load) for load in self.options.loads(arm)):
                served[name].append(arm.name)
        for name, arms in served.items():
            plan = self._plans[name]
            counts = read_counts(plan.stats)
            observed = counts and {"async_scheduling": counts.async_scheduling, "draft_tokens": counts.num_spec_tokens}
            self.journal.add(Serving(name, tuple(arms), {**plan.facts(), "observed": observed}))

    def _server_name(self, arm: Arm, load: Load) -> str:
        return server_name(arm, self._setting(arm, load))

    def _station(self, http: aiohttp.ClientSession, lineup: Lineup, arm: Arm, load: Load) -> Station:
        plan = self._plans[self._server_name(arm, load)]
        server, source = self._servers[plan.spec.name], self._servers.get(arm.target.drafter)
        groups, paced = {"target": server.pid}, {"target": plan.stats}
        if source is not None:
            groups["drafter"] = source.pid
        if arm.uses_wan and lineup.drafter_stats is not None:
            paced["drafter"] = lineup.drafter_stats
        drafter = None if source is None else f"{source.url}/metrics"
        probe = Probe(http, f"{server.url}/metrics", plan.metrics, drafter, groups, paced, plan.control)
        client = CompletionClient(http, server.url, MODEL_NAME, fields=arm.request_fields)
        return Station(client, probe, plan.control, self._setting(arm, load))

    def _wan(self, http: aiohttp.ClientSession, lineup: Lineup) -> Wan | None:
        if lineup.control_url is None:
            return None
        behind = sorted({arm.target.name for arm in self.options.started if arm.uses_wan})

        def check_alive() -> None:
            for name in behind:
                self._servers[name].check_alive()

        metrics = [url for name in behind if (url := self._plans[name].metrics) is not None]
        return Wan(http, lineup.control_url, metrics, check_alive, self.options.time_scale)
