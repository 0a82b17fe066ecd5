"""The route on a real server: FastAPI under uvicorn on a free port, with a toy engine in its state."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from toys import FINGERPRINT, VOCAB_SIZE, VOCABULARY, draft_model, limits, toy, wait_until

from vllm_wanspec.config import EVENTS_ENV, HOST_ENV, TOKEN_ENV, TOKEN_FILE_ENV, WIDTH_ENV
from vllm_wanspec.core.messages import PATH, Commit, Hello, Message, Nodes, Open, Refuse, Welcome
from vllm_wanspec.core.wire import decode, encode
from vllm_wanspec.drafter import attempts, routes
from vllm_wanspec.drafter.environment import FRONT_END, running_branches
from vllm_wanspec.drafter.host import DEFAULT_RUNNING_BRANCHES, StreamingHost
from vllm_wanspec.drafter.ports import LocalPort
from vllm_wanspec.drafter.routes import WanspecRoutes
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.sim.engine import Engine

TOY = toy(seed=9)
PROMPT = (4, 5, 6)


@asynccontextmanager
async def drafter(**uvicorn_options: Any) -> AsyncIterator[tuple[str, Engine]]:
    app = FastAPI()
    WanspecRoutes().attach_router(app)
    engine = Engine(TOY)
    app.state.wanspec_port = partial(LocalPort, StreamingHost(engine, draft_model()))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", ws="websockets-sansio", lifespan="off", **uvicorn_options)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    try:
        scheme = "https" if config.is_ssl else "http"
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}{PATH}", engine
    finally:
        server.should_exit = True
        await running
        listener.close()


@asynccontextmanager
async def connected(url: str, token: str | None = None) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession() as http, http.ws_connect(url, headers=headers) as peer:
        yield peer


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():
            await asyncio.sleep(0.002)


async def hello(peer: aiohttp.ClientWebSocketResponse) -> Message:
    await peer.send_bytes(encode([Hello(1, FINGERPRINT, "test")]))
    [answer] = decode(await peer.receive_bytes(timeout=5.0))
    return answer


async def nodes(peer: aiohttp.ClientWebSocketResponse, count: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count:
        for message in decode(await peer.receive_bytes(timeout=5.0)):
            assert isinstance(message, Nodes)
            tokens += [node.token for node in message.nodes]
    return tokens


@pytest.mark.parametrize("given", [None, "wrong", "secre", "secret2"])
def test_a_wrong_token_is_refused_with_401(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.setenv(TOKEN_ENV, "secret")
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 0.0)

    async def scenario() -> None:
        async with drafter() as (url, engine):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                async with connected(url, given):
                    pass
            assert caught.value.status == 401
            assert engine.started == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(("token", "given"), [("secret", "secret"), (None, None), (None, "any")])
def test_the_right_token_and_no_token_needed(
    monkeypatch: pytest.MonkeyPatch, token: str | None, given: str | None
) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    if token:
        monkeypatch.setenv(TOKEN_ENV, token)

    async def scenario() -> None:
        async with drafter() as (url, _), connected(url, given) as peer:
            answer = await hello(peer)
            assert isinstance(answer, Welcome)
            assert answer.vocab_size == VOCAB_SIZE

    asyncio.run(scenario())


def test_drafts_follow_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)

    async def scenario() -> None:
        async with drafter() as (url, _), connected(url) as peer:
            await hello(peer)
            await peer.send_bytes(encode([Open(1, PROMPT, limits(8))]))
            line = TOY.drafted(PROMPT, 8)
            assert await nodes(peer, 8) == line
            await peer.send_bytes(encode([Commit(1, 3, tuple(line))]))
            assert await nodes(peer, 8) == TOY.drafted((*PROMPT, *line), 8)

    asyncio.run(scenario())


def test_another_vocabulary_is_refused_and_the_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)

    async def scenario() -> None:
        async with drafter() as (url, _), connected(url) as peer:
            await peer.send_bytes(encode([Hello(1, "other", "test")]))
            [answer] = decode(await peer.receive_bytes(timeout=5.0))
            assert isinstance(answer, Refuse)
            assert answer.code == "vocabulary"
            assert (await peer.receive(timeout=5.0)).type is aiohttp.WSMsgType.CLOSE

    asyncio.run(scenario())


@pytest.mark.parametrize("greeted", [False, True])
@pytest.mark.parametrize("garbage", [b"\xc1", b"", encode([Commit(3, 1, (1,))]), "text"])
def test_garbage_closes_with_1002_and_stops_the_engine(
    monkeypatch: pytest.MonkeyPatch, greeted: bool, garbage: bytes | str
) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)

    async def scenario() -> None:
        async with drafter() as (url, engine), connected(url) as peer:
            if greeted:
                await hello(peer)
                await peer.send_bytes(encode([Open(1, PROMPT, limits(4000, 4000))]))
                await nodes(peer, 1)
            if isinstance(garbage, bytes):
                await peer.send_bytes(garbage)
            else:
                await peer.send_str(garbage)
            message = await peer.receive(timeout=5.0)
            while message.type is aiohttp.WSMsgType.BINARY:
                message = await peer.receive(timeout=5.0)
            assert message.type is aiohttp.WSMsgType.CLOSE
            assert message.data == 1002
            await until(lambda: engine.running == 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("abrupt", [False, True])
def test_a_controller_that_goes_stops_the_engine(monkeypatch: pytest.MonkeyPatch, abrupt: bool) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)

    async def scenario() -> None:
        async with drafter() as (url, engine):
            async with connected(url) as peer:
                await hello(peer)
                engine.held = True
                await peer.send_bytes(encode([Open(n, PROMPT, limits(4000, 4000)) for n in (1, 2, 3)]))
                await until(lambda: engine.running == 3)
                if abrupt:
                    transport = peer.get_extra_info("socket")
                    assert transport is not None
                    peer._response.connection.transport.abort()  # type: ignore[union-attr]
            await until(lambda: engine.running == 0)
            async with connected(url) as peer:  # and the next one is served
                assert isinstance(await hello(peer), Welcome)

    asyncio.run(scenario())


def test_many_controllers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)

    async def one(url: str, number: int) -> None:
        async with connected(url) as peer:
            await hello(peer)
            await peer.send_bytes(encode([Open(1, (number, 1), limits(8))]))
            assert await nodes(peer, 8) == TOY.drafted((number, 1), 8)

    async def scenario() -> None:
        async with drafter() as (url, _):
            await asyncio.gather(*[one(url, number) for number in range(8)])

    asyncio.run(scenario())


@pytest.mark.parametrize("token", ["secret", None])
def test_a_page_in_a_browser_is_refused_with_403(monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    if token:
        monkeypatch.setenv(TOKEN_ENV, token)

    async def scenario() -> None:
        headers = {"Origin": "http://localhost", "Authorization": f"Bearer {token}"}
        async with drafter() as (url, _), aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await http.ws_connect(url, headers=headers)
            assert caught.value.status == 403

    asyncio.run(scenario())


def test_a_header_of_any_bytes_is_a_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "secret")
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 0.0)
    asked = b"GET %s HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    asked += b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nAuthorization: Bearer \xff\xfes\xe9cret\r\n\r\n"

    async def scenario() -> None:
        async with drafter() as (url, _):
            place = urlsplit(url)
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
            writer.write(asked % PATH.encode())
            assert b" 401 " in await asyncio.wait_for(reader.readline(), 10.0)
            writer.close()
            await writer.wait_closed()

    asyncio.run(scenario())


def test_a_port_is_told_whose_token_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "eu:secret, us:secret2")
    clients: list[str] = []
    init = LocalPort.__init__

    def watched(self: LocalPort, host: StreamingHost, client: str = "") -> None:
        init(self, host, client)
        clients.append(self.client)

    monkeypatch.setattr(LocalPort, "__init__", watched)

    async def scenario() -> None:
        async with drafter() as (url, _):
            for token in ("secret2", "secret"):
                async with connected(url, token) as peer:
                    await hello(peer)

    asyncio.run(scenario())
    assert clients == ["us", "eu"]


def client(max_num_seqs: int = 100) -> SimpleNamespace:
    """An engine client, as far as the routes look."""
    config = SimpleNamespace(model="small", max_model_len=1024, get_vocab_size=lambda: 80, max_logprobs=20)
    scheduler = SimpleNamespace(max_num_seqs=max_num_seqs)
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            model_config=config,
            scheduler_config=scheduler,
            parallel_config=SimpleNamespace(data_parallel_size=1),
        ),
        get_tokenizer=lambda: SimpleNamespace(get_vocab=lambda: VOCABULARY),
        shutdown=lambda timeout=None: None,
    )


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    for name in (WIDTH_ENV, EVENTS_ENV, TOKEN_ENV, TOKEN_FILE_ENV):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(HOST_ENV, FRONT_END)
    registry = CollectorRegistry()
    monkeypatch.setattr(routes, "REGISTRY", registry)
    return registry


def made_ready(max_num_seqs: int = 100) -> StreamingHost:
    state = SimpleNamespace()
    asyncio.run(WanspecRoutes().init_state(client(max_num_seqs), state, None))
    host = state.wanspec_port().connection._host
    assert isinstance(host, StreamingHost)
    return host


def test_getting_ready_asks_the_engine_once_and_says_what_is_served(
    monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry
) -> None:
    warmed: list[tuple[tuple[int, ...], int]] = []

    class WatchedEngine(Engine):
        def __init__(self, client: object, top_k: int) -> None:
            super().__init__(TOY)

        async def draft(self, tokens, max_tokens):  # type: ignore[no-untyped-def]
            warmed.append((tokens, max_tokens))
            async for steps in super().draft(tokens, max_tokens):
                yield steps

    monkeypatch.setattr(routes, "VllmEngine", WatchedEngine)
    model = made_ready().model
    assert (model.name, model.vocab_size, model.max_context) == ("small", VOCAB_SIZE, 1023)
    assert model.fingerprint == FINGERPRINT
    assert [count for _, count in warmed] == [routes.WARM_UP_TOKENS]
    assert b"wanspec_running_branches 0.0" in generate_latest(registry)  # beside vLLM's own metrics


@pytest.mark.parametrize(
    ("asked", "max_num_seqs", "width"),
    [(None, 100, DEFAULT_RUNNING_BRANCHES), (None, 4, 4), ("12", 100, 12), ("12", 4, 4), ("1", 4, 1)],
)
def test_places_for_running_branches(
    monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry, asked: str | None, max_num_seqs: int, width: int
) -> None:
    monkeypatch.setattr(routes, "VllmEngine", lambda client, top_k: Engine(TOY))
    if asked is not None:
        monkeypatch.setenv(WIDTH_ENV, asked)
    assert made_ready(max_num_seqs).width() == width


@pytest.mark.parametrize("asked", ["0", "-3", "many", "", "1.5", " 4"])
def test_a_wrong_number_of_running_branches(
    monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry, asked: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        running_branches(asked, 100)
    assert str(caught.value) == f"{WIDTH_ENV}: {asked!r} is not a number of branches, as in 64"
    monkeypatch.setattr(routes, "VllmEngine", lambda client, top_k: Engine(TOY))
    monkeypatch.setenv(WIDTH_ENV, asked)
    with pytest.raises(ConfigError, match=WIDTH_ENV):
        made_ready()


def test_events_are_recorded_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry, tmp_path: Path
) -> None:
    monkeypatch.setattr(routes, "VllmEngine", lambda client, top_k: Engine(TOY))
    assert made_ready().sink is None
    registry.unregister(next(iter(registry._collector_to_names)))
    path = tmp_path / "drafter.jsonl"
    monkeypatch.setenv(EVENTS_ENV, str(path))
    sink = made_ready().sink
    assert sink is not None
    sink({"call": "x"})
    wait_until(lambda: path.exists() and path.read_text(encoding="utf-8").count("\n") == 2)
    header, record = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (header["side"], header["name"], record) == ("drafter", "small", {"call": "x"})
    sink.__self__.close()  # type: ignore[attr-defined]


def test_a_peer_that_takes_no_close_frame_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    monkeypatch.setattr(routes, "CLOSE_DEADLINE_S", 0.01)
    transport = asyncio.selector_events._SelectorTransport  # type: ignore[attr-defined]
    abort, aborted = transport.abort, []

    def aborting(self: asyncio.Transport) -> None:
        aborted.append(self)
        abort(self)

    async def hanging(self: object, code: int, reason: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(transport, "abort", aborting)
    monkeypatch.setattr(routes.WebSocket, "close", hanging)

    async def scenario() -> None:
        async with drafter() as (url, _), connected(url) as peer:
            await peer.send_bytes(b"garbage")
            await until(lambda: aborted)

    asyncio.run(scenario())
