"""``wanspec drafter``: a draft model that serves remote targets."""

from typing import Annotated

import typer

from vllm_wanspec.cli.launch import become_vllm_serve, require_vllm


def drafter(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Draft model, as for `vllm serve`.")],
) -> None:
    """Serve a draft model to remote targets: `vllm serve` with our route; any `vllm serve` flag may follow.

    Controllers must send WANSPEC_TOKEN as bearer token where that variable is set.
    """
    require_vllm()
    become_vllm_serve([model, *context.args], routes=True)
