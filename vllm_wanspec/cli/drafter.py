"""``wanspec drafter``: a draft model that serves remote targets."""

import os
from typing import Annotated

import typer

from vllm_wanspec.cli.launch import become_vllm_serve, require_vllm
from vllm_wanspec.config import HOST_ENV

#: With the sessions in the engine a branch begins with the step after the token that it follows, which vLLM must not
#: have scheduled before.
SYNCHRONOUS = "--no-async-scheduling"
SCHEDULING = {SYNCHRONOUS, "--async-scheduling"}


def drafter(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Draft model, as for `vllm serve`.")],
) -> None:
    """Serve a draft model to remote targets: `vllm serve` with our route; any `vllm serve` flag may follow.

    Controllers must send WANSPEC_TOKEN as bearer token where that variable is set.
    """
    require_vllm()
    arguments = list(context.args)
    inside = os.environ.get(HOST_ENV) == "engine"
    if inside and not any(argument in SCHEDULING for argument in arguments):
        arguments.append(SYNCHRONOUS)
    become_vllm_serve([model, *arguments], routes=True)
