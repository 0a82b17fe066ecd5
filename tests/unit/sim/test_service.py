"""The drafter as a service: its pages, its token, its hooks, its end, and its command line."""

import asyncio
import re
import subprocess
import sys
import urllib.request
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from toys import DrafterServer, drafter_argv, limits, toy, wait_until

from vllm_wanspec.core.messages import PATH, PROTOCOL_VERSION, Hello, Message, Nodes, Open, Welcome
from vllm_wanspec.core.wire import decode, encode
from vllm_wanspec.drafter.host import StreamingHost
from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.lab.harness.servers import free_ports
from vllm_wanspec.sim import service
from vllm_wanspec.sim.models import Language, RandomTokens
from vllm_wanspec.sim.service import STATS_PATH, Service

TOY = toy(seed=7)
PROMPT = (1, 2, 3)


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10.0) as answer:
        return str(answer.read().decode())


async def said(url: str, *messages: Message, until: type[Message], token: str | None = None) -> list[Message]:
    """What a drafter says to a controller, up to the first message of a kind."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    found: list[Message] = []
    async with asyncio.timeout(20.0), aiohttp.ClientSession() as http:
        async with http.ws_connect(url + PATH, headers=headers) as socket:
            await socket.send_bytes(encode([messages[0]]))
            if messages[1:]:
                await socket.send_bytes(encode(messages[1:]))
            while not any(isinstance(message, until) for message in found):
                found += decode((await socket.receive()).data)
    return found


def hello(language: Language = TOY) -> Hello:
    return Hello(PROTOCOL_VERSION, language.fingerprint, "test")


def test_it_drafts_and_its_pages_say_so() -> None:
    with DrafterServer(TOY, pace=Pacing(1.0)) as server:
        welcome, *rest = asyncio.run(said(server.url, hello(), Open(1, PROMPT, limits(8)), until=Nodes))
        assert isinstance(welcome, Welcome)
        nodes = [node for message in rest if isinstance(message, Nodes) for node in message.nodes]
        assert [node.token for node in nodes] == TOY.drafted(PROMPT, len(nodes))
        wait_until(lambda: not server.sessions)
        assert page(server.url + "/health") == "ready"
        stats = asyncio.run(_json(server.url + STATS_PATH))
        assert stats["tokens"] >= len(nodes)
        assert set(stats) == {"steps", "tokens", "busy_s", "paced_s", "cpu_s"}
        drafted = re.search(r"^wanspec_drafted_tokens_total (\S+)$", page(server.url + "/metrics"), re.M)
        assert drafted is not None
        assert float(drafted[1]) >= len(nodes)


async def _json(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        found: dict[str, Any] = await answer.json()
        return found


@pytest.mark.parametrize(("wanted", "given", "served"), [(None, None, True), ("x", "x", True), ("x", "y", False)])
def test_only_who_has_the_token_is_served(wanted: str | None, given: str | None, served: bool) -> None:
    with DrafterServer(TOY, token=wanted) as server:
        if served:
            assert asyncio.run(said(server.url, hello(), until=Welcome, token=given))
        else:
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                asyncio.run(said(server.url, hello(), until=Welcome, token=given))
            assert caught.value.status == 401
        assert server.attempts == 1


def test_a_handler_serves_in_place_of_the_host() -> None:
    async def busy(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    with DrafterServer(TOY) as server:
        server.handler = busy
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            asyncio.run(said(server.url, hello(), until=Welcome))
        assert caught.value.status == 503
        server.handler = None
        assert asyncio.run(said(server.url, hello(), until=Welcome))


def test_it_ends_without_a_word_and_may_begin_again_on_its_port() -> None:
    server = DrafterServer(TOY).start()

    async def last_word() -> aiohttp.WSMsgType:
        async with asyncio.timeout(20.0), aiohttp.ClientSession() as http:
            async with http.ws_connect(server.url + PATH) as socket:
                await socket.send_bytes(encode([hello()]))
                await socket.receive()
                await asyncio.to_thread(server.stop)
                return (await socket.receive()).type

    assert asyncio.run(last_word()) in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
    with server:
        assert asyncio.run(said(server.url, hello(), until=Welcome))


def test_the_process_serves_what_its_command_line_says() -> None:
    [port] = free_ports(1)
    process = subprocess.Popen(drafter_argv(port, 4, max_context=99))
    try:
        wait_until(lambda: _answers(port), timeout_s=30.0)
        [welcome] = asyncio.run(said(f"http://127.0.0.1:{port}", hello(), until=Welcome))
    finally:
        process.terminate()
        process.wait(10.0)
    assert isinstance(welcome, Welcome)
    assert (welcome.model, welcome.vocab_size, welcome.max_context) == ("invented", 64, 99)
    assert welcome.fingerprint == TOY.fingerprint


def _answers(port: int) -> bool:
    try:
        return page(f"http://127.0.0.1:{port}/health") == "ready"
    except OSError:
        return False


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[StreamingHost]:
    """Hosts that `main` would have served."""
    hosts: list[StreamingHost] = []

    async def remember(served: Service, port: int) -> None:
        hosts.append(served.host)

    monkeypatch.setattr(service, "_serve_for_ever", remember)
    return hosts


def test_a_drafter_of_random_tokens_claims_the_model_s_vocabulary(
    monkeypatch: pytest.MonkeyPatch, started: list[StreamingHost]
) -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 6}
    transformers = SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: SimpleNamespace(get_vocab=lambda: vocabulary)),
        AutoConfig=SimpleNamespace(from_pretrained=lambda name: SimpleNamespace(vocab_size=128)),
    )
    monkeypatch.setitem(sys.modules, "transformers", transformers)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["service", "--port", "1", "--model", "some", "--pace", "7"])
    service.main()
    [host] = started
    assert (host.model.name, host.model.vocab_size, host.model.max_context) == ("random", 7, 1023)
    assert isinstance(host.engine.model, RandomTokens)  # type: ignore[attr-defined]
    assert host.width() == 64


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--pace", "soon"], "error: --pace: 'soon' is not a pace, expected milliseconds"),
        (["--vocab-size", "100"], "error: vocab_size must be a power of two"),
    ],
)
def test_a_wrong_option_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, started: list[StreamingHost], more: list[str], complaint: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["service", "--port", "1", *more])
    with pytest.raises(SystemExit) as caught:
        service.main()
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)
    assert not started
