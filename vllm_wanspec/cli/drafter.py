"""``wanspec drafter``: a draft model that serves remote targets."""

import os

import typer

from vllm_wanspec.cli.arguments import read_arguments
from vllm_wanspec.cli.launch import become_vllm_serve, require_vllm
from vllm_wanspec.config import HOST_ENV
from vllm_wanspec.drafter.environment import check_environment, check_reach

#: With the sessions in the engine a branch begins with the step after the token that it follows, which vLLM must not
#: have scheduled before.
SYNCHRONOUS = "--no-async-scheduling"
SCHEDULING = {SYNCHRONOUS, "--async-scheduling"}
#: Flags that say where vLLM listens, and the shortest that its parser takes for each.
HOST_FLAG, UDS_FLAG = ("--host", "--ho"), ("--uds", "--ud")


def drafter(context: typer.Context) -> None:
    """Serve a draft model to remote targets: `vllm serve` with our route.

    MODEL and all of `vllm serve`'s own arguments are given as there. Controllers must send WANSPEC_TOKEN, or a token of
    the file that WANSPEC_TOKEN_FILE names, as bearer token. Without one it serves this machine alone
    (--host 127.0.0.1), or everybody with WANSPEC_TOKEN=none.
    """
    require_vllm()
    check_environment(os.environ)
    arguments = read_arguments(context.args)
    check_reach(arguments.value(*HOST_FLAG), arguments.value(*UDS_FLAG), os.environ)
    inside = os.environ.get(HOST_ENV) == "engine"
    more = [SYNCHRONOUS] if inside and not arguments.give(SCHEDULING) else []
    become_vllm_serve([*arguments.line, *more], routes=True)
