"""The drafter's environment variables: what they may hold, checked as early as there is somebody to tell."""

import re
from collections.abc import Mapping
from typing import Any

from vllm_wanspec.config import HOST_ENV, TOKEN_ENV, WIDTH_ENV, checked_token
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
        checked_token(TOKEN_ENV, token)
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


def check_one_front_end(parallel_config: Any) -> None:
    """See that the server is one API server process: each would have places, limits and metrics of its own.

    Args:
        parallel_config: vLLM's.

    Raises:
        ConfigError: It is several.
    """
    processes = getattr(parallel_config, "_api_process_count", 1)
    if processes > 1:
        raise ConfigError(
            f"a drafter is one API server process, and {processes} are asked for, by --api-server-count or by "
            "--data-parallel-size: give --api-server-count 1"
        )


def capacity_tokens(vllm_config: Any) -> int | None:
    """What the engine's KV cache holds, in tokens; None where its configuration does not say.

    Args:
        vllm_config: vLLM's whole configuration, after the engine has started.
    """
    cache = getattr(vllm_config, "cache_config", None)
    blocks, size = getattr(cache, "num_gpu_blocks", None), getattr(cache, "block_size", None)
    return blocks * size if blocks and size else None
