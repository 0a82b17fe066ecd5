"""The drafter's bearer tokens: where they come from, and which client has each.

What is kept are digests, and all of them are compared with every header in constant time.
"""

import hashlib
import hmac
import logging
from collections.abc import Callable, Mapping
from typing import Any

from vllm_wanspec.config import TOKEN_ENV, TOKEN_FILE_ENV
from vllm_wanspec.config.tls import stamp
from vllm_wanspec.config.tokens import OPEN, file_tokens, named_tokens, variable
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.text import printable

logger = logging.getLogger("vllm.wanspec.drafter")


class Tokens:
    """Some clients' bearer tokens."""

    def __init__(self, named: Mapping[str, str]) -> None:
        """Take tokens by the names of their clients."""
        self._digests = [(name, _digest(f"Bearer {token}".encode())) for name, token in named.items()]

    @classmethod
    def of(cls, text: str) -> "Tokens":
        """The tokens of a text, as `config.tokens.named_tokens` reads it.

        Raises:
            ConfigError: They cannot be used.
        """
        return cls(named_tokens(text, variable(TOKEN_ENV)))

    def client(self, header: bytes | None) -> str | None:
        """The name of the client whose token an Authorization header carries; None where it is nobody's."""
        given, found = _digest(header or b""), None
        for name, digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = name
        return found


TokenSource = Callable[[], Tokens]
"""The tokens that are good now."""


def asks_nobody(environ: Mapping[str, str]) -> bool:
    """Whether the environment names no token: nothing is set, or ``WANSPEC_TOKEN`` is ``none``."""
    return TOKEN_FILE_ENV not in environ and environ.get(TOKEN_ENV, OPEN).strip() == OPEN


def token_source(environ: Mapping[str, str]) -> TokenSource | None:
    """Where the environment says that the drafter's tokens are; None where nobody is asked for one.

    Raises:
        ConfigError: Two places are named, or what is there cannot be used; one line that tells no token.
    """
    text, path = environ.get(TOKEN_ENV), environ.get(TOKEN_FILE_ENV)
    if path is not None:
        if text is not None:
            raise ConfigError(f"{variable(TOKEN_ENV)} is set, and {TOKEN_FILE_ENV} too; unset one of them")
        return TokenFile(path).tokens
    if text is None or asks_nobody(environ):
        return None
    tokens = Tokens.of(text)
    return lambda: tokens


class TokenFile:
    """A file of tokens, read again when it changes; while it cannot be used those that it had last stay good."""

    def __init__(self, path: str) -> None:
        """Read it.

        Raises:
            ConfigError: It cannot be used.
        """
        if not path:
            raise ConfigError(f"{variable(TOKEN_FILE_ENV)} is empty; give it the path of a file, or unset it")
        self._path = path
        self._stamp: Any = stamp(path)
        self._tokens = self._read()

    def tokens(self) -> Tokens:
        """The tokens that are good now."""
        now = stamp(self._path)
        if now != self._stamp:
            self._stamp = now
            try:
                self._tokens = self._read()
                logger.info("tokens read again from %s", printable(self._path, 1000))
            except ConfigError as error:
                logger.error("%s; the tokens that it had before stay good", error)
        return self._tokens

    def _read(self) -> Tokens:
        return Tokens(file_tokens(self._path, f"{TOKEN_FILE_ENV}: {printable(self._path, 1000)}"))


def _digest(header: bytes) -> bytes:
    return hashlib.sha256(header).digest()
