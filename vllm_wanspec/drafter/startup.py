"""What a drafter's configuration must allow, looked at before its engine is built."""

import logging
import os
from typing import Any

from vllm_wanspec.config import HOST_ENV, WIDTH_ENV
from vllm_wanspec.drafter import inside
from vllm_wanspec.drafter.engines import TOP_K
from vllm_wanspec.drafter.environment import ENGINE, check_one_front_end, host_place, running_branches
from vllm_wanspec.errors import ConfigError

logger = logging.getLogger("vllm.wanspec.drafter")

PLUGINS_ENV = "VLLM_PLUGINS"
PLUGIN = "wanspec"
SERVER = "OPENAI_API_SERVER"
"""vLLM's name for the usage that has routes."""
LOGITS_MODES = frozenset({"raw_logits", "processed_logits"})


def check(vllm_config: Any, usage: Any) -> None:
    """Check the configuration of a server that will have our route; any other is left alone.

    Args:
        vllm_config: vLLM's whole configuration.
        usage: What vLLM says that the process is for (its ``UsageContext``).

    Raises:
        ConfigError: It cannot draft; one line.
        UnsupportedError: vLLM lacks what a host in the engine needs.
    """
    if getattr(usage, "name", None) != SERVER or PLUGIN not in os.environ.get(PLUGINS_ENV, "").split(","):
        return
    model = vllm_config.model_config
    if model.runner_type != "generate":
        raise ConfigError(f"{model.model} is a {model.runner_type} model; a drafter serves a model that generates text")
    if model.skip_tokenizer_init:
        raise ConfigError("a drafter needs its tokenizer, to compare vocabularies: drop --skip-tokenizer-init")
    if model.logprobs_mode in LOGITS_MODES:
        raise ConfigError(
            f"--logprobs-mode {model.logprobs_mode}: a drafter branches by log-probabilities; drop it, or give "
            "raw_logprobs or processed_logprobs"
        )
    if model.max_logprobs == 0:
        raise ConfigError(f"--max-logprobs 0: a drafter branches by log-probabilities; give at least {TOP_K}")
    running_branches(os.environ.get(WIDTH_ENV), vllm_config.scheduler_config.max_num_seqs)
    check_one_front_end(vllm_config.parallel_config)
    if host_place(os.environ.get(HOST_ENV), vllm_config.parallel_config.data_parallel_size) == ENGINE:
        inside.check()


def alternatives(max_logprobs: int) -> int:
    """How many probable tokens the engine can be asked for at each position; says so where they are fewer than usual.

    Args:
        max_logprobs: vLLM's ``--max-logprobs``; -1 for no limit.
    """
    if max_logprobs == -1 or max_logprobs >= TOP_K:
        return TOP_K
    logger.warning(
        "--max-logprobs %d: drafting with so many alternatives per position instead of %d; branches are found less "
        "often, give at least %d",
        max_logprobs,
        TOP_K,
        TOP_K,
    )
    return max_logprobs
