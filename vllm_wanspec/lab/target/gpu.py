"""``scripts/gpu_check.sh``: what our constraints, a dead drafter and drafts are worth on a GPU, where nothing is paced.

For each model runner and way of scheduling: plain vLLM as shipped and under our constraints, a co-located draft model,
remote drafting with a dead drafter and with drafts, and both ways of drafting at a given acceptance.
``python -m vllm_wanspec.lab.target.gpu --help`` lists the settings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_wanspec.errors import UnsupportedError, WanspecError
from vllm_wanspec.lab.harness.launch import serving
from vllm_wanspec.lab.harness.models import Prompt, find_models, read_prompts
from vllm_wanspec.lab.harness.options import JsonFile, LogFolder, MarkdownFile, ModelsFolder, listed, parse_list
from vllm_wanspec.lab.harness.running import Outputs, check_needs, log_folder
from vllm_wanspec.lab.report.writing import measured
from vllm_wanspec.lab.target.gpu_measure import GpuPart
from vllm_wanspec.lab.target.gpu_plan import (
    BACKENDS,
    START_DEADLINE_S,
    GpuOptions,
    GpuPlan,
    knows_given_acceptance,
    models_for,
    plan_gpu,
    usable_gpus,
)
from vllm_wanspec.lab.target.gpu_report import MIN_ROUNDS, GpuResult, GpuRow, gpu_document

NO_GPU = "no GPU here (nvidia-smi lists none)"


def run_gpu(options: GpuOptions, console: Console, log_dir: Path | None = None) -> GpuResult:
    """Run the check, comparison by comparison; the servers' logs stay in ``log_dir``, if there is one.

    A comparison in which a server or a request fails is told of, and the others go on: time on a GPU is dear.

    Raises:
        UnsupportedError: No GPU that may be used, or no vLLM that could be started.
        ConfigError: Models or prompts are missing, or not for so many GPUs.
        WanspecError: All comparisons failed.
    """
    count = usable_gpus()
    if not count:
        raise UnsupportedError(NO_GPU)
    found = find_models(options.models)
    prompts = read_prompts(found.prompts, options.prompts)
    check_needs()
    given = knows_given_acceptance()
    rows: list[GpuRow] = []
    failures: list[str] = []
    with log_folder(log_dir, "--keep-log", console) as folder:
        for size in (size for size in options.tensor_parallel if size <= count):
            models = models_for(found, size, folder)
            for name, part in product(options.backends, (False, True) if given else (False,)):
                what = f"{name}, tensor parallel {size}{', acceptance given' * part}"
                console.print(what, highlight=False)
                beside = folder / f"{name}-tp{size}{'-given' * part}"
                beside.mkdir(exist_ok=True)
                plan = plan_gpu(options, BACKENDS[name], size, models, beside, part)
                try:
                    rows += _measured(options, plan, prompts, beside, console)
                except WanspecError as error:
                    failures.append(f"{what}: {str(error).splitlines()[0]}")
                    console.print(f"error: {what}: {error}", style="bold red", highlight=False, markup=False)
    if not rows:
        raise WanspecError("; ".join(failures) or "nothing to measure")
    left_out = [
        f"Not measured with tensor parallel {size}: {count} GPU{'s' * (count > 1)} to use."
        for size in options.tensor_parallel
        if size > count
    ]
    left_out += [] if given else ["Not measured: this vLLM knows no given acceptance."]
    return GpuResult(options, rows, left_out, failures)


def _measured(
    options: GpuOptions, plan: GpuPlan, prompts: Sequence[Prompt], folder: Path, console: Console
) -> list[GpuRow]:
    """The rows of one comparison, with its servers as long as it lasts."""
    # vLLM measures free memory as it starts, which another server's start would disturb.
    with serving(plan.specs, folder, console, in_turn=True, deadline_s=START_DEADLINE_S) as servers:
        return asyncio.run(GpuPart(options, plan, servers, console).measure(prompts))


DEFAULTS = GpuOptions()


def main(
    backends: Annotated[str, typer.Option(metavar="LIST", help=f"Of {', '.join(BACKENDS)}.")] = ",".join(BACKENDS),
    tensor_parallel: Annotated[str, typer.Option(metavar="LIST", help="GPUs of a target.")] = "1,2",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts sent to each target.")] = DEFAULTS.prompts,
    max_tokens: Annotated[int, typer.Option(min=8, max=512, help="Tokens generated for each.")] = DEFAULTS.max_tokens,
    gamma: Annotated[int, typer.Option(min=1, max=64, help="Draft tokens per step at most.")] = DEFAULTS.gamma,
    at_a_time: Annotated[str, typer.Option(metavar="LIST", help="Requests at a time.")] = "1,8",
    rounds: Annotated[
        int, typer.Option(min=1, help=f"Rounds; fewer than {MIN_ROUNDS} are not judged.")
    ] = DEFAULTS.rounds,
    acceptance: Annotated[
        float, typer.Option(help="Probability that one more draft is accepted, where it is given.")
    ] = DEFAULTS.acceptance,
    dtype: Annotated[str, typer.Option(help="Of weights and activations.")] = DEFAULTS.dtype,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of targets.")] = DEFAULTS.seed,
    models: ModelsFolder = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    keep_log: LogFolder = None,
    check: Annotated[bool, typer.Option("--check", help="Fail unless all is right and the bar is kept.")] = False,
) -> None:
    """Measure what our constraints, a dead drafter and drafts are worth on a GPU.

    Exit status: 0, or 1 when something failed or --check found something wrong or a bar missed, 2 when this machine
    lacks something or an option is wrong, 130 after Ctrl-C.
    """

    def measure(console: Console) -> GpuResult:
        options = GpuOptions(
            backends=listed("--backends", backends, [*BACKENDS]),
            tensor_parallel=parse_list("--tensor-parallel", tensor_parallel, int),
            prompts=prompts,
            max_tokens=max_tokens,
            gamma=gamma,
            at_a_time=parse_list("--at-a-time", at_a_time, int),
            rounds=rounds,
            acceptance=acceptance,
            dtype=dtype,
            seed=seed,
            models=models,
        )
        return run_gpu(options, console, keep_log)

    outputs = Outputs(json_file, markdown_file, keep_log)
    measured("python -m vllm_wanspec.lab.target.gpu", measure, gpu_document, outputs, check)


if __name__ == "__main__":
    typer.run(main)
