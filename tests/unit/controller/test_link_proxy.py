"""DrafterLink through an HTTP proxy: a real one on a socket, which resolves every name to 127.0.0.1."""

import base64
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import LogLines
from links import TOY, User
from tls_files import AUTHORITY, server_tls
from toy_proxy import ToyProxy
from toys import FINGERPRINT, DrafterServer, wait_until

from vllm_wanspec.config import DraftEndpoint
from vllm_wanspec.controller.link import DrafterLink, LinkThread
from vllm_wanspec.core.messages import PATH

pytestmark = [pytest.mark.usefixtures("short_waits", "no_proxies")]
VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
BASIC = "Basic " + base64.b64encode(b"user:pass").decode()


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(TOY) as server:
        yield server


@pytest.fixture
def proxy() -> Iterator[ToyProxy]:
    with ToyProxy() as proxy:
        yield proxy


@contextmanager
def running(**keys: object) -> Iterator[User]:
    user = User()
    endpoint = DraftEndpoint.model_validate({"name": "eu", **keys})
    thread = LinkThread([DrafterLink(endpoint, FINGERPRINT, user, random.Random(1))])
    thread.start()
    try:
        yield user
    finally:
        thread.stop()
        assert not thread._thread.is_alive()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_a_proxy_of_the_environment(
    server: DrafterServer, proxy: ToyProxy, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://user:pass@127.0.0.1:{proxy.port}")
    with running(url=f"http://drafter.test:{server.port}") as user:
        wait_until(lambda: user.ready)
    assert proxy.asked == [f"GET http://drafter.test:{server.port}{PATH} HTTP/1.1"]
    assert proxy.credentials == [BASIC]


def test_a_tunnel_for_https(monkeypatch: pytest.MonkeyPatch, proxy: ToyProxy) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    monkeypatch.setenv("https_proxy", f"http://user:pass@127.0.0.1:{proxy.port}")
    with DrafterServer(TOY, token="secret", tls=server_tls()) as server:
        monkeypatch.setenv("EU_TOKEN", "secret")
        with running(url=f"https://drafter.test:{server.port}", token_env="EU_TOKEN") as user:
            wait_until(lambda: user.ready)
    assert proxy.asked == [f"CONNECT drafter.test:{server.port} HTTP/1.1"]
    assert proxy.credentials == [BASIC]


def test_a_proxy_of_the_endpoint(server: DrafterServer, proxy: ToyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with running(url=server.url, proxy=f"http://127.0.0.1:{proxy.port}") as user:
        wait_until(lambda: user.ready)
    assert proxy.asked == [f"GET {server.url}{PATH} HTTP/1.1"]
    assert proxy.credentials == [None]


def test_no_proxy_for_an_endpoint(server: DrafterServer, proxy: ToyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    with running(url=server.url, proxy="none") as user:
        wait_until(lambda: user.ready)
    assert proxy.asked == []


def test_no_proxy_where_the_environment_says_so(
    server: DrafterServer, proxy: ToyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("no_proxy", "127.0.0.0/8")
    with running(url=server.url) as user:
        wait_until(lambda: user.ready)
    assert proxy.asked == []


ANSWERS = {
    "wants a password": (b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n", ["HTTP 407", "user:password@"]),
    "forbids": (b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", ["HTTP 403", "proxy"]),
    "cannot reach it": (b"HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n", ["HTTP 502", "proxy"]),
    "speaks otherwise": (b"\x05\xff\x1b[31m no\r\n\r\n", ["proxy"]),
    "says nothing": (b"", ["proxy"]),
}


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(("answer", "fragments"), ANSWERS.values(), ids=ANSWERS.keys())
def test_a_proxy_that_does_not_serve_us(
    proxy: ToyProxy, log: LogLines, scheme: str, answer: bytes, fragments: list[str]
) -> None:
    proxy.answer = answer
    address = f"127.0.0.1:{proxy.port}"
    with running(url=f"{scheme}://drafter.test:8443", proxy=f"http://user:pass@{address}"):
        wait_until(lambda: len(proxy.asked) >= 3)
        wait_until(log.warnings)
    [line] = log.warnings()
    assert address in line
    for fragment in fragments:
        assert fragment in line
    assert "user:pass@" not in line
    assert line.isprintable()


def test_an_address_that_is_none_is_not_told(log: LogLines) -> None:
    endpoint = DraftEndpoint(name="eu", url="http://drafter.test:8443")
    proxied = endpoint.model_copy(update={"proxy": "http://user:pass@pro\\xy:3128"})
    thread = LinkThread([DrafterLink(proxied, FINGERPRINT, User(), random.Random(1))])
    thread.start()
    try:
        wait_until(log.warnings)
    finally:
        thread.stop()
    [line] = log.warnings()
    assert "pass@" not in line
    assert "mend the url" in line


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there(log: LogLines, scheme: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with running(url=f"{scheme}://drafter.test:8443", proxy=f"http://user:pass@{address}"):
            wait_until(log.warnings)
    [line] = log.warnings()
    assert f"its proxy {address}" in line
    assert "user:pass@" not in line
