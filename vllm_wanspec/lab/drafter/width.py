"""``make bench-width``: what running branches cost the drafter, one session at a real `wanspec drafter`.

The session asks for 1, 8, 16, 32 and 64 running branches in turn, under two loads.  Steady: all of them run, and the
time between two tokens of a branch is what width itself costs; the bar is about this.  Churning: a played target
commits what was drafted, so that branches are started and stopped all the time: what commits cost on top.
``python -m vllm_wanspec.lab.drafter.width --help`` lists the settings.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated

import aiohttp
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.drafter.streams import DraftTokenizer
from vllm_wanspec.lab.drafter.width_measure import Load, Meter, Row, Workload, contexts
from vllm_wanspec.lab.drafter.width_profile import find_py_spy, record
from vllm_wanspec.lab.drafter.width_report import BAR_WIDTH, Arm, WidthResult, print_report, write_json, write_markdown
from vllm_wanspec.lab.drafter.width_steady import SteadyLoad, SteadyWorkload
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.cpu import CpuClock, group_processes
from vllm_wanspec.lab.harness.launch import DRAFT_PACE, drafter_spec
from vllm_wanspec.lab.harness.models import find_models
from vllm_wanspec.lab.harness.options import JsonFile, LogFolder, MarkdownFile, ModelsFolder
from vllm_wanspec.lab.harness.running import Outputs, check_outputs, log_folder, one_line_errors, require_vllm
from vllm_wanspec.lab.harness.servers import Server, ServerGroup
from vllm_wanspec.lab.harness.view import starting

__all__ = ["WidthOptions", "main", "parse_loads", "parse_paces", "parse_widths", "run_width"]

START_DEADLINE_S = 300.0
DYING_S = 3.0
UNPACED = "none"
STEADY, CHURNING = "steady", "churning"


@dataclass(frozen=True, slots=True)
class WidthOptions:
    """The width bench's settings.

    Args:
        widths: Running branches asked for; 1, which the others are compared with, among them.
        paces: Of the draft model's forward, one server each; None is as fast as it can.
        loads: Which of "steady" and "churning" to measure.
        steady: What the sessions of the first ask for.
        churning: What the session of the second asks for and commits.
        repeats: Windows per width and load.
        window_s: Seconds of a window.
        warm_up_s: Seconds before each churning window, and of steady load at first.
        profile_s: Seconds of the profile under the first load; 0 takes none.
        seed: Of the order of the widths, and of what is committed.
        models: Folder with ``draft/`` and ``prompts.jsonl``; None takes the checkout's.
    """

    widths: tuple[int, ...] = (1, 8, 16, 32, 64)
    paces: tuple[Pacing | None, ...] = (None, DRAFT_PACE)
    loads: tuple[str, ...] = (STEADY, CHURNING)
    steady: SteadyLoad = field(default_factory=SteadyLoad)
    churning: Load = field(default_factory=Load)
    repeats: int = 3
    window_s: float = 4.0
    warm_up_s: float = 1.0
    profile_s: int = 8
    seed: int = 0
    models: Path | None = None

    def __post_init__(self) -> None:
        if 1 not in self.widths:
            raise ConfigError("--widths: 1 is missing, which all others are compared with")


def parse_widths(text: str) -> tuple[int, ...]:
    """Read ``"1,8,16"``.

    Raises:
        ConfigError: Not different numbers from 1 to 1024.
    """
    try:
        widths = [int(part) for part in text.split(",")]
    except ValueError:
        widths = []
    if not widths or len(set(widths)) < len(widths) or not all(1 <= width <= 1024 for width in widths):
        raise ConfigError(f"--widths: {text!r} is not a list of different numbers from 1 to 1024, as in 1,8,16")
    return tuple(sorted(widths))


def parse_paces(text: str) -> tuple[Pacing | None, ...]:
    """Read ``"none,5+0.02"``; each pace is one server.

    Raises:
        ConfigError: One of them is not a pace.
    """
    parts = [part.strip() for part in text.split(",")]
    return tuple(None if part == UNPACED else Pacing.parse(part, "--pace") for part in parts)


def parse_loads(text: str) -> tuple[str, ...]:
    """Read ``"steady,churning"``.

    Raises:
        ConfigError: Another name, or none.
    """
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= {STEADY, CHURNING}:
        raise ConfigError(f"--loads: {text!r} is not a list of {STEADY} and {CHURNING}")
    return names


def run_width(options: WidthOptions, console: Console, log_dir: Path | None = None) -> WidthResult:
    """Run the bench.

    Args:
        options: What to measure.
        console: Where to show progress.
        log_dir: Where the servers' logs and the profile's samples stay; None keeps none.

    Raises:
        ConfigError: Models or prompts are missing or wrong.
        UnsupportedError: No vLLM that could be started.
        WanspecError: The drafter failed.
    """
    began_s = time.monotonic()
    draft, prompts = find_models(options.models).draft, find_models(options.models).prompts
    require_vllm()
    tokenizer = DraftTokenizer.load(draft)
    texts = contexts(prompts, tokenizer)
    steady: list[Arm] = []
    churning: list[Arm] = []
    with log_folder(log_dir, "--keep-log", console) as folder:
        for pace in options.paces:
            with ServerGroup(folder) as group:
                server = group.start(drafter_spec(draft, max(options.widths), pace))
                with starting(console, [server]) as view:
                    group.wait_ready([server], START_DEADLINE_S, on_ready=view.ready)
                try:
                    bench = _Bench(options, pace, server, tokenizer, texts, console, folder)
                    found = asyncio.run(bench.measure())
                except ClientError:
                    group.check_alive(within_s=DYING_S)
                    raise
            for load, arms in ((STEADY, steady), (CHURNING, churning)):
                arms += [found[load]] if load in found else []
    return WidthResult(
        tuple(steady),
        tuple(churning),
        options.steady,
        options.churning,
        options.repeats,
        options.window_s,
        time.monotonic() - began_s,
    )


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
            meter = Meter(http, server.url, cpu)
            steady = SteadyWorkload(http, server.url, self.tokenizer, self.texts, cpu)
            churning = Workload(http, server.url, self.tokenizer, self.texts, options.seed)

            async def steady_window(width: int) -> Row:
                return await steady.window(options.steady, width, options.window_s)

            async def churning_window(width: int) -> Row:
                async with churning.running(options.churning, width):
                    await asyncio.sleep(options.warm_up_s)
                    return (await churning.window(meter, options.window_s)).row(width)

            with machine.on_core(machine.pin_cores()[0]):
                await steady.window(options.steady, max(options.widths), options.warm_up_s)
                for load in options.loads:
                    rows = await self._windows(load, steady_window if load == STEADY else churning_window)
                    profile: dict[str, dict[str, float]] = {}
                    if self.pace is None and load == options.loads[0]:
                        wide = steady.running(options.steady, BAR_WIDTH)
                        profile = await self._profile(
                            wide if load == STEADY else churning.running(options.churning, BAR_WIDTH)
                        )
                    arms[load] = Arm(self.pace, tuple(rows), profile)
        return arms

    async def _windows(self, load: str, window: Callable[[int], Awaitable[Row]]) -> list[Row]:
        options = self.options
        rows: list[Row] = []
        rng = Random(options.seed)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(load, total=options.repeats * len(options.widths))
            for repeat in range(options.repeats):
                for width in rng.sample(options.widths, len(options.widths)):
                    title = f"{self.pace or 'not paced'}, {load}, round {repeat + 1}: width {width}"
                    progress.update(task, description=title)
                    rows.append(await window(width))
                    progress.advance(task)
        return rows

    async def _profile(self, running: AbstractAsyncContextManager[None]) -> dict[str, dict[str, float]]:
        program, pids = find_py_spy(), group_processes(self.server.pid)
        if not self.options.profile_s or program is None or not pids:
            return {}
        with self.console.status(f"profile at {BAR_WIDTH} running branches"):
            async with running:
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
    console = Console() if sys.stdout.isatty() else Console(width=130)
    with one_line_errors("bench-width"):
        options = WidthOptions(
            widths=parse_widths(widths),
            paces=parse_paces(pace),
            loads=parse_loads(loads),
            churning=Load(commit_tokens, branch_depth, max_branches),
            repeats=repeat,
            window_s=seconds,
            warm_up_s=warm_up,
            profile_s=profile,
            seed=seed,
            models=models,
        )
        check_outputs(Outputs(json_file, markdown_file))
        result = run_width(options, console, keep_log)
        print_report(result, console)
        if json_file is not None:
            write_json(result, json_file)
        if markdown_file is not None:
            write_markdown(result, markdown_file)
    if check and not result.held:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
