"""``make bench-dtype``: how many greedy texts part from plain vLLM's at the same dtype, ours beside vLLM's speculation.

In bfloat16 close logits round alike, and which token wins depends on the shape of the step: whatever changes that shape
changes texts, batching alone does. Nothing is paced, and there is no WAN.
``python -m vllm_wanspec.lab.target.dtype --help`` lists the settings.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.launch import serving
from vllm_wanspec.lab.harness.models import find_models, read_prompts
from vllm_wanspec.lab.harness.options import JsonFile, LogFolder, MarkdownFile, ModelsFolder, listed, parse_list
from vllm_wanspec.lab.harness.running import Outputs, check_needs, log_folder
from vllm_wanspec.lab.report.writing import measured
from vllm_wanspec.lab.target.dtype_measure import measure_dtypes, plan_targets
from vllm_wanspec.lab.target.dtype_report import DTYPES, DtypeOptions, DtypeResult, dtype_document


def run_dtype(options: DtypeOptions, console: Console, log_dir: Path | None = None) -> DtypeResult:
    """Run the bench; the servers' logs stay in ``log_dir``, if there is one.

    Raises:
        ConfigError: Models or prompts are missing.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed.
    """
    models = find_models(options.models)
    prompts = read_prompts(models.prompts, options.prompts)
    check_needs()
    with log_folder(log_dir, "--keep-log", console) as folder:
        specs, metrics = plan_targets(options, models, folder)
        with serving(specs, folder, console, in_turn=True) as servers:
            rows = asyncio.run(measure_dtypes(options, servers, metrics, prompts, console))
    return DtypeResult(options, rows)


DEFAULTS = DtypeOptions()


def main(
    dtypes: Annotated[str, typer.Option(metavar="LIST", help=f"Of {', '.join(DTYPES)}.")] = ",".join(DTYPES),
    prompts: Annotated[int, typer.Option(min=1, help="Prompts sent to each target.")] = DEFAULTS.prompts,
    max_tokens: Annotated[int, typer.Option(min=2, max=512, help="Tokens generated for each.")] = DEFAULTS.max_tokens,
    gamma: Annotated[int, typer.Option(min=1, max=64, help="Draft tokens per step at most.")] = DEFAULTS.gamma,
    at_a_time: Annotated[str, typer.Option(metavar="LIST", help="Requests at a time.")] = "1,8",
    models: ModelsFolder = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    keep_log: LogFolder = None,
    check: Annotated[bool, typer.Option("--check", help="Fail if ours diverges where or more than it may.")] = False,
) -> None:
    """Count greedy texts that part from plain vLLM's, for remote drafting and for vLLM's own speculation.

    Exit status: 0, or 1 when something failed or --check found that ours diverges more often than vLLM's own
    speculation, or in float32 elsewhere than at ties; 2 when this machine lacks something or an option is wrong, 130
    after Ctrl-C.
    """

    def measure(console: Console) -> DtypeResult:
        counts = parse_list("--at-a-time", at_a_time, int)
        if min(counts) < 1:
            raise ConfigError(f"--at-a-time: {at_a_time!r} is not a list of numbers from 1")
        known = listed("--dtypes", dtypes, DTYPES)
        return run_dtype(DtypeOptions(known, prompts, max_tokens, gamma, counts, models), console, keep_log)

    outputs = Outputs(json_file, markdown_file, keep_log)
    measured("python -m vllm_wanspec.lab.target.dtype", measure, dtype_document, outputs, check)


if __name__ == "__main__":
    typer.run(main)
