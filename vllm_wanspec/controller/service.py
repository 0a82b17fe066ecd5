"""Starting the pool in a vLLM engine: from vLLM's configuration and ours, on the first tensor-parallel rank."""

import atexit
from typing import Any

from vllm_wanspec.config import Settings, load_settings, settings_path
from vllm_wanspec.controller.engine import queued_requests
from vllm_wanspec.controller.metrics import serve_metrics
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.controller.requests import Requests
from vllm_wanspec.controller.startup import NO_TOKENIZER, engine_place, settings_of
from vllm_wanspec.core.block import Publication
from vllm_wanspec.core.messages import vocabulary_fingerprint
from vllm_wanspec.core.vocabulary import Tokens
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.eventlog import EventLog
from vllm_wanspec.ledger import attribute


def read_settings(vllm_config: Any) -> tuple[Settings, int]:
    """Our settings, and the most tokens to draft per request and step.

    Raises:
        ConfigError: The configuration file is missing or wrong.
    """
    settings = load_settings(settings_path(vllm_config.additional_config))
    return settings, min(vllm_config.speculative_config.num_speculative_tokens, settings.length.max)


def start_requests(
    vllm_config: Any, settings: Settings, limit: int, publication: Publication | None = None
) -> Requests | None:
    """The requests of the target, connected to its drafters; None on other tensor-parallel ranks than the first.

    Args:
        vllm_config: vLLM's.
        settings: As `read_settings` gives them.
        limit: The most tokens to draft per request and step.
        publication: Takes the trees of requests that have a slot; None where no device reads them.

    Raises:
        ConfigError: The target's tokenizer is missing.
    """
    if not _is_first_rank():
        return None
    max_model_len = int(vllm_config.model_config.max_model_len)
    pool = _start_pool(vllm_config, settings, limit, max_model_len, publication)
    return Requests(pool, settings.tree, max_model_len=max_model_len, apart=settings.vocabulary_may_differ)


def _start_pool(
    vllm_config: Any, settings: Settings, limit: int, max_model_len: int, publication: Publication | None
) -> DraftPool:
    vocabulary = _vocabulary(vllm_config.model_config)
    model = str(vllm_config.model_config.model)
    tokens = Tokens.of(vocabulary, settings.vocabulary_may_differ)
    engines, rank = engine_place(vllm_config)
    settings = settings_of(settings, rank)
    log = EventLog(settings.events, "controller", model) if settings.events else None
    pool = DraftPool(
        settings,
        fingerprint=tokens.fingerprint if tokens.apart else vocabulary_fingerprint(vocabulary),
        vocab_size=min(max(vocabulary.values()) + 1, vllm_config.model_config.get_vocab_size()),
        speculation_length=limit,
        max_model_len=max_model_len,
        tokens=tokens,
        queued=(lambda: None) if engines > 1 else queued_requests,
        sink=log.record if log else None,
        publication=publication,
    )
    pool.start()
    atexit.register(pool.stop)
    if settings.metrics is not None:
        serve_metrics(pool, settings.metrics)
    return pool


def _vocabulary(model_config: Any) -> dict[str, int]:
    tokenizer = attribute("vllm.tokenizers", "cached_tokenizer_from_config")(model_config)
    if tokenizer is None:
        raise ConfigError(NO_TOKENIZER)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _is_first_rank() -> bool:
    return int(attribute("vllm.distributed", "get_tensor_model_parallel_rank")()) == 0
