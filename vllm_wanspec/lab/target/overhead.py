"""``make bench-overhead``: what remote drafting costs where nothing is paced, demo models as they are.

Target: the time of a step with WANSpec while no drafts arrive, divided by that of the same vLLM with a custom proposer
that returns empty lists.  Drafter: tokens per second through our route, divided by those of a program that calls the
same engine itself.  Both sides of a ratio run in the same rounds.
``python -m vllm_wanspec.lab.target.overhead --help`` lists the settings.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_wanspec.lab.drafter.direct import direct_spec
from vllm_wanspec.lab.drafter.loads import contexts
from vllm_wanspec.lab.harness.launch import drafter_spec, serving
from vllm_wanspec.lab.harness.models import find_models, read_prompts
from vllm_wanspec.lab.harness.options import JsonFile, LogFolder, MarkdownFile, ModelsFolder, listed, parse_widths
from vllm_wanspec.lab.harness.running import Outputs, check_needs, log_folder
from vllm_wanspec.lab.harness.servers import free_ports
from vllm_wanspec.lab.report.writing import measured
from vllm_wanspec.lab.target.overhead_measure import TargetPart, compare_routes, plan_targets
from vllm_wanspec.lab.target.overhead_report import (
    DRAFTER,
    MIN_PROMPTS,
    MIN_ROUNDS,
    TARGET,
    Comparison,
    OverheadOptions,
    OverheadResult,
    overhead_document,
)
from vllm_wanspec.sim.controller import DraftTokenizer


def run_overhead(options: OverheadOptions, console: Console, log_dir: Path | None = None) -> OverheadResult:
    """Run the bench; the servers' logs stay in ``log_dir``, if there is one.

    Raises:
        ConfigError: Models or prompts are missing or wrong.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed, or the silent drafter was not silent.
    """
    models = find_models(options.models)
    prompts = read_prompts(models.prompts, options.prompts)
    check_needs()
    rows: list[Comparison] = []
    differences: list[str] = []
    with log_folder(log_dir, "--keep-log", console) as folder:
        if TARGET in options.parts:
            specs, metrics = plan_targets(models, folder, options.instances)
            targets = TargetPart(options, metrics, prompts, console)
            with serving(list(specs.values()), folder, console) as servers:
                rows += asyncio.run(targets.measure(servers))
            differences = targets.differences
        if DRAFTER in options.parts:
            route = drafter_spec(models.draft, max(options.widths), None)
            (port,) = free_ports(1)
            direct = direct_spec(models.draft, models.prompts, port, route.core)
            tokenizer = DraftTokenizer.load(models.draft)
            texts = contexts(models.prompts, tokenizer)
            with serving([route, direct], folder, console) as servers:
                rows += asyncio.run(compare_routes(options, tokenizer, texts, servers, console))
    return OverheadResult(options, rows, differences)


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

    def measure(console: Console) -> OverheadResult:
        options = OverheadOptions(
            parts=listed("--parts", parts, (TARGET, DRAFTER)),
            prompts=prompts,
            max_tokens=max_tokens,
            widths=parse_widths(widths),
            rounds=rounds,
            instances=instances,
            window_s=seconds,
            seed=seed,
            models=models,
        )
        return run_overhead(options, console, keep_log)

    outputs = Outputs(json_file, markdown_file, keep_log)
    measured("python -m vllm_wanspec.lab.target.overhead", measure, overhead_document, outputs, check)


if __name__ == "__main__":
    typer.run(main)
