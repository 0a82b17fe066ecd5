"""``make bench-capacity``: how many clients a target serves at a rate when their drafts come from another site.

Co-located drafting against remote drafting without prompt lookup, at the bench's pace, where a step takes as long for
many clients as for one, and at one that the clients saturate.
``python -m vllm_wanspec.lab.target.capacity --help`` lists the settings.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.lab.harness.launch import serving
from vllm_wanspec.lab.harness.models import find_models, read_prompts
from vllm_wanspec.lab.harness.options import (
    DraftPace,
    JsonFile,
    LogFolder,
    MarkdownFile,
    ModelsFolder,
    TargetPace,
    listed,
    parse_list,
)
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.harness.running import (
    Outputs,
    check_needs,
    check_outputs,
    console_of_this_run,
    log_folder,
    one_line_errors,
)
from vllm_wanspec.lab.report.writing import Publication
from vllm_wanspec.lab.target.capacity_figures import CapacityResult, Row
from vllm_wanspec.lab.target.capacity_measure import LoadPart
from vllm_wanspec.lab.target.capacity_plan import BENCH, SATURATED, CapacityOptions, Load, plan_servers
from vllm_wanspec.lab.target.capacity_report import capacity_document, draw_capacity
from vllm_wanspec.lab.target.clients import Text

PROGRAM = "python -m vllm_wanspec.lab.target.capacity"


def run_capacity(options: CapacityOptions, console: Console, log_dir: Path | None = None) -> CapacityResult:
    """Run the bench, load by load; the servers' logs stay in ``log_dir``, if there is one.

    Raises:
        ConfigError: Models or prompts are missing or too few.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed.
    """
    models = find_models(options.models)
    prompts = read_prompts(models.prompts, None)
    check_needs()
    rows: list[Row] = []
    texts: Sequence[Text] = ()
    with log_folder(log_dir, "--keep-log", console) as folder:
        for load in options.loads:
            console.print(f"{load.name}: target {load.target}, co-located draft {load.draft}", highlight=False)
            beside = folder / load.name
            beside.mkdir(exist_ok=True)
            plan = plan_servers(options, load, models, beside)
            with serving(plan.specs, beside, console, in_turn=True) as servers:
                part = LoadPart(options, load, plan, servers, console)
                found, texts = asyncio.run(part.measure(prompts, texts))
            rows += found
    return CapacityResult(options, rows)


DEFAULTS = CapacityOptions()
DEFAULT_LOADS = {load.name: load for load in DEFAULTS.loads}


def _shown(clients: Sequence[int]) -> str:
    return ",".join(map(str, clients))


def main(
    loads: Annotated[str, typer.Option(metavar="LIST", help=f"Of {BENCH}, {SATURATED}.")] = ",".join(DEFAULT_LOADS),
    clients: Annotated[str, typer.Option(metavar="LIST", help=f"Numbers of clients under the load {BENCH}.")] = _shown(
        DEFAULT_LOADS[BENCH].clients
    ),
    saturated_clients: Annotated[
        str, typer.Option(metavar="LIST", help=f"Numbers of clients under the load {SATURATED}.")
    ] = _shown(DEFAULT_LOADS[SATURATED].clients),
    gammas: Annotated[str, typer.Option(metavar="LIST", help="Draft tokens per step, on both sides.")] = _shown(
        DEFAULTS.gammas
    ),
    rtt_ms: Annotated[str, typer.Option(metavar="LIST", help="Emulated round trips to the drafter, ms.")] = "0,30",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose texts are long enough.")] = DEFAULTS.prompts,
    max_tokens: Annotated[int, typer.Option(min=8, max=512, help="Tokens of a request.")] = DEFAULTS.max_tokens,
    target_pace: TargetPace = "35+0.1",
    draft_pace: DraftPace = "5+0.02",
    saturated_target_pace: TargetPace = "5+4",
    saturated_draft_pace: Annotated[
        str, typer.Option(metavar="MS+MS", help="The co-located draft model's; the remote one keeps --draft-pace.")
    ] = "4+1",
    time_scale: Annotated[
        float, typer.Option(help="Make paces and round trips this many times as long, where a machine is too slow.")
    ] = DEFAULTS.time_scale,
    models: ModelsFolder = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    keep_log: LogFolder = None,
    check: Annotated[bool, typer.Option("--check", help="Fail unless every row means something.")] = False,
) -> None:
    """Measure how many clients a target serves with co-located and with remote drafts.

    Exit status: 0, or 1 when something failed, an output was wrong, or --check found a row that means nothing; 2 when
    this machine lacks something or an option is wrong, 130 after Ctrl-C.
    """
    console, began_s = console_of_this_run(), time.monotonic()
    outputs = Outputs(json_file, markdown_file, keep_log)
    with one_line_errors("bench-capacity"):
        check_outputs(outputs)
        check_needs(plots=markdown_file is not None)
        remote_pace = Pacing.parse(draft_pace, "--draft-pace")
        known = {
            BENCH: Load(BENCH, Pacing.parse(target_pace, "--target-pace"), remote_pace, _numbers("--clients", clients)),
            SATURATED: Load(
                SATURATED,
                Pacing.parse(saturated_target_pace, "--saturated-target-pace"),
                Pacing.parse(saturated_draft_pace, "--saturated-draft-pace"),
                _numbers("--saturated-clients", saturated_clients),
            ),
        }
        options = dataclasses.replace(
            DEFAULTS,
            loads=tuple(known[name] for name in listed("--loads", loads, [*known])),
            remote_draft_pace=remote_pace,
            gammas=parse_list("--gammas", gammas, int),
            rtt_ms=parse_list("--rtt-ms", rtt_ms, float),
            prompts=prompts,
            max_tokens=max_tokens,
            time_scale=time_scale,
            models=models,
        )
        begun = Provenance.of_this_run(PROGRAM)
        found = run_capacity(options, console, keep_log)
        provenance = begun.after(time.monotonic() - began_s)
        data = found.as_json() | provenance.as_json()
        document = capacity_document(found, provenance)
        Publication(document, data, ("capacities", "factors", "rows"), partial(draw_capacity, found)).publish(
            outputs, console
        )
    if any(row.wrong for row in found.rows) or (check and not found.held):
        raise typer.Exit(1)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    return tuple(sorted(parse_list(option, text, int)))


if __name__ == "__main__":
    typer.run(main)
