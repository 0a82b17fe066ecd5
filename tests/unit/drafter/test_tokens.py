"""The drafter's tokens: who is let in by which, and a file of them that changes while the server runs."""

from pathlib import Path

import pytest
from conftest import LogLines

from vllm_wanspec.config import TOKEN_ENV, TOKEN_FILE_ENV
from vllm_wanspec.drafter.tokens import TokenFile, Tokens, asks_nobody, token_source
from vllm_wanspec.errors import ConfigError

NAMED = Tokens.of("eu:new, us:old, third")


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (b"Bearer new", "eu"),
        (b"Bearer old", "us"),
        (b"Bearer third", "token3"),
        (b"Bearer eu:new", None),
        (b"Bearer new,old", None),
        (b"Bearer ne", None),
        (b"Bearer newer", None),
        (b"Bearer new ", None),
        (b"bearer new", None),
        (b"new", None),
        (b"Bearer ", None),
        (b"Bearer", None),
        (b"", None),
        (None, None),
        (b"Bearer \xff\xfe\x00", None),
        ("Bearer né".encode(), None),
        (b"Basic bmV3", None),
    ],
)
def test_the_client_of_a_header(header: bytes | None, client: str | None) -> None:
    assert NAMED.client(header) == client


def test_every_token_is_compared_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    for header in (b"Bearer new", b"Bearer third", b"Bearer wrong", None):
        compared.clear()
        NAMED.client(header)
        assert len(compared) == 3


def test_the_tokens_themselves_are_not_kept() -> None:
    assert not any(secret in repr(vars(NAMED)) for secret in ("new", "old", "third"))


@pytest.mark.parametrize("environ", [{}, {TOKEN_ENV: "none"}, {TOKEN_ENV: " none\n"}])
def test_where_nobody_is_asked(environ: dict[str, str]) -> None:
    assert asks_nobody(environ)
    assert token_source(environ) is None


@pytest.mark.parametrize("text", ["secret", "secret\n", " a:secret ,old\n"])
def test_tokens_of_the_environment(text: str) -> None:
    assert not asks_nobody({TOKEN_ENV: text})
    source = token_source({TOKEN_ENV: text})
    assert source is not None
    assert source().client(b"Bearer secret")


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({TOKEN_ENV: ""}, "the environment variable WANSPEC_TOKEN is empty"),
        (
            {TOKEN_ENV: "secret", TOKEN_FILE_ENV: "tokens"},
            "WANSPEC_TOKEN is set, and WANSPEC_TOKEN_FILE too; unset one",
        ),
        ({TOKEN_FILE_ENV: ""}, "the environment variable WANSPEC_TOKEN_FILE is empty"),
        ({TOKEN_FILE_ENV: "/absent"}, "WANSPEC_TOKEN_FILE: /absent cannot be read: No such file"),
    ],
)
def test_what_cannot_be_right(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        token_source(environ)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def written(file: Path, text: str) -> None:
    """Replace a file as editors and secret stores do."""
    new = file.with_suffix(".new")
    new.write_text(text, "utf-8")
    new.replace(file)


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, log: LogLines) -> None:
    file = tmp_path / "tokens"
    written(file, "eu:secret1\n")
    source = token_source({TOKEN_FILE_ENV: str(file)})
    assert source is not None
    first = source()
    assert source() is first
    written(file, "# both for a week\neu:secret2\neu-old:secret1\n")
    assert (source().client(b"Bearer secret1"), source().client(b"Bearer secret2")) == ("eu-old", "eu")
    written(file, "eu:secret2\n")
    assert source().client(b"Bearer secret1") is None
    assert log.warnings() == []
    assert log.lines() == [f"tokens read again from {file}"] * 2


def test_a_file_that_cannot_be_used_leaves_the_old_tokens_good(tmp_path: Path, log: LogLines) -> None:
    file = tmp_path / "tokens"
    written(file, "secret\n")
    tokens = TokenFile(str(file))
    written(file, "secret1,secret1\n")
    for _ in range(3):
        assert tokens.tokens().client(b"Bearer secret") == "token1"
    file.unlink()
    for _ in range(3):
        assert tokens.tokens().client(b"Bearer secret") == "token1"
    first, second = log.warnings()
    assert f"WANSPEC_TOKEN_FILE: {file}: line 1 has a token that was given before" in first
    assert f"WANSPEC_TOKEN_FILE: {file} cannot be read: No such file" in second
    for line in (first, second):
        assert line.endswith("; the tokens that it had before stay good")
        assert "secret" not in line
    written(file, "secret2\n")
    assert tokens.tokens().client(b"Bearer secret") is None
    assert tokens.tokens().client(b"Bearer secret2") == "token1"
