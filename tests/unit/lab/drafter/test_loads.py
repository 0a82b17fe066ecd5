"""Contexts of held-out text."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import FINGERPRINT, VOCAB_SIZE

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.drafter.loads import contexts
from vllm_wanspec.sim.controller import DraftTokenizer

TOKENIZER = DraftTokenizer(FINGERPRINT, lambda text: [ord(letter) % VOCAB_SIZE for letter in text])


def test_contexts_are_of_equal_length(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc"}\n\n{"prompt": "de"}\n')
    a, b, c, d, e = TOKENIZER.encode("abcde")
    assert contexts(path, TOKENIZER, 6) == [[a, b, c, d, e, a], [d, e, a, b, c, d]]
    for text in ("", "{}", "nonsense", '{"prompt": ""}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="prompts: "):
            contexts(path, TOKENIZER)
