"""What a target's configuration must allow, looked at before an engine is built, and which of its engines this is."""

import logging
from pathlib import Path
from typing import Any

from vllm_wanspec.config import Settings, load_settings, settings_path
from vllm_wanspec.errors import ConfigError, UnsupportedError

logger = logging.getLogger("vllm.wanspec.proposer")

ENGINES = "wanspec_engines"
"""Key of vLLM's additional configuration with the number of data-parallel engines: vLLM has those of a dense model
believe that each is alone."""
NO_TOKENIZER = "remote drafting needs the tokenizer, to compare vocabularies: drop --skip-tokenizer-init"
_LAST_PORT = 65535


def check_target(vllm_config: Any) -> None:
    """Check our part of a target's configuration, and note in it how many engines there will be.

    Raises:
        ConfigError: Something in it is wrong; one line.
        UnsupportedError: Something in it does not go with remote drafting.
    """
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise UnsupportedError(
            f"remote drafting does not work with pipeline parallelism: --pipeline-parallel-size is {stages}, use 1"
        )
    if vllm_config.model_config.skip_tokenizer_init:
        raise ConfigError(NO_TOKENIZER)
    path = settings_path(vllm_config.additional_config)
    settings = load_settings(path)
    engines = vllm_config.parallel_config.data_parallel_size
    if engines == 1:
        return
    highest = _LAST_PORT - engines + 1
    if settings.metrics is not None and settings.metrics.port > highest:
        raise ConfigError(
            f"{path}: metrics.port: {settings.metrics.port}: each of the {engines} data-parallel engines takes a port "
            f"from there on; choose one up to {highest}"
        )
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config[ENGINES] = engines


def engine_place(vllm_config: Any) -> tuple[int, int]:
    """How many data-parallel engines the target has, and which of them this process is."""
    parallel, additional = vllm_config.parallel_config, vllm_config.additional_config
    noted = additional.get(ENGINES, 1) if isinstance(additional, dict) else 1
    engines = max(parallel.data_parallel_size, noted)
    return engines, getattr(parallel, "data_parallel_index", 0) if engines > 1 else 0


def settings_of(settings: Settings, rank: int) -> Settings:
    """The settings of one data-parallel engine: a port and a file of its own; rank 0 has those of the file."""
    if rank == 0:
        return settings
    changes: dict[str, Any] = {}
    if settings.metrics is not None:
        changes["metrics"] = settings.metrics.model_copy(update={"port": settings.metrics.port + rank})
    if settings.events is not None:
        path = Path(settings.events)
        if path.name:  # else a folder, which the event log itself refuses
            changes["events"] = str(path.with_name(f"{path.stem}.dp{rank}{path.suffix}"))
    own = settings.model_copy(update=changes)
    places = [f"metrics on port {own.metrics.port}"] if own.metrics is not None else []
    places += [f"events in {own.events}"] if own.events is not None else []
    if places:
        logger.info("data-parallel rank %d: %s", rank, ", ".join(places))
    return own
