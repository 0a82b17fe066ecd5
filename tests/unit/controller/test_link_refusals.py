"""DrafterLink and what stands before a drafter: gateways, redirects, TLS; and text from peers in log lines."""

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from aiohttp import ClientConnectorError, web
from aiohttp.client_reqrep import ConnectionKey
from conftest import LogLines
from links import TOY, WELCOME, answering, only_warning, running
from tls_files import AUTHORITY, server_tls
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, wait_until

from vllm_wanspec.config import DraftEndpoint
from vllm_wanspec.controller import link as link_module
from vllm_wanspec.controller.troubles import connect_trouble
from vllm_wanspec.core.messages import PATH, Refuse, Welcome
from vllm_wanspec.core.wire import encode
from vllm_wanspec.sim.service import Handler

LONGEST_WAIT_S = link_module.MAX_BACKOFF_S
pytestmark = pytest.mark.usefixtures("short_waits")
KEY = ConnectionKey("drafter.test", 8101, False, True, None, None, None)


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(TOY) as server:
        yield server


def status(number: int, **headers: str) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=number, headers=headers)

    return handler


def clean(log: LogLines) -> None:
    """No line, of any level, that a peer could have made look like another, or made endless."""
    for record in log.records:
        assert record.getMessage().isprintable()
        assert len(record.getMessage()) < 800
        assert record.exc_info is None


