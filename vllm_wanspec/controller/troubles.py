"""Why a drafter does not serve us: from what came back, or did not, to one line that says what would be right.

Nothing that a peer wrote gets into a line as it is, and no password at all.
"""

import errno
import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import aiohttp

from vllm_wanspec.config import TOKEN_ENV, DraftEndpoint
from vllm_wanspec.config.addresses import place
from vllm_wanspec.core.messages import PATH
from vllm_wanspec.text import masked_url, printable

CERTIFICATES_ENV = "SSL_CERT_FILE"
_GATEWAY = "a gateway in front of it has no drafter ready"
_EXPIRED, _NOT_YET_VALID, _OTHER_NAMES = 10, 9, {62, 63, 64}
"""OpenSSL's X509_V_ERR_… numbers."""
_GIVE_ONE = "give one by tls: {certificate: FILE, key: FILE}"
_ALERT = re.compile(r"ALERT_((?:\w+_)?CERTIFICATE\w*|UNKNOWN_CA|ACCESS_DENIED)\b")
"""In OpenSSL's words: what the other end has against the certificate that it was shown, or was not."""


class Trouble(Exception):
    """Why a connection attempt or a connection ended: a log line, and the wait before the next attempt.

    Attributes:
        refused: The drafter itself will not have us; asking again soon is of no use.
        fault: It broke the protocol.
    """

    def __init__(self, reason: str, *, refused: bool = False, fault: bool = False) -> None:
        """Say ``reason``."""
        super().__init__(reason)
        self.refused = refused
        self.fault = fault


def handshake_trouble(status: int, endpoint: DraftEndpoint, proxy: str | None) -> Trouble:
    """A server has answered, but not by opening the WebSocket.

    Only a 401 is the drafter's own word: a gateway whose drafter still starts answers the others, so they are soon
    asked again.
    """
    via = via_proxy(proxy)
    if status == 401:
        return Trouble(
            f"does not accept our token (HTTP 401){via}; {_set_token(endpoint)}",
            refused=True,
        )
    if status == 403:
        return Trouble(
            f"does not accept our token (HTTP 403), or {_GATEWAY}{via}; {_set_token(endpoint)}, "
            "or start `wanspec drafter MODEL` there"
        )
    if status == 404:
        return Trouble(f"has no {PATH} (HTTP 404), or {_GATEWAY}{via}; start it by `wanspec drafter MODEL`")
    if status == 407:
        return Trouble(f"is not reached{via}: HTTP 407, it wants a login; put user:password@ before the proxy's host")
    if status == 429:
        return Trouble(f"lets nobody in from here (HTTP 429){via}: too many wrong tokens; {_set_token(endpoint)}")
    right = ""
    if status in {502, 503, 504}:
        right = f"; perhaps {_GATEWAY}: start `wanspec drafter MODEL` there"
    elif status == 400 and not _is_tls(endpoint):
        right = "; if the port wants TLS, write https:// in the url"
    return Trouble(f"answers HTTP {status} instead of opening the WebSocket{via}{right}")


def redirect_trouble(status: int, endpoint: DraftEndpoint, location: str | None) -> Trouble:
    """A server sends us elsewhere; nobody follows there with the token."""
    if location is None:
        there = "nowhere"
    else:
        there = printable(location, 2000)
        with suppress(ValueError):
            there = urljoin(endpoint.url + PATH, there)
        there = printable(masked_url(there))
    return Trouble(
        f"redirects us (HTTP {status}) to {there}; change the url to where the drafter itself is, "
        "redirects are not followed"
    )


