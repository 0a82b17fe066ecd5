"""The drafter's environment variables: what they may hold, checked as early as there is somebody to tell."""

import re
from collections.abc import Mapping

from vllm_wanspec.config import HOST_ENV, TOKEN_ENV, WIDTH_ENV
from vllm_wanspec.config.tokens import variable_token
from vllm_wanspec.drafter.host import DEFAULT_RUNNING_BRANCHES
from vllm_wanspec.errors import ConfigError

ENGINE, FRONT_END = "engine", "front-end"


def check_environment(environ: Mapping[str, str]) -> None:
    """Check the drafter's variables before there is a model to know more by.

    Raises:
        ConfigError: One of them is wrong; one line that never tells the token.
    """
    token = environ.get(TOKEN_ENV)
    if token is not None:
        variable_token(TOKEN_ENV, token)
    host_place(environ.get(HOST_ENV), data_parallel_size=1)
    running_branches(environ.get(WIDTH_ENV), DEFAULT_RUNNING_BRANCHES)


def host_place(asked: str | None, data_parallel_size: int) -> str:
    """Where the sessions live: in the front end, or, if asked for, with the engine.

    Raises:
        ConfigError: ``asked`` is neither, or cannot be.
    """
    if asked not in (None, "", ENGINE, FRONT_END):
        raise ConfigError(f"{HOST_ENV}: {asked!r:.80} is neither {ENGINE} nor {FRONT_END}")
    if asked == ENGINE and data_parallel_size > 1:
        raise ConfigError(f"{HOST_ENV}: with --data-parallel-size {data_parallel_size} it can only be {FRONT_END}")
    return asked or FRONT_END


def running_branches(asked: str | None, max_num_seqs: int) -> int:
    """Places for running branches: as asked, or the default; never more than vLLM runs at a time.

    Raises:
        ConfigError: ``asked`` is not a positive integer.
    """
    if asked is not None and not re.fullmatch("[1-9][0-9]{0,8}", asked):
        raise ConfigError(f"{WIDTH_ENV}: {asked!r:.80} is not a number of branches, as in 64")
    return min(int(asked or DEFAULT_RUNNING_BRANCHES), max_num_seqs)
