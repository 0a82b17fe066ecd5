"""Bearer tokens as text and files hold them; the secrets of these tests begin with secret."""

import os
from pathlib import Path

import pytest

from vllm_wanspec.config.tokens import MAX_TOKENS, file_token, file_tokens, named_tokens, variable_token
from vllm_wanspec.errors import ConfigError

GOOD = {
    "one": ("secret", {"token1": "secret"}),
    "with blanks around it": (" secret \r\n", {"token1": "secret"}),
    "blanks within": ("secret word", {"token1": "secret word"}),
    "two between commas": ("secret-new, secret-old", {"token1": "secret-new", "token2": "secret-old"}),
    "two on lines": ("secret-new\nsecret-old\n", {"token1": "secret-new", "token2": "secret-old"}),
    "with a name": ("eu-1.a_b:secret", {"eu-1.a_b": "secret"}),
    "names and none": ("eu: secret1,secret2\r\nus :secret3", {"eu": "secret1", "token2": "secret2", "us": "secret3"}),
    "a colon in a token that has a name": ("eu:secret:1", {"eu": "secret:1"}),
    "commas without anything": (",secret,,", {"token1": "secret"}),
    "what looks like a comment": ("#secret", {"token1": "#secret"}),
}


@pytest.mark.parametrize(("text", "tokens"), GOOD.values(), ids=GOOD.keys())
def test_tokens_by_name(text: str, tokens: dict[str, str]) -> None:
    assert named_tokens(text, "X") == tokens


WRONG = {
    "nothing": ("", "X is empty"),
    "commas": (" , ,\n", "X is empty"),
    "not ASCII": ("secrét", "X has characters that are not ASCII"),
    "a control character": ("secret\x1b", "X has a control character in it"),
    "the second is wrong": ("secret, secr\x1bet", "X (token 2 of 2) has a control character in it"),
    "endless": ("secret" * 1000, "X is longer than 4096"),
    "no name before the colon": (":secret", "X has a colon behind what is no name; write name:token"),
    "a name with a blank": ("secret a:b", "X has a colon behind what is no name"),
    "no token behind the name": ("eu:", "X has a name and no token behind it"),
    "a name twice": ("eu:secret1,eu:secret2", "X (token 2 of 2) has a name that was given before"),
    "a name that a token without one has": ("secret1,token1:secret2", "has a name that was given before"),
    "a token twice": ("a:secret,b:secret", "X (token 2 of 2) has a token that was given before"),
    "none among others": ("secret,none", "X (token 2 of 2) has the word none for a token"),
    "none with a name": ("eu:none", "X has the word none for a token"),
    "too many": (",".join(f"secret{n}" for n in range(MAX_TOKENS + 1)), "X holds more than 1024 tokens"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_line_without_the_token(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        named_tokens(text, "X")
    message = str(caught.value)
    assert said in message
    assert message.isprintable()
    assert "secr" not in message


def test_a_file_has_comments_and_its_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("\ufeff# of targets\n\neu: secret-eu  # until May\nus:secret#us, secret\n", "utf-8")
    assert file_tokens(file, "F") == {"eu": "secret-eu", "us": "secret#us", "token3": "secret"}
    file.write_text("# none\neu:secret\n\nus:\n", "utf-8")
    with pytest.raises(ConfigError, match=r"^F: line 4 has a name and no token behind it"):
        file_tokens(file, "F")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "F holds no token"),
        (b"# secret\n", "F holds no token"),
        (b"secret\xff\n", "F is not UTF-8 text"),
        (b"secret\n" * 100_000, "F is larger than 256 KiB"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{said}"):
        file_tokens(file, "F")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^F cannot be read: No such file"):
        file_tokens(tmp_path / "absent", "F")
    with pytest.raises(ConfigError, match=r"^F cannot be read: Is a directory"):
        file_tokens(tmp_path, "F")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"^F is not a regular file"):
        file_tokens(tmp_path / "pipe", "F")


@pytest.mark.parametrize(("value", "token"), [("secret", "secret"), ("eu:secret", "secret"), ("none", None)])
def test_what_a_target_sends(value: str, token: str | None) -> None:
    assert variable_token("EU_TOKEN", value) == token


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("secret1,secret2", "the environment variable EU_TOKEN holds 2 tokens; a target sends one"),
        (",", "the environment variable EU_TOKEN is empty"),
        ("secret\n", "the environment variable EU_TOKEN has a line end in it"),
        ("eu: ", "the environment variable EU_TOKEN begins or ends with a blank"),
    ],
)
def test_what_a_target_cannot_send(value: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        variable_token("EU_TOKEN", value)
    assert str(caught.value).startswith(said)
    assert "secr" not in str(caught.value)


def test_the_token_of_a_target_s_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("secret\n", "# mine\neu:secret\n"):
        Path("token").write_text(text, "utf-8")
        assert file_token("token") == file_token(str(tmp_path / "token")) == "secret"
    Path("token").write_text("new:secret1\nold:secret2\n", "utf-8")
    with pytest.raises(ConfigError, match=r"^token holds 2 tokens; a target sends one"):
        file_token("token")


def test_a_token_in_the_place_of_a_file_s_name_is_not_told() -> None:
    with pytest.raises(ConfigError, match=r"^there is no file of that name here") as caught:
        file_token("secret0123/x")
    assert "secret" not in str(caught.value)
