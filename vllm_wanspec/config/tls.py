"""TLS on the way to a drafter: whose certificates are accepted there, and which one is shown to it."""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_wanspec.config.files import bounded_text
from vllm_wanspec.config.sections import Line, Section
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.text import printable

MAX_PEM_BYTES = 1024 * 1024
_CERTIFICATE, _KEY = "CERTIFICATE-----", "PRIVATE KEY-----"
"""How the first line of such a thing ends in PEM."""


class TlsFiles(Section):
    """PEM files of one endpoint: its authority, and the certificate shown to it, whose key may be in the same file."""

    ca: Line | None = None
    certificate: Line | None = None
    key: Line | None = None


def client_context(files: TlsFiles | None) -> ssl.SSLContext:
    """What a drafter's certificate is checked by, and what it is shown.

    With a ``ca`` only that authority is accepted, else the system's, or those of ``SSL_CERT_FILE`` as it is now.

    Raises:
        ConfigError: A file cannot be used; one line that names its key and the file.
    """
    files = files or TlsFiles()
    if files.key is not None and files.certificate is None:
        raise ConfigError("tls.key: there is no tls.certificate that it is for; give the certificate too")
    if files.ca is not None:
        _check_pem("ca", files.ca, _CERTIFICATE)
    try:
        context = ssl.create_default_context(cafile=files.ca)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"tls.ca: {_shown(files.ca)} cannot be used ({_reason(error)})") from error
    context.set_alpn_protocols(["http/1.1"])
    if files.certificate is not None:
        _show(context, files.certificate, files.key)
    return context


class ClientTls:
    """The context of one endpoint, made anew when one of its files has changed: certificates are renewed."""

    def __init__(self, url: str, files: TlsFiles | None) -> None:
        """Prepare; nothing is read before `context`."""
        self.encrypted = urlsplit(url).scheme == "https"
        self._files = files
        self._context: ssl.SSLContext | None = None
        self._stamps: list[Any] = []

    def context(self) -> ssl.SSLContext | bool:
        """The context for the next connection; True where there is no TLS.

        Raises:
            ConfigError: A file cannot be used.
        """
        if not self.encrypted:
            return True
        stamps = [stamp(path) for path in self._files.model_dump().values()] if self._files else []
        if self._context is None or stamps != self._stamps:
            self._context, self._stamps = client_context(self._files), stamps
        return self._context


def stamp(path: str | None) -> tuple[int, ...] | None:
    """What differs once a file has been written or replaced; None where there is none."""
    try:
        status = Path(path).stat() if path is not None else None
    except (OSError, ValueError):
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if status else None


def _show(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    """Have a context show a certificate."""
    key_name, key_file = ("key", key) if key is not None else ("certificate", certificate)
    _check_pem("certificate", certificate, _CERTIFICATE)
    _check_pem(key_name, key_file, _KEY)
    try:
        context.load_cert_chain(certificate, key, password=_refusing(key_name, key_file))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"tls.{key_name}: {_shown(key_file)} has the key of another certificate than {_shown(certificate)}"
            ) from error
        raise ConfigError(
            f"tls.certificate: {_shown(certificate)} and its key cannot be used ({_reason(error)})"
        ) from error
    except OSError as error:
        raise ConfigError(f"tls.certificate: {_shown(certificate)} cannot be read: {_reason(error)}") from error


def _check_pem(key: str, path: str, what: str) -> None:
    try:
        text = bounded_text(path, MAX_PEM_BYTES)
    except ConfigError as error:
        raise ConfigError(f"tls.{key}: {_shown(path)} {error}") from error
    if what not in text:
        named = "certificate" if what == _CERTIFICATE else "private key"
        raise ConfigError(f"tls.{key}: {_shown(path)} holds no {named} in PEM")


def _refusing(key: str, path: str) -> Callable[[], str]:
    """In place of OpenSSL's question at the terminal, which no server can answer."""

    def password() -> str:
        raise ConfigError(f"tls.{key}: {_shown(path)} is encrypted; give the key without a password (openssl pkey)")

    return password


def _shown(path: str | None) -> str:
    return printable(str(path), 1000)


def _reason(error: OSError) -> str:
    return printable(str(getattr(error, "reason", None) or error.strerror or error))
