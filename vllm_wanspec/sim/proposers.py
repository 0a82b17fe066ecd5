"""Proposers for vLLM's ``custom_class``: the ceiling, which knows what the target is going to say, and the floor."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["ORACLE_ENV", "EmptyProposer", "OracleProposer", "write_references"]

#: Names the file with the known texts.
ORACLE_ENV = "WANSPEC_ORACLE"

logger = logging.getLogger("vllm.wanspec.oracle")


def write_references(path: Path, texts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Write prompts and their continuations, in token ids, for `OracleProposer`; atomically."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps([[list(prompt), list(expected)] for prompt, expected in texts]), "utf-8")
    scratch.replace(path)


class EmptyProposer:
    """Never drafts: what the custom proposer costs by itself."""

    def __init__(self, vllm_config: Any) -> None:
        """Part of vLLM's contract."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Part of vLLM's contract; there is no model."""

    def propose(self, sampled_token_ids: Sequence[Sequence[int]], *unused: Any, **named: Any) -> list[list[int]]:
        """One empty list per row."""
        return [[] for _ in sampled_token_ids]


class OracleProposer:
    """Drafts the target's own greedy text, read from the file that ``WANSPEC_ORACLE`` names."""

    def __init__(self, vllm_config: Any, environ: Mapping[str, str] = os.environ) -> None:
        """Read the file when the first request needs it: it may be written later than the server is started."""
        self._limit = int(vllm_config.speculative_config.num_speculative_tokens)
        self._path = Path(environ.get(ORACLE_ENV, ""))
        self._texts: list[tuple[list[int], list[int]]] = []
        self._read_at: int | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Part of vLLM's contract; there is no model."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """The next tokens of each row's text; nothing for one that is unknown or has left its text."""
        drafts: list[list[int]] = []
        for row, sampled in enumerate(sampled_token_ids):
            context = token_ids_cpu[row, : int(num_tokens_no_spec[row])].tolist() if sampled else []
            drafts.append(self.next_tokens(context) if context else [])
        return drafts

    def next_tokens(self, context: Sequence[int]) -> list[int]:
        """What comes after a context, up to the speculation length."""
        found = self._find(context)
        if found is None and self._reload():
            found = self._find(context)
        return found or []

    def _find(self, context: Sequence[int]) -> list[int] | None:
        """As `next_tokens`; None if no prompt begins the context."""
        known: list[int] | None = None
        for prompt, expected in self._texts:
            done = len(context) - len(prompt)
            if done >= 0 and context[: len(prompt)] == prompt:
                known = []
                if context[len(prompt) :] == expected[:done]:
                    return expected[done : done + self._limit]
        return known

    def _reload(self) -> bool:
        """Read the file if it has changed since; whether there is anything new."""
        try:
            changed_at = self._path.stat().st_mtime_ns
            if changed_at == self._read_at:
                return False
            self._read_at = changed_at
            self._texts = [(list(prompt), list(expected)) for prompt, expected in json.loads(self._path.read_text())]
        except (OSError, ValueError, TypeError) as error:  # an exception here would end the engine
            logger.warning("oracle: cannot read %s (%s); drafting nothing", self._path, error)
            return False
        return True