def refusing(words: str) -> Handler:
    """A peer that greets with a refusal."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([Refuse("code", words.format(token=request.headers["Authorization"]))]))
        await socket.receive()
        return socket

    return handler


@pytest.mark.parametrize("words", ["you sent {token}, thank you", "x" * 180 + "{token}"], ids=["whole", "cut off"])
def test_a_token_that_comes_back_is_not_logged(
    server: DrafterServer, monkeypatch: pytest.MonkeyPatch, log: LogLines, words: str
) -> None:
    token = "0123456789abcdefghijklmnopqrstuvwxyz"
    monkeypatch.setenv("EU_TOKEN", token)
    server.handler = refusing(words)
    with running(server.url, token_env="EU_TOKEN"):
        wait_until(lambda: log.warnings())
    assert "***" in log.warnings()[0]
    assert token[:4] not in "".join(log.lines())


# Gateways


@pytest.mark.parametrize("number", [403, 404, 429, 500, 502, 503, 504])
def test_a_gateway_without_a_drafter_is_asked_again_soon(
    server: DrafterServer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(link_module, "REFUSED_BACKOFF_S", 1000.0)
    server.handler = status(number)
    with running(server.url) as (_, user):
        wait_until(lambda: server.attempts >= 12, timeout_s=3.0)
        server.handler = None
        wait_until(lambda: user.ready, timeout_s=3.0)
    assert LONGEST_WAIT_S <= 6.0


@pytest.mark.parametrize("number", [403, 404, 502, 503, 504])
def test_a_gateway_is_named_as_a_possible_cause(server: DrafterServer, log: LogLines, number: int) -> None:
    server.handler = status(number)
    with running(server.url):
        wait_until(lambda: server.attempts >= 3)
    only_warning(log, f"HTTP {number}", "gateway", "wanspec drafter")


@pytest.mark.parametrize("number", [401])
def test_a_drafter_that_refuses_our_token_is_not_asked_again_soon(
    server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(link_module, "REFUSED_BACKOFF_S", 1000.0)
    server.handler = status(number)
    with running(server.url) as (link, _):
        wait_until(log.warnings)
        state = link._rng.getstate()
        wait_until(lambda: link._rng.getstate() != state or server.attempts == 1)
        assert server.attempts == 1


# Redirects


@pytest.mark.parametrize("number", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("same_host", [True, False])
def test_redirects_are_told_and_not_followed(
    server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch, number: int, same_host: bool
) -> None:
    monkeypatch.setenv("EU_TOKEN", "secret")
    asked: list[str] = []
    with DrafterServer(TOY) as other:

        async def elsewhere(request: web.Request) -> web.Response:
            asked.append(request.path)
            return web.Response(status=503)

        async def redirecting(request: web.Request) -> web.Response:
            there = f"http://user:pass@{'127.0.0.1' if same_host else 'localhost'}:{other.port}{PATH}?code=secret#f"
            return web.Response(status=number, headers={"Location": there})

        other.handler, server.handler = elsewhere, redirecting
        with running(server.url, token_env="EU_TOKEN"):
            wait_until(lambda: server.attempts >= 3)
        assert other.attempts == 0
        host = "127.0.0.1" if same_host else "localhost"
        line = only_warning(log, f"redirects us (HTTP {number}) to http://***@{host}:{other.port}{PATH}", "the url")
        assert "pass" not in line
        assert "secret" not in line
    clean(log)


@pytest.mark.parametrize(
    ("location", "told"),
    [("/login", "/login"), ("\x1b[31mhttp://x", "\\x1b[31m"), ("x" * 5000, "xxxx"), ("http://[", "http://[")],
)
def test_odd_redirects(server: DrafterServer, log: LogLines, location: str, told: str) -> None:
    answer = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")
    with speaking(answer) as url, running(url):
        wait_until(log.warnings)
    assert "redirects us (HTTP 302) to " in log.warnings()[0]
    assert told in log.warnings()[0]
    clean(log)


def test_a_redirect_to_nowhere(server: DrafterServer, log: LogLines) -> None:
    server.handler = status(307)
    with running(server.url):
        wait_until(lambda: server.attempts >= 2)
    only_warning(log, "redirects us (HTTP 307)")


# TLS


def test_an_authority_that_is_not_known(log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with DrafterServer(TOY, tls=server_tls()) as server, running(f"https://localhost:{server.port}"):
        wait_until(log.warnings)
    [line] = log.warnings()
    assert "certificate" in line
    assert "SSL_CERT_FILE" in line
    clean(log)


def test_an_authority_that_is_known(log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    with DrafterServer(TOY, tls=server_tls()) as server, running(f"https://localhost:{server.port}") as (_, user):
        wait_until(lambda: user.ready)
    assert log.warnings() == []


def test_a_file_of_authorities_that_is_not_there(log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with DrafterServer(TOY, tls=server_tls()) as server, running(f"https://localhost:{server.port}"):
        wait_until(log.warnings)
    assert "SSL_CERT_FILE names /nowhere/ca.pem, which cannot be read" in log.warnings()[0]


def test_a_certificate_for_another_name(log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    with DrafterServer(TOY, tls=server_tls()) as server, running(f"https://127.0.0.1:{server.port}"):
        wait_until(log.warnings)
    [line] = log.warnings()
    assert "another name" in line
    assert "SSL_CERT_FILE" not in line
    clean(log)


def test_https_to_a_plain_port(server: DrafterServer, log: LogLines) -> None:
    with running(f"https://127.0.0.1:{server.port}"):
        wait_until(log.warnings)
    [line] = log.warnings()
    assert "speaks no TLS" in line
    assert "http://" in line
    clean(log)


def test_http_to_a_tls_port(log: LogLines) -> None:
    with DrafterServer(TOY, tls=server_tls()) as server, running(server.url):
        wait_until(log.warnings)
    [line] = log.warnings()
    assert "TLS" in line
    assert "https://" in line
    clean(log)


TLS_ALERT = b"\x15\x03\x03\x00\x02\x02\x46"
NGINX = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Length: 55\r\nConnection: close\r\n\r\n"
    b"The plain HTTP request was sent to HTTPS port, you see."
)


@pytest.mark.parametrize("answer", [TLS_ALERT, NGINX, b""])
def test_http_to_other_tls_ports(log: LogLines, answer: bytes) -> None:
    with speaking(answer) as url, running(url):
        wait_until(log.warnings)
    [line] = {*log.warnings()}
    assert "TLS" in line
    assert "https://" in line
    clean(log)


# Text of peers


EVIL = "\x1b[2J\nERROR nobody \u202e here" + "x" * 400


@contextmanager
def speaking(answer: bytes) -> Iterator[str]:
    """A server that gives the same bytes to whoever asks, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    with peer, suppress(OSError):
                        peer.recv(65536)
                        peer.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(5.0)


