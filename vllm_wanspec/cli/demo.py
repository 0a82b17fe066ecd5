"""``wanspec demo``: the main job in one go."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.lab.harness.options import DraftPace, JsonFile, LogFolder, ModelsFolder, TargetPace
from vllm_wanspec.lab.harness.running import Outputs, check_needs, one_line_errors

__all__ = ["demo"]


def demo(
    rtt_ms: Annotated[float, typer.Option(min=0, max=10_000, help="Emulated round trip to the drafter, ms.")] = 20.0,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts to send to each target.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, max=512, help="Tokens to generate per prompt.")] = 96,
    speculative_tokens: Annotated[int, typer.Option(min=1, max=64, help="Draft tokens verified per step at most.")] = 8,
    models: ModelsFolder = None,
    json_file: JsonFile = None,
    target_pace: TargetPace = "35+0.1",
    draft_pace: DraftPace = "5+0.02",
    logs: LogFolder = None,
) -> None:
    """Compare a plain vLLM target with one that takes drafts from across an emulated WAN.

    Exit status: 0 when both give the same output, 1 when not or when something failed, 2 when this
    machine lacks something, 130 after Ctrl-C.
    """
    # Only here: what measures is slow to import, and every command imports this module.
    from vllm_wanspec.lab.compare.demo import demo_options, run_demo

    with one_line_errors("wanspec demo"):
        check_needs(instead_of_demo_models="--models DIR" if models is None else None)
        options = demo_options(
            rtt_ms,
            models,
            count=prompts,
            max_tokens=max_tokens,
            speculative_tokens=speculative_tokens,
            target_pace=Pacing.parse(target_pace, "--target-pace"),
            draft_pace=Pacing.parse(draft_pace, "--draft-pace"),
        )
        found = run_demo(options, Outputs(json_file, log_dir=logs), Console())
    if not found.identical:
        raise typer.Exit(1)
