"""One run, from the first server to the report; what it has found so far is never lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import aiohttp
from rich.console import Console

from vllm_wanspec.errors import ConfigError, WanspecError
from vllm_wanspec.lab.compare.arms import DRAFTER, Arm
from vllm_wanspec.lab.compare.lineup import Lineup, plan_lineup, trial_spec
from vllm_wanspec.lab.compare.measure import Measurement, Station, best_gamma, remaining
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.references import take_references, usable
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import CompletionClient
from vllm_wanspec.lab.harness.launch import MODEL_NAME, dying_servers_explain, start, wait_for_link
from vllm_wanspec.lab.harness.models import MIN_CUT, WARM_UP, WARM_UP_TOKENS, Prompt
from vllm_wanspec.lab.harness.pacing_counts import STATS_SETTLE_S, Paced, check_paced, paced_since, read_paced
from vllm_wanspec.lab.harness.probes import Probe
from vllm_wanspec.lab.harness.running import Outputs, check_needs, check_outputs, log_folder
from vllm_wanspec.lab.harness.servers import Server, ServerGroup, ServerSpec
from vllm_wanspec.lab.harness.view import progress_bar
from vllm_wanspec.lab.harness.wan_control import Wan
from vllm_wanspec.lab.records import Journal, Part, Trial
from vllm_wanspec.lab.report.writing import Publication
from vllm_wanspec.lab.stats import Timed, total
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
    journal = _open_journal(options, len(prompts), outputs.json_path, Path("build", f"{name}.json"))
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
            result = Result.of(options, journal, program, ended_by)
            if result.batches and (made := report(result)) is not None:
                made.publish(outputs, console)
            finished = ended_by is None
        finally:
            _close(journal, finished, console)
    return result


def _open_journal(options: Options, candidates: int, json_path: Path | None, default_json: Path) -> Journal:
    path = json_path or default_json
    if json_path is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {path.parent} for the journal ({error.strerror}); give --json") from error
    beside = path.with_name(f"{path.name}.journal")
    return Journal(beside, options.as_json() | {"candidates": candidates, "versions": machine.versions()})


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
        self._stats: dict[str, Path] = {}
        self._paced_before: dict[str, Paced] = {}

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
            paced = paced_since(self._stats, self._paced_before)
            self.journal.add(Part(time.monotonic() - began_s, paced))

    def measure_with(self, group: ServerGroup, lineup: Lineup) -> None:
        """Measure with servers of a group."""
        options, first = self.options, self.options.texts_from
        for spec in lineup.sources:
            self.start(group, spec)
        if first is options.colocated:
            self.start(group, trial_spec(options, options.gammas[0], self._folder, "references"))
            self._servers[first.target.name] = self._servers.pop("references")
        else:
            self.start(group, lineup.targets[first.target.name])
        asyncio.run(self._references())
        texts = [(one.prompt_ids, one.expected) for one in usable(self.journal, options)]
        write_references(lineup.oracle_path, texts)
        gamma = self._pre_pass()
        if gamma is not None:
            self.start(group, trial_spec(options, gamma, self._folder))
        for name, spec in lineup.targets.items():
            if name not in self._servers:
                self.start(group, spec)
        asyncio.run(self._rounds(lineup))

    def start(self, group: ServerGroup, *specs: ServerSpec) -> None:
        """Start servers and wait for them; those that share a core better one at a time."""
        self._servers |= start(group, specs, self.console)

    async def _references(self) -> None:
        async with aiohttp.ClientSession() as http:
            drafter = self._servers.get(DRAFTER) if self.options.ranked else None
            draft = None if drafter is None else CompletionClient(http, drafter.url, MODEL_NAME)
            with self.console.status("taking the target's own texts"):
                await take_references(self.journal, self.options, self.prompts, self._plain(http), draft)
        references = usable(self.journal, self.options)
        tokens = sum(len(reference.expected) for reference in references) / len(references)
        text = f"{len(references)} prompts of {tokens:.0f} tokens on average"
        short = len(self.journal.references) - len(references)
        text += f", {short} dropped that end or repeat themselves before {MIN_CUT}" if short else ""
        self.console.print(text, style="dim", highlight=False)

    def _plain(self, http: aiohttp.ClientSession) -> CompletionClient:
        """Asks the target alone, past any drafter."""
        first = self.options.texts_from
        return CompletionClient(http, self._servers[first.target.name].url, MODEL_NAME, fields=first.plain_fields)

    def _pre_pass(self) -> int | None:
        """Try the co-located draft model's γ that have not been tried, one server at a time."""
        options, journal = self.options, self.journal
        tried = {trial.gamma for trial in journal.trials}
        gammas = options.gammas if options.colocated is not None and len(options.gammas) > 1 else ()
        for gamma in gammas:
            if gamma in tried:
                continue
            name = f"draft_model γ={gamma}"
            with ServerGroup(self._folder) as group:
                self.start(group, trial_spec(options, gamma, self._folder, name))
                trial = Trial(gamma, asyncio.run(self._trial(self._servers.pop(name).url)))
                journal.add(trial)
            text = f"co-located draft model, γ = {gamma}: {trial.tpot_ms:.1f} ms per token"
            self.console.print(text, style="dim", highlight=False)
        return best_gamma(options, journal.trials)

    async def _trial(self, url: str) -> float:
        """Milliseconds per token of the first prompts at a server."""
        times = []
        references = usable(self.journal, self.options)[: self.options.trial_prompts]
        async with aiohttp.ClientSession() as http:
            client = CompletionClient(http, url, MODEL_NAME)
            await client.complete(WARM_UP.text, WARM_UP_TOKENS)
            with progress_bar(self.console) as progress:
                for reference in progress.track(references, description="pre-pass"):
                    done = await client.complete(reference.prompt_ids, len(reference.expected))
                    times.append(Timed(done.last_ms - done.ttft_ms, len(done.token_ids) - 1))
        return total(times).per_token_ms or 0.0

    async def _rounds(self, lineup: Lineup) -> None:
        async with self.measuring(lineup) as measurement:
            await measurement.run()

    @contextlib.asynccontextmanager
    async def measuring(self, lineup: Lineup) -> AsyncIterator[Measurement]:
        """Yield what measures over all servers, linked and warmed up; forwards within are counted."""
        options = self.options
        self._stats = dict(lineup.stats)
        if options.target_pace is not None and options.colocated is not None:
            self._stats["draft_model"] = self._folder / "draft_model.pacing.json"
        async with aiohttp.ClientSession() as http:
            answered = {arm.target.name for arm in options.started if arm.target.drafter}
            for name, url in lineup.metrics.items():
                if name in answered:
                    await wait_for_link(http, url, self._servers[name], self.console)
            stations = {arm.name: self._station(http, lineup, arm) for arm in options.started}
            wan = self._wan(http, lineup)
            measurement = Measurement(options, self.journal, self._plain(http), stations, wan, self.console)
            await measurement.warm_up()
            await asyncio.sleep(STATS_SETTLE_S)
            self._paced_before = read_paced(self._stats)
            check_paced(self._stats, self._paced_before)
            try:
                yield measurement
            finally:
                await asyncio.sleep(STATS_SETTLE_S)

    def _station(self, http: aiohttp.ClientSession, lineup: Lineup, arm: Arm) -> Station:
        server, source = self._servers[arm.target.name], self._servers.get(arm.target.drafter)
        groups = {"target": server.pid} | ({} if source is None else {"drafter": source.pid})
        drafter = None if source is None else f"{source.url}/metrics"
        probe = Probe(http, f"{server.url}/metrics", lineup.metrics.get(arm.target.name), drafter, groups)
        return Station(CompletionClient(http, server.url, MODEL_NAME, fields=arm.request_fields), probe)

    def _wan(self, http: aiohttp.ClientSession, lineup: Lineup) -> Wan | None:
        if lineup.control_url is None:
            return None
        behind = {arm.target.name for arm in self.options.started if arm.uses_wan}

        def check_alive() -> None:
            for name in behind:
                self._servers[name].check_alive()

        return Wan(http, lineup.control_url, [lineup.metrics[name] for name in sorted(behind)], check_alive)
