"""The drafter's environment variables: what they may hold, checked as early as there is somebody to tell."""

import re
from collections.abc import Mapping
from typing import Any

from vllm_wanspec.config import HOST_ENV, OTHER_ROUTES_ENV, TOKEN_ENV, TOKEN_FILE_ENV, WIDTH_ENV
from vllm_wanspec.config.addresses import is_this_machine
from vllm_wanspec.config.tokens import OPEN, named_tokens, variable
from vllm_wanspec.drafter.host import DEFAULT_RUNNING_BRANCHES
from vllm_wanspec.drafter.tokens import asks_nobody, token_source
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.text import printable

ENGINE, FRONT_END = "engine", "front-end"
ROUTES_OPEN, ROUTES_BY_TOKEN = "open", "token"
API_KEY_ENV = "VLLM_API_KEY"


def check_environment(environ: Mapping[str, str]) -> None:
    """Check the drafter's variables before there is a model to know more by.

    Raises:
        ConfigError: One of them is wrong; one line that never tells the token.
    """
    token_source(environ)
    host_place(environ.get(HOST_ENV), data_parallel_size=1)
    running_branches(environ.get(WIDTH_ENV), DEFAULT_RUNNING_BRANCHES)
    other_routes_open(environ)


def check_reach(host: str | None, uds: str | None, environ: Mapping[str, str]) -> None:
    """See that a drafter which others can reach asks them for a token.

    Args:
        host: Where vLLM's server listens (``--host``); all interfaces without one.
        uds: The Unix socket where it listens instead (``--uds``).
        environ: The environment.

    Raises:
        ConfigError: It would serve whoever reaches it, and nobody has said that this is meant.
    """
    if uds or is_this_machine((host or "").lower()) or environ.keys() & {TOKEN_ENV, TOKEN_FILE_ENV}:
        return
    where = f"--host {printable(host, 100)}" if host else "all interfaces, as without --host"
    raise ConfigError(
        f"{TOKEN_ENV} is not set, and the drafter would listen on {where}: give it a token (openssl rand -hex 32), "
        f"there or by {TOKEN_FILE_ENV}, or --host 127.0.0.1; {TOKEN_ENV}={OPEN} serves everybody who reaches it"
    )


def other_routes_open(environ: Mapping[str, str]) -> bool:
    """Whether vLLM's own routes on the drafter's port are to be as vLLM has them; else they want a token as well.

    Raises:
        ConfigError: The variable holds something else.
    """
    asked = environ.get(OTHER_ROUTES_ENV)
    if asked not in (None, "", ROUTES_OPEN, ROUTES_BY_TOKEN):
        raise ConfigError(f"{OTHER_ROUTES_ENV}: {asked!r:.80} is neither {ROUTES_BY_TOKEN} nor {ROUTES_OPEN}")
    return asked == ROUTES_OPEN


def api_key(environ: Mapping[str, str]) -> str | None:
    """What vLLM's own guard of its API should ask for: the drafter's token, if there is one that it can be told.

    It takes one key from the environment, and a command line is no place for a secret; `access.Guard` has the others.

    Raises:
        ConfigError: The tokens cannot be used.
    """
    text = environ.get(TOKEN_ENV)
    if text is None or asks_nobody(environ) or environ.get(API_KEY_ENV) or other_routes_open(environ):
        return None
    tokens = list(named_tokens(text, variable(TOKEN_ENV)).values())
    return tokens[0] if len(tokens) == 1 else None


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
