"""``wanspec serve``: a target with remote drafts."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vllm_wanspec.cli.arguments import read_arguments, refuse_speculation, take_additional
from vllm_wanspec.cli.launch import become_vllm_serve, require_vllm
from vllm_wanspec.config import PROPOSER, load_settings


def serve(
    context: typer.Context,
    wanspec: Annotated[Path, typer.Option("--wanspec", help="YAML file with the draft endpoints.")],
    speculative_tokens: Annotated[
        int, typer.Option("--speculative-tokens", min=1, max=64, help="Most draft tokens verified per step.")
    ] = 8,
) -> None:
    """Serve a target that takes remote drafts: `vllm serve` with our flags.

    MODEL and all of `vllm serve`'s own arguments are given as there, before or after ours.
    """
    require_vllm()
    arguments = read_arguments(context.args)
    refuse_speculation(arguments)
    arguments, additional = take_additional(arguments)
    load_settings(wanspec)
    speculative = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": speculative_tokens}
    become_vllm_serve(
        arguments.with_flags(
            "--speculative-config",
            json.dumps(speculative),
            "--additional-config",
            json.dumps({**additional, "wanspec": str(wanspec.resolve())}),
        ),
        routes=False,
    )