@pytest.mark.parametrize("frame", [encode([Refuse("version", EVIL)]), encode([Refuse(EVIL, "no")])])
def test_text_of_a_drafter_that_refuses(server: DrafterServer, log: LogLines, frame: bytes) -> None:
    server.handler = answering(frame)
    with running(server.url):
        wait_until(log.warnings)
    assert "\\x1b[2J\\nERROR" in log.warnings()[0]
    clean(log)


def test_text_of_a_drafter_that_welcomes(server: DrafterServer, log: LogLines) -> None:
    server.handler = answering(encode([Welcome(1, EVIL, VOCAB_SIZE, FINGERPRINT, 8, 64, 64)]))
    with running(server.url) as (_, user):
        wait_until(lambda: user.ready)
        wait_until(log.lines)
    assert any("\\x1b[2J\\nERROR" in line for line in log.lines())
    clean(log)


def test_text_of_a_drafter_that_closes(server: DrafterServer, log: LogLines) -> None:
    async def closing(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([WELCOME]))
        await socket.close(code=1008, message=EVIL.encode()[:100])
        return socket

    server.handler = closing
    with running(server.url):  # now and then our ping meets the closed connection first
        wait_until(lambda: any("\\x1b[2J\\nERROR" in line for line in log.warnings()))
    clean(log)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 \x1b[31m nonsense\r\n\r\n",
        b"SSH-2.0-\x1b[31m\r\n",
        b"HTTP/1.1 200 \x1b[31m\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 60000 + b": \x1b\r\n\r\n",
    ],
)
def test_text_of_what_is_no_drafter(log: LogLines, answer: bytes) -> None:
    with speaking(answer) as url, running(url):
        wait_until(log.warnings)
    clean(log)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [((errno.ECONNREFUSED, errno.ECONNREFUSED), "(Connection refused)"), ((errno.ECONNREFUSED, None), "addresses")],
)
def test_a_name_with_several_addresses_is_one_trouble(numbers: tuple[int, int | None], told: str) -> None:
    # As aiohappyeyeballs raises it: in the order in which the addresses failed.
    endpoint = DraftEndpoint(name="eu", url="http://drafter.test:8101")
    addresses = ["Connect call failed ('::1', 8101, 0, 0)", "Connect call failed ('127.0.0.1', 8101)"]
    number = numbers[0] if numbers[0] == numbers[1] else None
    troubles = set()
    for order in (addresses, addresses[::-1]):
        text = f"Multiple exceptions: {', '.join(order)}"
        cause = OSError(number, text) if number else OSError(text)
        troubles.add(str(connect_trouble(ClientConnectorError(KEY, cause), endpoint, None)))
    [line] = troubles
    assert told in line


# Tokens


@pytest.mark.parametrize("token", ["secret\n", "secret ", "sec\r\nret", "s\xe9cret", "s\u20accret", ""])
def test_a_token_that_no_header_can_carry_is_told_as_that(
    server: DrafterServer, log: LogLines, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("EU_TOKEN", token)
    with running(server.url, token_env="EU_TOKEN") as (_, user):
        wait_until(log.warnings)
        assert user.ready == 0
        monkeypatch.setenv("EU_TOKEN", "good")
        wait_until(lambda: user.ready)
    line = only_warning(log, "the environment variable EU_TOKEN ")
    assert "secret" not in line.lower()
    assert "unreachable" not in line
    clean(log)
