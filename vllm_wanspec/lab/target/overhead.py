"""``make bench-overhead``: what remote drafting costs where nothing is paced, demo models as they are.

Target: the time of a step with WANSpec while no drafts arrive, divided by that of the same vLLM with a custom proposer
that returns empty lists.  Drafter: tokens per second through our route, divided by those of a program that calls the
same engine itself.  Both sides of a ratio run in the same rounds.
``python -m vllm_wanspec.lab.target.overhead --help`` lists the settings.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.drafter.overhead_direct import direct_spec
from vllm_wanspec.lab.drafter.streams import DraftTokenizer
from vllm_wanspec.lab.drafter.width import parse_widths
from vllm_wanspec.lab.drafter.width_measure import contexts
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.launch import DYING_S, START_DEADLINE_S, drafter_spec
from vllm_wanspec.lab.harness.models import choose_prompts, find_models
from vllm_wanspec.lab.harness.options import JsonFile, LogFolder, MarkdownFile, ModelsFolder
from vllm_wanspec.lab.harness.running import Outputs, check_outputs, log_folder, one_line_errors, require_vllm
from vllm_wanspec.lab.harness.servers import Server, ServerGroup, ServerSpec, free_ports
from vllm_wanspec.lab.harness.view import starting
from vllm_wanspec.lab.target.overhead_measure import DrafterPart, OverheadOptions, TargetPart, plan_targets
from vllm_wanspec.lab.target.overhead_report import (
    DRAFTER,
    MIN_PROMPTS,
    MIN_ROUNDS,
    TARGET,
    Comparison,
    OverheadResult,
    print_report,
    write_json,
    write_markdown,
)

__all__ = ["main", "parse_parts", "run_overhead"]


def parse_parts(text: str) -> tuple[str, ...]:
    """Read ``"target,drafter"``.

    Raises:
        ConfigError: Another name, or none.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(names) <= {TARGET, DRAFTER}:
        raise ConfigError(f"--parts: {text!r} is not a list of {TARGET} and {DRAFTER}")
    return names


def run_overhead(options: OverheadOptions, console: Console, log_dir: Path | None = None) -> OverheadResult:
    """Run the bench.

    Args:
        options: What to measure.
        console: Where to show progress.
        log_dir: Where the servers' logs stay; None keeps none.

    Raises:
        ConfigError: Models or prompts are missing or wrong.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed, or the silent drafter was not silent.
    """
    began_s = time.monotonic()
    models = find_models(options.models)
    prompts = choose_prompts(models.prompts, options.prompts)
    require_vllm()
    rows: list[Comparison] = []
    differences: list[str] = []
    with log_folder(log_dir, "--keep-log", console) as folder:
        if TARGET in options.parts:
            plan = plan_targets(models, folder, options.instances)
            targets = TargetPart(options, plan.metrics, prompts, console)
            rows += _with_servers(folder, console, list(plan.specs.values()), targets.measure)
            differences = targets.differences
        if DRAFTER in options.parts:
            route = drafter_spec(models.draft, max(options.widths), None)
            (port,) = free_ports(1)
            direct = direct_spec(models.draft, models.prompts, port, route.core)
            tokenizer = DraftTokenizer.load(models.draft)
            drafters = DrafterPart(options, tokenizer, contexts(models.prompts, tokenizer), console)
            rows += _with_servers(folder, console, [route, direct], drafters.measure)
    return OverheadResult(
        rows,
        options.load,
        options.prompts,
        options.max_tokens,
        options.window_s,
        options.rounds,
        options.instances,
        differences,
        time.monotonic() - began_s,
    )


def _with_servers(
    folder: Path,
    console: Console,
    specs: Sequence[ServerSpec],
    measure: Callable[[dict[str, Server]], Coroutine[Any, Any, list[Comparison]]],
) -> list[Comparison]:
    """Measure with servers that run meanwhile."""
    with ServerGroup(folder) as group:
        servers = {spec.name: group.start(spec) for spec in specs}
        with starting(console, list(servers.values())) as view:
            group.wait_ready(servers.values(), START_DEADLINE_S, on_ready=view.ready)
        try:
            return asyncio.run(measure(servers))
        except ClientError:
            # A dying server explains a failed request better than the request does.
            group.check_alive(within_s=DYING_S)
            raise


def main(
    parts: Annotated[str, typer.Option(metavar="LIST", help="What to measure: target, drafter.")] = "target,drafter",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts sent to each target.")] = MIN_PROMPTS,
    max_tokens: Annotated[int, typer.Option(min=2, max=512, help="Tokens generated for each.")] = 96,
    widths: Annotated[str, typer.Option(metavar="LIST", help="Running branches at the drafter.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help=f"Rounds; fewer than {MIN_ROUNDS} are not judged.")] = MIN_ROUNDS,
    instances: Annotated[int, typer.Option(min=1, max=8, help="Processes of each kind of target.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of a window at the drafter.")] = 3.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of targets and widths.")] = 0,
    models: ModelsFolder = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    keep_log: LogFolder = None,
    check: Annotated[bool, typer.Option("--check", help="Fail unless every bar is kept.")] = False,
) -> None:
    """Measure what remote drafting costs target and drafter where nothing is paced.

    Exit status: 0, or 1 when something failed or --check found a bar missed, 2 when this machine lacks something or an
    option is wrong, 130 after Ctrl-C.
    """
    console = Console() if sys.stdout.isatty() else Console(width=130)
    with one_line_errors("bench-overhead"):
        options = OverheadOptions(
            parts=parse_parts(parts),
            prompts=prompts,
            max_tokens=max_tokens,
            widths=parse_widths(widths),
            rounds=rounds,
            instances=instances,
            window_s=seconds,
            seed=seed,
            models=models,
        )
        check_outputs(Outputs(json_file, markdown_file))
        result = run_overhead(options, console, keep_log)
        print_report(result, console)
        if json_file is not None:
            write_json(result, json_file)
        if markdown_file is not None:
            write_markdown(result, markdown_file)
    if check and not result.all_held:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
