"""``make bench-trees``: what redundancy buys, live, with the demo models across an emulated WAN.

``python -m vllm_wanspec.lab.compare.trees --help`` lists the settings.  One target serves all arms: an arm is a set of
tree settings that its requests ask for.  To try others::

    python -m vllm_wanspec.lab.compare.trees --prompts 16 --arms "main-line=max_branches=1; wide=running_branches=64"

The drafter's own limit of running branches, ``WANSPEC_RUNNING_BRANCHES``, applies to all arms.  An interrupted run goes
on when the same command is given again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.arms import THRESHOLD_KEY, TREES, tree_arms
from vllm_wanspec.lab.compare.plan import Options, of_demo_models
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.run import run_compare
from vllm_wanspec.lab.compare.trees_figures import DEFAULT_ARM, MAIN_LINE, TARGET, TreesFigures, trees_figures
from vllm_wanspec.lab.compare.trees_report import trees_report
from vllm_wanspec.lab.harness.models import read_prompts
from vllm_wanspec.lab.harness.options import DraftPace, JsonFile, LogFolder, MarkdownFile, ModelsFolder, TargetPace
from vllm_wanspec.lab.harness.running import Outputs, console_of_this_run, one_line_errors
from vllm_wanspec.lab.report.writing import Publication

PROGRAM = "python -m vllm_wanspec.lab.compare.trees"
DEFAULT_ARMS = "; ".join(
    [
        f"{MAIN_LINE}=max_branches=1",
        *(f"theta-{theta}={THRESHOLD_KEY}={theta}" for theta in ("inf", "2", "1.5", "1", "0.5", "0")),
        f"adaptive={THRESHOLD_KEY}=adaptive",
        f"{DEFAULT_ARM}=",
    ]
)


def trees_options(arms: str, rtt_ms: float, models: Path | None, **changes: Any) -> Options:
    """Return the settings of a run of tree arms alone, given as text; see `of_demo_models`."""
    compared = tree_arms("--arms", arms, replace(TREES, name=TARGET))
    return of_demo_models(models, compared, rtt_ms, count=None, **changes)


def run_trees(options: Options, baseline: str, prompts: int | None, outputs: Outputs, console: Console) -> TreesFigures:
    """Run the bench, or go on with it; report and write what it found, also where something ends it early.

    Args:
        options: What to measure.
        baseline: Name of the arm to divide by.
        prompts: How many prompts are sent; None sends all.
        outputs: Where the results go.
        console: Where to show progress and report.

    Raises:
        ConfigError: Prompts or a path are missing or wrong, or no arm is called like the baseline.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed.
    """
    names = [arm.name for arm in options.arms]
    if baseline not in names:
        raise ConfigError(f"--baseline: no arm is called {baseline!r}; there are {', '.join(names)}")

    def report(result: Result) -> Publication | None:
        return trees_report(trees_figures(result, baseline))

    sent = read_prompts(options.prompts, prompts)
    result = run_compare(options, sent, outputs, console, name="trees", program=PROGRAM, report=report)
    return trees_figures(result, baseline)


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
        options = trees_options(
            arms,
            rtt_ms,
            models,
            max_tokens=max_tokens,
            repeats=repeat,
            speculative_tokens=speculative_tokens,
            seed=seed,
            target_pace=Pacing.parse(target_pace, "--target-pace"),
            draft_pace=Pacing.parse(draft_pace, "--draft-pace"),
        )
        names = [arm.name for arm in options.arms]
        below = baseline or (MAIN_LINE if MAIN_LINE in names else names[0])
        outputs = Outputs(json_file, markdown_file, keep_log)
        found = run_trees(options, below, prompts, outputs, console_of_this_run())
    if not found.is_valid or found.result.wrong or (check and not found.held):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