def connect_trouble(error: Exception, endpoint: DraftEndpoint, proxy: str | None) -> Trouble:
    """There is no connection, or nothing that speaks HTTP at its other end."""
    via = via_proxy(proxy)
    if isinstance(error, aiohttp.InvalidURL):  # its text is the whole address, that of a proxy with its password
        return Trouble(f"is not reached{via}: the address is none; mend the url of the drafter or of the proxy")
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return handshake_trouble(error.status, endpoint, proxy)
    if isinstance(error, aiohttp.ClientProxyConnectionError) and proxy is not None:
        return Trouble(f"its proxy {place(proxy)} is unreachable ({_cause(error)}); start it or mend its url")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return _certificate_trouble(error.certificate_error, endpoint, via)
    if alert := _ALERT.search(str(error)):
        said = alert[1].lower().replace("_", " ")
        return Trouble(f"does not accept our client certificate{via} ({said}); {_client_certificate(endpoint)}")
    if isinstance(error, aiohttp.ClientSSLError):
        reason = getattr(error.os_error, "reason", None) or _cause(error)
        return Trouble(
            f"speaks no TLS{via}, or not ours ({printable(str(reason))}); write http:// in the url if the port is plain"
        )
    wants_tls = "" if _is_tls(endpoint) else "; if the port wants TLS, write https:// in the url"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError) or _is_reset(error):
        shown = not _is_tls(endpoint) or (endpoint.tls and endpoint.tls.certificate)
        wants = wants_tls if shown else f"; if it wants a client certificate, {_GIVE_ONE}"
        return Trouble(f"hangs up without an answer{via}; start `wanspec drafter MODEL` there{wants}")
    if isinstance(error, aiohttp.ClientResponseError):
        said = printable(" ".join(str(error.message).split()), 120)
        return Trouble(f"does not answer in HTTP{via} ({said}); mend the url{wants_tls}")
    return Trouble(f"unreachable{via} ({_cause(error)}); start `wanspec drafter` there or mend the url")


def _certificate_trouble(error: Exception, endpoint: DraftEndpoint, via: str) -> Trouble:
    code = getattr(error, "verify_code", 0)
    why = printable(str(getattr(error, "verify_message", "") or error))
    if code in _OTHER_NAMES:
        right = "it is for another name: write a name that is in it into the url"
    elif code in {_EXPIRED, _NOT_YET_VALID}:
        right = "renew it, or set the clock right"
    elif endpoint.tls and endpoint.tls.ca:
        right = f"it is not of the authority in {printable(endpoint.tls.ca)} (tls.ca)"
    else:
        right = (
            f"for an authority of your own give its certificate (PEM) as tls: {{ca: FILE}}, or in {CERTIFICATES_ENV}"
        )
        file = os.environ.get(CERTIFICATES_ENV)
        if file is not None and not os.access(Path(file), os.R_OK):
            right = f"{CERTIFICATES_ENV} names {printable(file)}, which cannot be read"
    return Trouble(f"its certificate is not accepted{via} ({why}); {right}")


def _cause(error: Exception) -> str:
    """What the system says, without the addresses that aiohttp puts around it."""
    cause = getattr(error, "os_error", error)
    said = str(getattr(cause, "strerror", None) or cause) or type(cause).__name__
    if said.startswith("Multiple exceptions"):  # of a name's addresses, in an order that changes from try to try
        number = getattr(cause, "errno", None)
        said = os.strerror(number) if number else "none of its addresses answers"
    return printable(said)


def via_proxy(proxy: str | None) -> str:
    """Which way was taken, for a log line; empty for the straight one."""
    return f" through its proxy {place(proxy)}" if proxy is not None else ""


def _set_token(endpoint: DraftEndpoint) -> str:
    if endpoint.token_file:
        return f"write one of the drafter's tokens into {printable(endpoint.token_file)} here"
    return f"set {endpoint.token_env or TOKEN_ENV} here to the drafter's WANSPEC_TOKEN"


def _client_certificate(endpoint: DraftEndpoint) -> str:
    if endpoint.tls and endpoint.tls.certificate:
        return f"renew {printable(endpoint.tls.certificate)}, signed by the authority in --ssl-ca-certs there"
    return f"{_GIVE_ONE}, signed by the authority in --ssl-ca-certs there"


def _is_reset(error: Exception) -> bool:
    """Whether a connection that stood was cut; what never stood is a `ClientConnectorError`."""
    cut = isinstance(error, OSError) and error.errno in {errno.ECONNRESET, errno.EPIPE}
    return cut and not isinstance(error, aiohttp.ClientConnectorError)


def _is_tls(endpoint: DraftEndpoint) -> bool:
    return urlsplit(endpoint.url).scheme == "https"
