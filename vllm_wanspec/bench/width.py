"""``make bench-width``: what running branches cost the drafter, one session at a real `wanspec drafter`.

The session asks for 1, 8, 16, 32 and 64 running branches in turn; a played target commits what was drafted, and the
drafter's own counters tell how long its branches take for a token.  ``python -m vllm_wanspec.bench.width --help``
lists the settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated

import aiohttp
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_wanspec.bench import machine
from vllm_wanspec.bench.client import ClientError
from vllm_wanspec.bench.demo_setup import DRAFT_PACE, find_models
from vllm_wanspec.bench.demo_view import starting
from vllm_wanspec.bench.pacing import PACING_ENV, Pacing
from vllm_wanspec.bench.servers import HOST, Server, ServerGroup, ServerSpec, free_ports, wanspec_command
from vllm_wanspec.bench.streams import DraftTokenizer
from vllm_wanspec.bench.width_measure import Load, Meter, Row, Workload, contexts, group_processes
from vllm_wanspec.bench.width_profile import find_py_spy, record
from vllm_wanspec.bench.width_report import BAR_WIDTH, Arm, WidthResult, print_report, write_json, write_markdown
from vllm_wanspec.config import WIDTH_ENV
from vllm_wanspec.errors import ConfigError, UnsupportedError, WanspecError

__all__ = ["WidthOptions", "drafter_spec", "main", "measure_arm", "parse_paces", "parse_widths", "run_width"]

START_DEADLINE_S = 300.0
DYING_S = 3.0
UNPACED = "none"
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True, slots=True)
class WidthOptions:
    """The width bench's settings.

    Args:
        widths: Running branches asked for; 1, which the others are compared with, among them.
        paces: Of the draft model's forward, one server each; None is as fast as it can.
        load: What the session asks for and commits.
        repeats: Windows per width.
        window_s: Seconds of a window.
        warm_up_s: Seconds before each window.
        profile_s: Seconds of the profile; 0 takes none.
        seed: Of the order of the widths, and of what is committed.
        models: Folder with ``draft/`` and ``prompts.jsonl``; None takes the checkout's.
    """

    widths: tuple[int, ...] = (1, 8, 16, 32, 64)
    paces: tuple[Pacing | None, ...] = (None, DRAFT_PACE)
    load: Load = field(default_factory=Load)
    repeats: int = 3
    window_s: float = 8.0
    warm_up_s: float = 2.0
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
    problem = machine.missing_vllm()
    if problem:
        raise UnsupportedError(problem)
    tokenizer = DraftTokenizer.load(draft)
    texts = contexts(prompts, tokenizer)
    arms = []
    with _folder(log_dir) as folder:
        for pace in options.paces:
            with ServerGroup(folder) as group:
                server = group.start(drafter_spec(draft, max(options.widths), pace))
                with starting(console, [server]) as view:
                    group.wait_ready([server], START_DEADLINE_S, on_ready=view.ready)
                try:
                    arms.append(asyncio.run(measure_arm(options, pace, server, tokenizer, texts, console, folder)))
                except ClientError:
                    group.check_alive(within_s=DYING_S)
                    raise
    return WidthResult(tuple(arms), options.load, options.repeats, options.window_s, time.monotonic() - began_s)


def drafter_spec(draft: Path, places: int, pace: Pacing | None) -> ServerSpec:
    """The drafter's server, on the core that the demo's has, with ``places`` for running branches."""
    (port,) = free_ports(1)
    core = machine.pin_cores()[1]
    env = machine.server_env(core) | {WIDTH_ENV: str(places)}
    if pace is not None:
        env[PACING_ENV] = pace.setting
    argv = [*wanspec_command("drafter", str(draft)), "--host", HOST, "--port", str(port), *machine.server_flags()]
    return ServerSpec("drafter-paced" if pace else "drafter", argv, port, env, core)


async def measure_arm(
    options: WidthOptions,
    pace: Pacing | None,
    server: Server,
    tokenizer: DraftTokenizer,
    texts: list[list[int]],
    console: Console,
    folder: Path,
) -> Arm:
    """Measure all widths at one running drafter, and profile it where it is not paced."""
    rows: list[Row] = []
    rng = Random(options.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with aiohttp.ClientSession() as http:
        meter = Meter(http, server.url, server.pid, server.spec.core)
        workload = Workload(http, server.url, tokenizer, texts, options.seed)
        with _this_process_on(machine.pin_cores()[0]), Progress(*columns, console=console) as progress:
            task = progress.add_task("widths", total=options.repeats * len(options.widths))
            for repeat in range(options.repeats):
                for width in rng.sample(options.widths, len(options.widths)):
                    progress.update(task, description=f"{pace or 'not paced'}, round {repeat + 1}: width {width}")
                    async with workload.running(options.load, width):
                        await asyncio.sleep(options.warm_up_s)
                        rows.append((await workload.window(meter, options.window_s)).row(width))
                    progress.advance(task)
        profile = await _profile(options, workload, server, console, folder) if pace is None else {}
    return Arm(pace, tuple(rows), profile)


async def _profile(
    options: WidthOptions, workload: Workload, server: Server, console: Console, folder: Path
) -> dict[str, dict[str, float]]:
    program, pids = find_py_spy(), group_processes(server.pid)
    if not options.profile_s or program is None or not pids:
        return {}
    with console.status(f"profile at {BAR_WIDTH} running branches"):
        async with workload.running(options.load, BAR_WIDTH):
            await asyncio.sleep(options.warm_up_s)
            return await record(program, pids, options.profile_s, folder)


@contextlib.contextmanager
def _this_process_on(core: int | None) -> Iterator[None]:
    """Keep this thread, which plays the target, off the drafter's core; nothing where cores are not pinned."""
    if core is None or sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Yield the given folder, made if need be, or a temporary one."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="wanspec-width-") as folder:
            yield Path(folder)
        return
    try:
        given.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--keep-log: cannot create {given}: {error.strerror}") from error
    yield given.resolve()


