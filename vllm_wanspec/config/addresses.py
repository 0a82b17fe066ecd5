"""Addresses of drafters and proxies: what is one, which are the same, and which proxy leads to one."""

import os
import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, unquote, urlsplit

from vllm_wanspec.errors import ConfigError

_PORTS = {"http": 80, "https": 443}


def base_url(value: str) -> str:
    """A drafter's base URL, checked, without the last slash.

    Raises:
        ValueError: It is none; the text says what would be right, and holds nothing of ``value``.
    """
    right = "must be a base URL such as https://draft.example.com:8443"
    if "@" in value:
        raise ValueError(
            f"{right}, without a login before the host; the token goes into the variable that token_env names"
        )
    if "?" in value:
        raise ValueError(f"{right}, without a query (what begins with ?)")
    if "#" in value:
        raise ValueError(f"{right}, without a fragment (what begins with #)")
    if _split(value) is None:
        raise ValueError(right)
    return value.rstrip("/")


def same_place(url: str) -> tuple[str, str, int, str]:
    """What two spellings of one base URL have in common."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    address = _address(host)
    port = parts.port or _PORTS[parts.scheme]
    return parts.scheme, str(address or host.rstrip(".")), port, parts.path.rstrip("/")


def proxy_setting(value: str) -> str:
    """A proxy as the file or the environment names it: ``none``, or its URL, which may hold user and password.

    Raises:
        ValueError: It is neither; the text holds nothing of ``value``.
    """
    if value in {"none", "off", "no", "false", "direct"}:
        return "none"
    parts = _split(value)
    if parts is None or parts.scheme != "http" or parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ValueError("must be http://host:port or none")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if ":" in user or not all(letter < "\u0100" for letter in user + password):
        raise ValueError(
            "must be http://host:port or none, with a user without colon, and no characters outside of Latin-1"
        )
    return value.rstrip("/")


def environment_proxy(url: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The proxy that ``HTTP_PROXY``, ``HTTPS_PROXY`` and ``NO_PROXY`` set for a base URL; none to this machine itself.

    Raises:
        ConfigError: They name one that cannot be used; the text does not tell it.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    names = (f"{parts.scheme}_proxy", f"{parts.scheme}_proxy".upper())
    name = next((name for name in names if name in environ), "")
    value = environ.get(name, "").strip()
    ignored = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    if not value or is_this_machine(host) or _is_listed(host, parts.port or _PORTS[parts.scheme], ignored):
        return None
    try:
        return proxy_setting(value if "://" in value else f"http://{value}")
    except ValueError as error:
        raise ConfigError(
            f"the environment variable {name} names a proxy that is not http://host:port; "
            "mend it, or set proxy: none or another proxy for this endpoint"
        ) from error


def is_this_machine(host: str) -> bool:
    """Whether a host name or address, as it stands in a URL or behind ``--host``, leads nowhere but to this machine."""
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback)


def place(url: str) -> str:
    """``host:port`` of a URL, to be told in a log line."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _split(value: str) -> SplitResult | None:
    """The parts of an http or https URL; None for what is none. ``urlsplit`` itself drops line ends and tabs."""
    try:
        parts = urlsplit(value)
        good = parts.scheme in _PORTS and bool(parts.hostname) and parts.port != 0 and "\\" not in parts.netloc
    except ValueError:
        return None
    return parts if good and value.isprintable() and " " not in value else None


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _is_listed(host: str, port: int, listed: str) -> bool:
    """Whether ``NO_PROXY`` names a host: itself, a domain that it is in, a network (CIDR), each with a port or not."""
    address = _address(host)
    for entry in re.split(r"[,\s]+", listed.lower()):
        split = re.fullmatch(r"(\[.*\]|[^:]*):([0-9]+)", entry)
        name, wanted = (split[1], int(split[2])) if split else (entry, port)
        name = name.strip("[]")
        if wanted != port:
            continue
        if name == "*":
            return True
        if address is not None:
            try:
                if address in ip_network(name, strict=False):
                    return True
            except ValueError:
                pass
        name = name.removeprefix("*").lstrip(".")
        if name and (host == name or host.endswith(f".{name}")):
            return True
    return False
