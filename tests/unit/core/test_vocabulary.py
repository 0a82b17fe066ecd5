"""Vocabularies: their fingerprints, and where two of them differ."""

from vllm_wanspec.core.messages import vocabulary_fingerprint


def test_tokens_of_bytes_have_a_fingerprint() -> None:
    texts = {"a": 0, "ä": 1}
    raw = {token.encode(): index for token, index in texts.items()}
    assert vocabulary_fingerprint(raw) == vocabulary_fingerprint(texts)
    assert vocabulary_fingerprint({b"\xff": 0}) != vocabulary_fingerprint({b"\xfe": 0})
    assert vocabulary_fingerprint({b"a": 0, "b": 1}) == vocabulary_fingerprint({"a": 0, "b": 1})