def main(
    widths: Annotated[str, typer.Option(metavar="LIST", help="Running branches to ask for.")] = "1,8,16,32,64",
    pace: Annotated[
        str, typer.Option(metavar="LIST", help="Durations of a draft forward, ms + ms per token; none: as it is.")
    ] = "none,5+0.02",
    commit_tokens: Annotated[int, typer.Option(min=1, max=64, help="Tokens committed every 40 ms at most.")] = 1,
    max_branches: Annotated[int, typer.Option(min=1, max=64, help="Tokens followed at each position.")] = 8,
    branch_depth: Annotated[int, typer.Option(min=1, max=64, help="Tokens of a side branch.")] = 16,
    repeat: Annotated[int, typer.Option(min=1, help="Windows per width.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of a window.")] = 8.0,
    warm_up: Annotated[float, typer.Option(min=0.0, help="Seconds before each window.")] = 2.0,
    profile: Annotated[int, typer.Option(min=0, help="Seconds of the profile; 0 takes none. Needs py-spy.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the widths and of what is committed.")] = 0,
    models: Annotated[
        Path | None,
        typer.Option(help="Folder with draft/ and prompts.jsonl.", show_default="examples/demo_models of the checkout"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything here.")] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables here.")
    ] = None,
    keep_log: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep logs and samples here.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Fail unless the step at 32 branches keeps its bar.")] = False,
) -> None:
    """Measure the drafter's step time by running branches of one session.

    Exit status: 0, or 1 when something failed or --check found the bar missed, 2 when this machine lacks something or
    an option is wrong, 130 after Ctrl-C.
    """
    console = Console() if sys.stdout.isatty() else Console(width=130)
    with _one_line_errors():
        options = WidthOptions(
            widths=parse_widths(widths),
            paces=parse_paces(pace),
            load=Load(commit_tokens, branch_depth, max_branches),
            repeats=repeat,
            window_s=seconds,
            warm_up_s=warm_up,
            profile_s=profile,
            seed=seed,
            models=models,
        )
        for option, path in (("--json", json_file), ("--markdown", markdown_file)):
            if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
                raise ConfigError(f"{option}: cannot write {path}: it is a folder, or its folder does not exist")
        result = run_width(options, console, keep_log)
        print_report(result, console)
        if json_file is not None:
            write_json(result, json_file)
        if markdown_file is not None:
            write_markdown(result, markdown_file)
    if check and not result.held:
        raise typer.Exit(1)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn whatever ends the bench into one line and an exit status."""
    try:
        yield
    except (ConfigError, UnsupportedError) as error:
        raise _failed(str(error), 2) from None
    except WanspecError as error:
        raise _failed(str(error), 1) from None
    except KeyboardInterrupt:
        raise _failed("interrupted; everything is stopped", INTERRUPTED) from None


def _failed(message: str, status: int) -> typer.Exit:
    typer.echo(f"bench-width: {message}", err=True)
    return typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
