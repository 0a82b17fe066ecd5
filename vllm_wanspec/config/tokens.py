"""Bearer tokens as text and files hold them: read and checked alike at both ends. No error tells a token or a name."""

import re
from collections.abc import Iterator
from pathlib import Path

from vllm_wanspec.config.files import bounded_text
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.text import printable

OPEN = "none"
"""In place of a token: nobody is asked for one, or none is sent."""
MAX_TOKEN = 4096
"""Characters of a bearer token: servers bound their headers."""
MAX_TOKENS = 1024
MAX_FILE_BYTES = 256 * 1024
_BLANKS = " \t\r\n"
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_COMMENT = re.compile(r"(^|\s)#.*")


def token_fault(value: str) -> str:
    """Why no HTTP header can carry this as a bearer token, to be said behind who holds it; empty where one can."""
    if not value.strip(_BLANKS):
        return "is empty; give it the token, or unset it"
    if "\n" in value or "\r" in value:
        return "has a line end in it, as of a file that it was read from; give it the token alone"
    if not value.isascii():
        return "has characters that are not ASCII; give it the token alone"
    if value != value.strip():
        return "begins or ends with a blank; give it the token alone"
    if not value.isprintable():
        return "has a control character in it; give it the token alone"
    if len(value) > MAX_TOKEN:
        return f"is longer than {MAX_TOKEN} characters; give it the token alone"
    return ""


def named_tokens(text: str, subject: str, *, is_file: bool = False) -> dict[str, str]:
    """The tokens of a text, by the names of who has them.

    Args:
        text: One token per line or between commas: ``name:token``, or the token alone, which is called token1,
            token2, … by its place. Blanks around them do not count.
        subject: What holds them, for errors.
        is_file: Whether ``#`` begins a comment, and errors name the line.

    Raises:
        ConfigError: There is none, one cannot be used, or a name or a token is there twice.
    """
    items = list(_items(text, is_file))
    if not items:
        raise ConfigError(f"{subject} {'holds no token; write one into it' if is_file else token_fault('')}")
    if len(items) > MAX_TOKENS:
        raise ConfigError(f"{subject} holds more than {MAX_TOKENS} tokens")
    found: dict[str, str] = {}
    for number, (line, item) in enumerate(items, 1):
        where = f"{subject}: line {line}" if is_file else subject
        if not is_file and len(items) > 1:
            where = f"{subject} (token {number} of {len(items)})"
        name, token = _split(item, number, where)
        if name in found:
            raise ConfigError(f"{where} has a name that was given before; names must differ")
        if token in found.values():
            raise ConfigError(f"{where} has a token that was given before; tokens must differ")
        found[name] = token
    return found


def variable_token(name: str, value: str) -> str | None:
    """The one token that a target sends, as an environment variable holds it; None for ``none``.

    A name before it, as a drafter may have it, is not sent.

    Raises:
        ConfigError: It is none, or there are several; the text names the variable and never tells the value.
    """
    if value == OPEN:
        return None
    if fault := token_fault(value):
        raise ConfigError(f"{variable(name)} {fault}")
    return _only(named_tokens(value, variable(name)), variable(name))


def variable(name: str) -> str:
    """How errors name an environment variable."""
    return f"the environment variable {name}"


def file_tokens(path: str | Path, subject: str) -> dict[str, str]:
    """The tokens that a file holds now, as `named_tokens` gives them.

    Raises:
        ConfigError: It cannot be read, or holds none that can be used; ``subject`` is what names it there.
    """
    try:
        text = bounded_text(path, MAX_FILE_BYTES)
    except ConfigError as error:
        raise ConfigError(f"{subject} {error}") from error
    return named_tokens(text, subject, is_file=True)


def file_token(path: str) -> str:
    """The token that a target's file holds, as it is now.

    Raises:
        ConfigError: The file cannot be read, or does not hold one token.
    """
    # Somebody may have written the token itself there.
    if not (Path(path).is_absolute() or Path(path).exists()):
        raise ConfigError("there is no file of that name here; it must be the path of a file that holds the token")
    subject = printable(path, 1000)
    return _only(file_tokens(path, subject), subject)


def _only(tokens: dict[str, str], subject: str) -> str:
    if len(tokens) > 1:
        raise ConfigError(f"{subject} holds {len(tokens)} tokens; a target sends one: leave that one")
    return next(iter(tokens.values()))


def _items(text: str, is_file: bool) -> Iterator[tuple[int, str]]:
    """What stands between line ends and commas, with its line."""
    for line, content in enumerate(text.split("\n"), 1):
        content = _COMMENT.sub("", content) if is_file else content
        for item in content.split(","):
            if item.strip(_BLANKS):
                yield line, item.strip(_BLANKS)


def _split(item: str, number: int, where: str) -> tuple[str, str]:
    before, colon, behind = item.partition(":")
    name, token = (before.strip(_BLANKS), behind.strip(_BLANKS)) if colon else (f"token{number}", item)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where} has a colon behind what is no name; write name:token, with a name of at most 64 letters, digits, "
            "dots, dashes and underscores"
        )
    if not token:
        raise ConfigError(f"{where} has a name and no token behind it; write name:token")
    if token == OPEN:
        raise ConfigError(f"{where} has the word {OPEN} for a token; it stands alone, in WANSPEC_TOKEN")
    if fault := token_fault(token):
        raise ConfigError(f"{where} {fault}")
    return name, token
