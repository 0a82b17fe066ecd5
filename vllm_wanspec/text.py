"""Text for log lines and errors: what others wrote made harmless and short, and without what may be a secret."""

import re
from typing import Any

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BEHIND = re.compile(r"([?#]).+", re.DOTALL)
_SECRET_KEY = re.compile("token|secret|password|credential", re.IGNORECASE)


def printable(text: str, limit: int = 200) -> str:
    """The text on one line, without what a terminal would obey, and at most ``limit`` characters of it."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:limit])
    return shown if len(text) <= limit and len(shown) <= limit else f"{shown[: limit - 1]}…"


def without_secret(text: str, secret: str | None) -> str:
    """The text without a secret that somebody else has put into it, whole or cut off by `printable`."""
    if not secret:
        return text
    text = text.replace(secret, "***")
    for length in range(len(secret) - 1, 3, -1):
        text = text.replace(f"{secret[:length]}…", "***…")
    return text


def masked_url(text: str) -> str:
    """An address without user, password, query and fragment; what is none keeps all but what they would hold."""
    if "@" in text:
        scheme = _SCHEME.match(text)
        text = f"{scheme.group() if scheme else ''}***@{text.rpartition('@')[2]}"
    return _BEHIND.sub(r"\1***", text)


def masked(value: Any, limit: int = 80) -> str:
    """A wrong value for an error's text: its ``repr``, cut, with `masked_url` in all of it."""
    return printable(repr(_masked(value)), limit)


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return masked_url(value)
    if isinstance(value, dict):
        return {
            _masked(key): "***" if isinstance(key, str) and _SECRET_KEY.search(key) else _masked(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return value
