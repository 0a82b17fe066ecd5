"""``wanspec serve``: a target with remote drafts."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from vllm_wanspec.cli.launch import become_vllm_serve, require_vllm
from vllm_wanspec.config import PROPOSER, load_settings
from vllm_wanspec.errors import ConfigError

TAKEN = ("--speculative-config", "--speculative_config", "-sc", "--additional-config", "--additional_config")


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Target model, as for `vllm serve`.")],
    wanspec: Annotated[Path, typer.Option("--wanspec", help="YAML file with the draft endpoints.")],
    speculative_tokens: Annotated[
        int, typer.Option("--speculative-tokens", min=1, max=64, help="Most draft tokens verified per step.")
    ] = 8,
) -> None:
    """Serve a target that takes remote drafts: `vllm serve` with our flags; any other `vllm serve` flag may follow."""
    require_vllm()
    for flag in (re.split("[=.]", argument)[0] for argument in context.args):
        if flag in TAKEN:
            raise ConfigError(f"{flag} is set by `wanspec serve`; to give it yourself, use `vllm serve`")
    load_settings(wanspec)
    speculative = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": speculative_tokens}
    become_vllm_serve(
        [
            model,
            "--speculative-config",
            json.dumps(speculative),
            "--additional-config",
            json.dumps({"wanspec": str(wanspec.resolve())}),
            *context.args,
        ],
        routes=False,
    )
