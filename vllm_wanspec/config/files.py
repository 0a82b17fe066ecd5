"""Small text files that a user names: read whole, or refused with what is wrong with them."""

import stat
from pathlib import Path

from vllm_wanspec.errors import ConfigError


def bounded_text(path: str | Path, max_bytes: int) -> str:
    """The text of a file, which is UTF-8.

    Raises:
        ConfigError: It cannot be read, is no regular file or no text, or is larger; said without the file's name.
    """
    try:
        mode = Path(path).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ConfigError("is not a regular file")  # reading a pipe could wait for ever
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > max_bytes:
        raise ConfigError(f"is larger than {max_bytes // 1024} KiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text") from error
