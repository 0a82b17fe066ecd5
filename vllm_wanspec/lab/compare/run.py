"""One run of the side-by-side bench, from the first server to the report; what it has found so far is never lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
from rich.console import Console

from vllm_wanspec.emulate.pacing import STATS_INTERVAL_S
from vllm_wanspec.errors import ConfigError, WanspecError
from vllm_wanspec.lab.compare.lineup import DRAFTER, RANDOM, Lineup, plan_lineup, reference_arm, trial_spec
from vllm_wanspec.lab.compare.measure import BenchRun, Measurement, Station, best_gamma, remaining
from vllm_wanspec.lab.compare.oracle import write_references
from vllm_wanspec.lab.compare.plan import BenchOptions, is_remote, uses_wan
from vllm_wanspec.lab.compare.probes import Probe, Wan
from vllm_wanspec.lab.compare.references import RankingClient, take_references, usable
from vllm_wanspec.lab.compare.report import print_report, write_json, write_markdown
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import ClientError, CompletionClient
from vllm_wanspec.lab.harness.launch import DRAFTER_NAME, MODEL_NAME
from vllm_wanspec.lab.harness.models import WARM_UP, WARM_UP_TOKENS, Prompt, read_prompts
from vllm_wanspec.lab.harness.pacing_counts import Paced, read_paced
from vllm_wanspec.lab.harness.running import Outputs, check_outputs, log_folder, require_vllm
from vllm_wanspec.lab.harness.scrape import wait_until_linked
from vllm_wanspec.lab.harness.servers import Server, ServerError, ServerGroup, ServerSpec
from vllm_wanspec.lab.harness.view import progress_bar, starting
from vllm_wanspec.lab.records import Journal, Part, Trial

__all__ = ["DEFAULT_JSON", "Outputs", "run_bench"]

DEFAULT_JSON = Path("build/bench.json")
START_DEADLINE_S = 300.0
LINK_DEADLINE_S = 60.0
DYING_S = 3.0
STATS_SETTLE_S = STATS_INTERVAL_S + 0.25


def run_bench(options: BenchOptions, outputs: Outputs, console: Console) -> BenchRun:
    """Run the bench, or go on with it; report and write what it found, also where something ends it early.

    Args:
        options: What to measure.
        outputs: Where the results go.
        console: Where to show progress and report.

    Raises:
        ConfigError: Models, prompts or a path are missing or wrong.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed.
    """
    prompts = read_prompts(options.prompts, None)
    check_outputs(outputs)
    require_vllm()
    journal = _open_journal(options, outputs.json_path)
    if journal.resumed:
        requests = sum(len(batch.requests) for batch in journal.batches)
        console.print(f"going on with {journal.path}: {requests} requests are done", highlight=False)
    ended_by: str | None = "the run was interrupted"
    try:
        with log_folder(outputs.log_dir, "--keep-log", console) as folder:
            _Run(options, journal, prompts, folder, console).measure()
        ended_by = None
    except WanspecError as error:
        ended_by = str(error).partition("\n")[0]
        raise
    finally:
        run = bench_run(options, journal, ended_by)
        finished = False
        try:
            if run.batches:
                _publish(run, outputs, console)
            finished = ended_by is None
        finally:
            _close(journal, finished, console)
    return run


def bench_run(options: BenchOptions, journal: Journal, ended_by: str | None) -> BenchRun:
    """Return everything that a journal has."""
    paced: dict[str, Paced] = {}
    for part in journal.parts:
        for name, (steps, overruns) in part.paced.items():
            before = paced.get(name, Paced(0, 0))
            paced[name] = Paced(before.steps + steps, before.overruns + overruns)
    return BenchRun(
        options=options,
        references=usable(journal, options),
        trials=tuple(journal.trials),
        gamma=best_gamma(options, journal.trials),
        batches=tuple(journal.batches),
        paced=paced,
        seconds=sum(part.seconds for part in journal.parts),
        ended_by=ended_by,
    )


def _open_journal(options: BenchOptions, json_path: Path | None) -> Journal:
    path = json_path or DEFAULT_JSON
    if json_path is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {path.parent} for the journal ({error.strerror}); give --json") from error
    return Journal.beside(path, options.as_json() | {"versions": machine.versions()})


def _publish(run: BenchRun, outputs: Outputs, console: Console) -> None:
    print_report(run, console)
    if outputs.json_path is not None:
        write_json(run, outputs.json_path)
    if outputs.markdown_path is not None:
        write_markdown(run, outputs.markdown_path)


def _close(journal: Journal, finished: bool, console: Console) -> None:
    if finished:
        journal.remove()
        return
    journal.close()
    console.print(f"{journal.path} keeps what is done: the same command goes on from there", highlight=False)


class _Run:
    """Starts servers as they are needed, and takes references, pre-pass and measurements in turn.

    Args:
        options: What to measure.
        journal: What has been done.
        prompts: Candidates, in order.
        folder: Existing folder for logs and statistics.
        console: Where to show progress.
    """

    def __init__(
        self, options: BenchOptions, journal: Journal, prompts: Sequence[Prompt], folder: Path, console: Console
    ) -> None:
        self._options = options
        self._journal = journal
        self._prompts = prompts
        self._folder = folder
        self._console = console
        self._servers: dict[str, Server] = {}
        self._stats: dict[str, Path] = {}
        self._paced_before: dict[str, Paced] = {}

    def measure(self) -> None:
        """Do everything that the journal lacks; no server is started for nothing."""
        if not remaining(self._options, self._journal):
            return
        began_s = time.monotonic()
        try:
            with ServerGroup(self._folder) as group:
                try:
                    self._measure(group)
                except ClientError:
                    # A dying server explains a failed request better than the request does.
                    group.check_alive(within_s=DYING_S)
                    raise
                group.check_alive()
                self._console.print("stopping the servers", style="dim")
        finally:
            now = read_paced(self._stats) if self._paced_before else {}
            paced = {name: count.since(self._paced_before.get(name, Paced(0, 0))) for name, count in now.items()}
            counts = {name: (count.steps, count.overruns) for name, count in paced.items()}
            self._journal.add(Part(time.monotonic() - began_s, counts))

    def _measure(self, group: ServerGroup) -> None:
        options, journal = self._options, self._journal
        lineup = plan_lineup(options, self._folder)
        first = reference_arm(options)
        for spec in lineup.sources:
            self._start(group, [spec])
        if first == "draft_model":
            self._start(group, [trial_spec(options, options.gammas[0], self._folder, "references")])
            self._servers[first] = self._servers.pop("references")
        else:
            self._start(group, [lineup.targets[first]])
        asyncio.run(self._references(self._servers[first].url))
        write_references(lineup.oracle_path, [(one.prompt_ids, one.expected) for one in usable(journal, options)])
        gamma = self._pre_pass()
        for arm in options.started:
            if arm == "draft_model":
                assert gamma is not None
                self._start(group, [trial_spec(options, gamma, self._folder)])
            elif arm != first:
                self._start(group, [lineup.targets[arm]])
        asyncio.run(self._rounds(lineup, first))

    def _start(self, group: ServerGroup, specs: Sequence[ServerSpec]) -> list[Server]:
        """Start servers and wait for them: one at a time, since they share a core."""
        servers = [group.start(spec) for spec in specs]
        with starting(self._console, servers) as view:
            group.wait_ready(servers, START_DEADLINE_S, on_ready=view.ready)
        self._servers |= {server.name: server for server in servers}
        return servers

    async def _references(self, url: str) -> None:
        async with aiohttp.ClientSession() as http:
            plain = CompletionClient(http, url, MODEL_NAME)
            drafter = self._servers.get(DRAFTER)
            draft = None if drafter is None else RankingClient(http, drafter.url, MODEL_NAME)
            with self._console.status("taking the target's own texts"):
                await take_references(self._journal, self._options, self._prompts, plain, draft)
        references = usable(self._journal, self._options)
        tokens = sum(len(reference.expected) for reference in references) / len(references)
        text = f"{len(references)} prompts of {tokens:.0f} tokens on average"
        self._console.print(text, style="dim", highlight=False)

    def _pre_pass(self) -> int | None:
        """Try the co-located draft model's γ that have not been tried, one server at a time."""
        options, journal = self._options, self._journal
        tried = {trial.gamma for trial in journal.trials}
        gammas = options.gammas if "draft_model" in options.started and len(options.gammas) > 1 else ()
        for gamma in gammas:
            if gamma in tried:
                continue
            with ServerGroup(self._folder) as group:
                (server,) = self._start(group, [trial_spec(options, gamma, self._folder, f"draft_model γ={gamma}")])
                journal.add(Trial(gamma, asyncio.run(self._trial(server.url))))
                del self._servers[server.name]
            trial = journal.trials[-1]
            text = f"co-located draft model, γ = {gamma}: {trial.tpot_ms:.1f} ms per token"
            self._console.print(text, style="dim", highlight=False)
        return best_gamma(options, journal.trials)

    async def _trial(self, url: str) -> float:
        time_ms, tokens = 0.0, 0
        references = usable(self._journal, self._options)[: self._options.trial_prompts]
        async with aiohttp.ClientSession() as http:
            client = CompletionClient(http, url, MODEL_NAME)
            await client.complete(WARM_UP.text, WARM_UP_TOKENS)
            with progress_bar(self._console) as progress:
                for reference in progress.track(references, description="pre-pass"):
                    done = await client.complete(reference.prompt_ids, len(reference.expected))
                    time_ms += done.last_ms - done.ttft_ms
                    tokens += len(done.token_ids) - 1
        return time_ms / max(1, tokens)

    async def _rounds(self, lineup: Lineup, first: str) -> None:
        """Everything that is measured, over all servers."""
        options = self._options
        self._stats = dict(lineup.stats)
        if options.target_pace is not None and "draft_model" in self._servers:
            self._stats["draft_model"] = self._folder / "draft_model.pacing.json"
        async with aiohttp.ClientSession() as http:
            for arm, url in lineup.metrics.items():
                if arm != "wanspec_dead":
                    await self._wait_for_link(http, url, self._servers[arm])
            stations = {arm: self._station(http, lineup, arm) for arm in options.started}
            plain = CompletionClient(http, self._servers[first].url, MODEL_NAME)
            wan = self._wan(http, lineup)
            measurement = Measurement(options, self._journal, plain, stations, wan, self._console)
            await measurement.warm_up()
            await asyncio.sleep(STATS_SETTLE_S)
            self._paced_before = read_paced(self._stats)
            _check_paced(self._stats, self._paced_before)
            try:
                await measurement.run()
            finally:
                await asyncio.sleep(STATS_SETTLE_S)

    def _station(self, http: aiohttp.ClientSession, lineup: Lineup, arm: str) -> Station:
        server = self._servers[arm]
        source = DRAFTER if uses_wan(arm) else RANDOM if arm == "wanspec_random" else None
        groups = {"target": server.pid} | ({} if source is None else {"drafter": self._servers[source].pid})
        drafter = None if source is None else f"{self._servers[source].url}/metrics"
        controller = lineup.metrics[arm] if is_remote(arm) else None
        probe = Probe(http, f"{server.url}/metrics", controller, drafter, groups)
        return Station(CompletionClient(http, server.url, MODEL_NAME), probe)

    def _wan(self, http: aiohttp.ClientSession, lineup: Lineup) -> Wan | None:
        if lineup.control_url is None:
            return None
        behind = {arm: url for arm, url in lineup.metrics.items() if uses_wan(arm)}

        def check_alive() -> None:
            for arm in behind:
                self._servers[arm].check_alive()

        return Wan(http, lineup.control_url, list(behind.values()), check_alive)

    async def _wait_for_link(self, http: aiohttp.ClientSession, url: str, target: Server) -> None:
        with self._console.status(f"waiting for {target.name}'s link to its drafter"):
            up = await wait_until_linked(http, url, DRAFTER_NAME, LINK_DEADLINE_S, target.check_alive)
        if not up:
            problem = f"{target.name}'s link to its drafter was not up after {LINK_DEADLINE_S:.0f} s"
            raise ServerError(f"{problem}; end of {target.log_path}:\n{target.log_tail()}")


def _check_paced(stats: Mapping[str, Path], paced: Mapping[str, Paced]) -> None:
    """Raise WanspecError if a server paces nothing, so that its figures mean nothing."""
    unpaced = [name for name in stats if name not in paced]
    if unpaced:
        reason = "vLLM did not load our general plugin; is vllm-wanspec installed beside it?"
        raise WanspecError(f"{', '.join(unpaced)}: no model forward was paced: {reason}")
