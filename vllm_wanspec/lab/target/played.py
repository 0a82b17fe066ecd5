"""What a bench without vLLM puts between the invented target and the invented drafter: a real pool."""

from __future__ import annotations

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.core.block import Publication
from vllm_wanspec.sim.models import Language

LOOKAHEAD_TOKENS = 64
"""So far ahead that the drafter's pace, not this, ends a tree: the largest trees that there are."""


def make_settings(url: str, tree: str = "", late: str | None = None) -> Settings:
    """The default settings with a long lookahead, and with the changes of ``tree`` (see `TreeSettings.overridden`)."""
    settings = Settings.model_validate(
        {
            "draft_endpoints": [{"name": "invented", "url": url}],
            "tree": {"lookahead_tokens": LOOKAHEAD_TOKENS},
            **({"late": {"policy": late}} if late else {}),
        }
    )
    return settings.model_copy(update={"tree": settings.tree.overridden(tree)}) if tree else settings


def make_pool(settings: Settings, language: Language, limit: int, publication: Publication | None = None) -> DraftPool:
    """A pool for targets that speak ``language``; it has not been started."""
    return DraftPool(
        settings,
        fingerprint=language.fingerprint,
        vocab_size=language.vocab_size,
        speculation_length=limit,
        publication=publication,
    )
