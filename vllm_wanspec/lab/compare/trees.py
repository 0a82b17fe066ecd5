"""``make bench-trees``: what redundancy buys, live, with the demo models across an emulated WAN.

``python -m vllm_wanspec.lab.compare.trees --help`` lists the settings.  One target serves all arms: an arm is a set of
tree settings that its requests ask for.  To try others::

    python -m vllm_wanspec.lab.compare.trees --prompts 16 --arms "main-line=max_branches=1; wide=running_branches=64"

The drafter's own limit of running branches, ``WANSPEC_RUNNING_BRANCHES``, applies to all arms.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.compare.demo_setup import PORTS_NEEDED, DemoPlan
from vllm_wanspec.lab.compare.trees_measure import Measurement
from vllm_wanspec.lab.compare.trees_report import print_report, write_json, write_markdown
from vllm_wanspec.lab.compare.trees_result import TreesResult
from vllm_wanspec.lab.compare.trees_setup import DEFAULT_ARMS, MAIN_LINE, TreesOptions, parse_arms, plan_trees
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.models import find_models, read_prompts
from vllm_wanspec.lab.harness.options import DraftPace, JsonFile, LogFolder, MarkdownFile, ModelsFolder, TargetPace
from vllm_wanspec.lab.harness.running import Outputs, check_outputs, log_folder, one_line_errors, require_vllm
from vllm_wanspec.lab.harness.servers import ServerGroup, free_ports
from vllm_wanspec.lab.harness.view import starting

__all__ = ["Outputs", "main", "run_trees"]

START_DEADLINE_S = 300.0
DYING_S = 3.0
DRAFTER = "drafter"
LOG_WIDTH = 130  # where there is no terminal that says; the tables are wide


def run_trees(options: TreesOptions, outputs: Outputs, console: Console) -> TreesResult:
    """Run the bench; report and write what it found, also where something ends it early.

    Args:
        options: What to measure.
        outputs: Where the results go.
        console: Where to show progress and report.

    Raises:
        ConfigError: Models, prompts or a path are missing or wrong.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed.
    """
    began_s = time.monotonic()
    models = find_models(options.models)
    prompts = read_prompts(models.prompts, options.prompts)
    check_outputs(outputs)
    require_vllm()
    with log_folder(outputs.log_dir, "--keep-log", console) as folder:
        plan = plan_trees(options, models, free_ports(PORTS_NEEDED), folder)
        measurement = Measurement(plan, options, prompts, console)
        ended_by: str | None = "the run was interrupted"
        try:
            _measure(measurement, plan, folder, console)
            ended_by = None
        except WanspecError as error:
            ended_by = str(error).partition("\n")[0]
            raise
        finally:
            result = _result(measurement, options, time.monotonic() - began_s, ended_by)
            if result.rows:
                _publish(result, outputs, console)
    return result


def _measure(measurement: Measurement, plan: DemoPlan, folder: Path, console: Console) -> None:
    """Start the servers, measure, and stop them, whatever happens."""
    with ServerGroup(folder) as group:
        servers = {spec.name: group.start(spec) for spec in plan.specs}
        with starting(console, list(servers.values())) as view:
            group.wait_ready(servers.values(), START_DEADLINE_S, on_ready=view.ready)
        try:
            asyncio.run(measurement.run(servers[DRAFTER], servers[plan.wanspec]))
        except ClientError:
            # A dying server explains a failed request better than the request does.
            group.check_alive(within_s=DYING_S)
            raise
        group.check_alive()
        console.print("stopping the servers", style="dim")


def _result(measurement: Measurement, options: TreesOptions, seconds: float, ended_by: str | None) -> TreesResult:
    return TreesResult(
        options=options,
        references=measurement.references,
        rows=measurement.rows,
        differences=measurement.differences,
        paced=measurement.paced(),
        seconds=seconds,
        ended_by=ended_by,
    )


def _publish(result: TreesResult, outputs: Outputs, console: Console) -> None:
    print_report(result, console)
    if outputs.json_path is not None:
        write_json(result, outputs.json_path)
    if outputs.markdown_path is not None:
        write_markdown(result, outputs.markdown_path)


def main(
    rtt_ms: Annotated[float, typer.Option(min=0, max=10_000, help="Emulated round trip to the drafter, ms.")] = 30.0,
    prompts: Annotated[int | None, typer.Option(min=1, help="How many prompts.", show_default="all")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="How often each prompt goes through each arm.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=24, max=512, help="Tokens to generate per prompt.")] = 128,
    speculative_tokens: Annotated[int, typer.Option(min=1, max=64, help="Draft tokens verified per step at most.")] = 8,
    arms: Annotated[
        str,
        typer.Option(
            metavar="ARMS",
            help='What to compare: "name=key=value,key=value; name2=…" with keys of the tree section; "name=off" is '
            'plain decoding, "name=" is as configured.',
        ),
    ] = DEFAULT_ARMS,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="ARM", help="The arm to divide by.", show_default=f"{MAIN_LINE} if there is one, else the first"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the arms' order and of the intervals.")] = 0,
    models: ModelsFolder = None,
    target_pace: TargetPace = "35+0.1",
    draft_pace: DraftPace = "5+0.02",
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    keep_log: LogFolder = None,
    check: Annotated[bool, typer.Option("--check", help="Fail unless trees buy what they have to.")] = False,
) -> None:
    """Measure what drafting more than the most probable path buys, per entropy threshold.

    Exit status: 0 when the figures are valid and all outputs right, 1 when not or when something failed, 2 when this
    machine lacks something or an option is wrong, 130 after Ctrl-C.
    """
    with one_line_errors("bench-trees"):
        compared = parse_arms(arms)
        names = [arm.name for arm in compared]
        options = TreesOptions(
            arms=compared,
            baseline=baseline or (MAIN_LINE if MAIN_LINE in names else names[0]),
            rtt_ms=rtt_ms,
            prompts=prompts,
            max_tokens=max_tokens,
            repeats=repeat,
            speculative_tokens=speculative_tokens,
            seed=seed,
            models=models,
            target_pace=Pacing.parse(target_pace, "--target-pace"),
            draft_pace=Pacing.parse(draft_pace, "--draft-pace"),
        )
        result = run_trees(options, Outputs(json_file, markdown_file, keep_log), _console())
    if not result.is_valid or result.errors or (check and not result.held):
        raise typer.Exit(1)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)


if __name__ == "__main__":
    typer.run(main)
