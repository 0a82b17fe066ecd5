"""``make bench-width``: what running branches cost the drafter, one session at a real `wanspec drafter`.

The session asks for 1, 8, 16, 32 and 64 running branches in turn, under two loads.  Steady: all of them run, and the
time between two tokens of a branch is what width itself costs; the bar is about this.  Churning: a played target
commits what was drafted, so that branches are started and stopped all the time: what commits cost on top.
``python -m vllm_wanspec.lab.drafter.width --help`` lists the settings.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import aiohttp
import typer
from rich.console import Console

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.lab.drafter.churning import ChurningWorkload
from vllm_wanspec.lab.drafter.loads import ChurningLoad, Drafter, contexts
from vllm_wanspec.lab.drafter.profile import find_py_spy, record
from vllm_wanspec.lab.drafter.steady import SteadyWorkload
from vllm_wanspec.lab.drafter.width_figures import BAR_WIDTH, CHURNING, STEADY, Arm, Row, WidthOptions, WidthResult
from vllm_wanspec.lab.drafter.width_report import width_document
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.cpu import CpuClock, group_processes
from vllm_wanspec.lab.harness.launch import drafter_spec, serving
from vllm_wanspec.lab.harness.models import find_models
from vllm_wanspec.lab.harness.options import JsonFile, LogFolder, MarkdownFile, ModelsFolder, listed, parse_widths
from vllm_wanspec.lab.harness.running import Outputs, check_needs, log_folder
from vllm_wanspec.lab.harness.servers import Server
from vllm_wanspec.lab.harness.view import progress_bar
from vllm_wanspec.lab.report.writing import measured
from vllm_wanspec.sim.controller import DraftTokenizer, playing

UNPACED = "none"
Workload = SteadyWorkload | ChurningWorkload


def parse_paces(text: str) -> tuple[Pacing | None, ...]:
    """Read ``"none,5+0.02"``; each pace is one server.

    Raises:
        ConfigError: One of them is not a pace.
    """
    parts = [part.strip() for part in text.split(",")]
    return tuple(None if part == UNPACED else Pacing.parse(part, "--pace") for part in parts)


def run_width(options: WidthOptions, console: Console, log_dir: Path | None = None) -> WidthResult:
    """Run the bench; the servers' logs and the profile's samples stay in ``log_dir``, if there is one.

    Raises:
        ConfigError: Models or prompts are missing or wrong.
        UnsupportedError: No vLLM that could be started.
        WanspecError: The drafter failed.
    """
    models = find_models(options.models)
    check_needs()
    tokenizer = DraftTokenizer.load(models.draft)
    texts = contexts(models.prompts, tokenizer)
    arms: dict[str, list[Arm]] = {STEADY: [], CHURNING: []}
    with log_folder(log_dir, "--keep-log", console) as folder:
        for pace in options.paces:
            with serving([drafter_spec(models.draft, max(options.widths), pace)], folder, console) as servers:
                (server,) = servers.values()
                bench = _Bench(options, pace, server, tokenizer, texts, console, folder)
                for load, arm in asyncio.run(bench.measure()).items():
                    arms[load].append(arm)
    return WidthResult(options, arms[STEADY], arms[CHURNING])


@dataclass(frozen=True, slots=True)
class _Bench:
    """One running drafter and what to measure there."""

    options: WidthOptions
    pace: Pacing | None
    server: Server
    tokenizer: DraftTokenizer
    texts: list[list[int]]
    console: Console
    folder: Path

    async def measure(self) -> dict[str, Arm]:
        """Measure all widths under all loads, and profile the first load where nothing is paced."""
        options, server = self.options, self.server
        cpu = CpuClock(server.pid, server.spec.core)
        arms = {}
        async with aiohttp.ClientSession() as http:
            drafter = Drafter(http, server.url, self.tokenizer, itertools.cycle(self.texts), cpu)
            steady = SteadyWorkload(drafter, options.steady)
            churning = ChurningWorkload(drafter, options.churning, options.seed, options.warm_up_s)
            with machine.on_core(machine.pin_cores()[0]):
                await steady.window(max(options.widths), options.warm_up_s)
                for load in options.loads:
                    workload = steady if load == STEADY else churning
                    rows = await self._windows(load, workload)
                    wanted = self.pace is None and load == options.loads[0]
                    arms[load] = Arm(self.pace, tuple(rows), await self._profile(workload) if wanted else {})
        return arms

    async def _windows(self, load: str, workload: Workload) -> list[Row]:
        options = self.options
        rows: list[Row] = []
        rng = Random(options.seed)
        with progress_bar(self.console) as progress:
            task = progress.add_task(load, total=options.repeats * len(options.widths))
            for repeat in range(options.repeats):
                for width in rng.sample(options.widths, len(options.widths)):
                    title = f"{self.pace or 'not paced'}, {load}, round {repeat + 1}: width {width}"
                    progress.update(task, description=title)
                    rows.append(await workload.window(width, options.window_s))
                    progress.advance(task)
        return rows

    async def _profile(self, workload: Workload) -> dict[str, dict[str, float]]:
        program, pids = find_py_spy(), group_processes(self.server.pid)
        if not self.options.profile_s or program is None or not pids:
            return {}
        with self.console.status(f"profile at {BAR_WIDTH} running branches"):
            async with playing(workload.play(BAR_WIDTH)):
                await asyncio.sleep(self.options.warm_up_s)
                return await record(program, pids, self.options.profile_s, self.folder)


def main(
    widths: Annotated[str, typer.Option(metavar="LIST", help="Running branches to ask for.")] = "1,8,16,32,64",
    pace: Annotated[
        str, typer.Option(metavar="LIST", help="Durations of a draft forward, ms + ms per token; none: as it is.")
    ] = "none,5+0.02",
    loads: Annotated[
        str, typer.Option(metavar="LIST", help="steady: branches that all run; churning: commits stop and start them.")
    ] = "steady,churning",
    commit_tokens: Annotated[
        int, typer.Option(min=1, max=64, help="Churning: tokens committed every 40 ms at most.")
    ] = 1,
    max_branches: Annotated[int, typer.Option(min=1, max=64, help="Churning: tokens followed at each position.")] = 8,
    branch_depth: Annotated[int, typer.Option(min=1, max=64, help="Churning: tokens of a side branch.")] = 16,
    repeat: Annotated[int, typer.Option(min=1, help="Windows per width and load.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of a window.")] = 4.0,
    warm_up: Annotated[float, typer.Option(min=0.0, help="Seconds before a churning window.")] = 1.0,
    profile: Annotated[int, typer.Option(min=0, help="Seconds of the profile; 0 takes none. Needs py-spy.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the widths and of what is committed.")] = 0,
    models: ModelsFolder = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    keep_log: LogFolder = None,
    check: Annotated[bool, typer.Option("--check", help="Fail unless the step at 32 branches keeps its bar.")] = False,
) -> None:
    """Measure the drafter's step time by running branches of one session.

    Exit status: 0, or 1 when something failed or --check found the bar missed, 2 when this machine lacks something or
    an option is wrong, 130 after Ctrl-C.
    """

    def measure(console: Console) -> WidthResult:
        options = WidthOptions(
            repeats=repeat,
            window_s=seconds,
            warm_up_s=warm_up,
            profile_s=profile,
            seed=seed,
            models=models,
            widths=parse_widths(widths),
            paces=parse_paces(pace),
            loads=listed("--loads", loads, (STEADY, CHURNING)),
            churning=ChurningLoad(branch_depth, max_branches, commit_tokens),
        )
        return run_width(options, console, keep_log)

    outputs = Outputs(json_file, markdown_file, keep_log)
    measured("python -m vllm_wanspec.lab.drafter.width", measure, width_document, outputs, check)


if __name__ == "__main__":
    typer.run(main)
