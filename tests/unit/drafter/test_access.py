"""The drafter's door: controllers at our route, and whoever asks for vLLM's other routes; on played time."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import LogLines
from fastapi import FastAPI
from played_loop import now_s, played
from starlette.middleware.cors import CORSMiddleware
from test_routes import TOY, client

from vllm_wanspec.config import EVENTS_ENV, HOST_ENV, OTHER_ROUTES_ENV, TOKEN_ENV, TOKEN_FILE_ENV, WIDTH_ENV
from vllm_wanspec.core.messages import PATH
from vllm_wanspec.drafter import attempts, routes
from vllm_wanspec.drafter.access import NO_TOKEN, Door, Guard, Refusal
from vllm_wanspec.drafter.environment import API_KEY_ENV
from vllm_wanspec.drafter.tokens import Tokens
from vllm_wanspec.sim.engine import Engine

TOKENS = Tokens.of("eu:secret, us:secret2")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (TOKEN_ENV, TOKEN_FILE_ENV, WIDTH_ENV, EVENTS_ENV, HOST_ENV, OTHER_ROUTES_ENV, API_KEY_ENV):
        monkeypatch.delenv(name, raising=False)


def scope(path: str = PATH, *, kind: str = "websocket", host: str = "192.0.2.1", **headers: str) -> dict[str, Any]:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": kind, "path": path, "headers": raw, "client": (host, 4711), "method": "POST", "query_string": b""}


def door(*, keys: tuple[str, ...] = (), **more: bool) -> Door:
    return Door(lambda: TOKENS, keys, **more)


# Controllers


def test_a_controller_is_known_by_its_token_s_name() -> None:
    async def scenario() -> None:
        assert await door().controller(scope(authorization="Bearer secret")) == "eu"
        assert await door().controller(scope(authorization="Bearer secret2")) == "us"
        assert await Door(None).controller(scope()) == ""
        assert now_s() == 0.0

    played(scenario())


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer s\u00e9cret", "\u20ac"])
def test_a_controller_without_a_good_token_waits_for_its_401(log: LogLines, header: str | None) -> None:
    async def scenario() -> None:
        asked = scope(**({} if header is None else {"authorization": header}))
        assert await door().controller(asked) == Refusal(401, NO_TOKEN)
        assert now_s() == attempts.FIRST_DELAY_S

    played(scenario())
    assert log.warnings() == [f"controller at 192.0.2.1:4711 refused: {NO_TOKEN}"]


def test_a_key_of_vllm_s_api_opens_not_our_route() -> None:
    async def scenario() -> None:
        refusal = await door(keys=("key",)).controller(scope(authorization="Bearer key"))
        assert isinstance(refusal, Refusal)

    played(scenario())


@pytest.mark.parametrize("asks", [True, False])
def test_a_browser_s_page_is_refused_whatever_token_it_has(log: LogLines, asks: bool) -> None:
    async def scenario() -> None:
        asked = scope(authorization="Bearer secret", origin="https://elsewhere.example")
        refusal = await (door() if asks else Door(None)).controller(asked)
        assert isinstance(refusal, Refusal)
        assert (refusal.status, now_s()) == (403, 0.0)

    played(scenario())
    assert "an Origin header" in log.warnings()[0]


def test_guesses_side_by_side_are_soon_not_heard_and_others_are(log: LogLines) -> None:
    async def scenario() -> None:
        one = door()
        guesses = [one.controller(scope(authorization=f"Bearer guess{number}")) for number in range(100)]
        guesses.append(one.controller(scope(authorization="Bearer secret")))  # would tell that it is right
        verdicts = await asyncio.gather(*guesses)
        said = [verdict.status for verdict in verdicts if isinstance(verdict, Refusal)]
        assert said.count(401) == attempts.MAX_HELD_PER_ADDRESS
        assert said.count(429) == 101 - attempts.MAX_HELD_PER_ADDRESS
        assert await one.controller(scope(authorization="Bearer secret", host="192.0.2.2")) == "eu"
        assert await one.controller(scope(authorization="Bearer secret")) == "eu"  # once no answer is held back

    played(scenario())
    assert len(log.warnings()) == 1


def test_what_an_address_may_hold(log: LogLines) -> None:
    async def scenario() -> None:
        await door().controller(scope(host="\x1b[2J\nERROR nobody" * 40))
        await door().controller({**scope(), "client": None})

    played(scenario())
    assert all(line.isprintable() and len(line) < 300 for line in log.warnings())
    assert "unknown address" in log.warnings()[1]


# Other routes


class Asked:
    """An application, behind the guard, that answers 200; and what was answered."""

    def __init__(self, door: Door) -> None:
        self.guard = Guard(self._app, door)
        self.sent: list[dict[str, Any]] = []

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def status(self, asked: dict[str, Any]) -> int:
        self.sent = []

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        await self.guard(asked, None, send)
        return 403 if self.sent[0]["type"] == "websocket.close" else self.sent[0]["status"]


GUARDED = ["/v1/completions", "/v1", "/invocations", "/tokenize", "/", "/docs", "/wanspec/v2", "//health", "/healthy"]


@pytest.mark.parametrize("path", GUARDED)
def test_every_other_route_wants_a_token(path: str, log: LogLines) -> None:
    async def scenario() -> None:
        asked = Asked(door(keys=("key",)))
        assert await asked.status(scope(path, kind="http")) == 401
        assert json.loads(asked.sent[1]["body"]) == {"error": NO_TOKEN}
        assert await asked.status(scope(path, kind="http", authorization="Bearer wrong")) == 401
        assert now_s() == 3.0
        for good in ("secret", "secret2", "key"):
            assert await asked.status(scope(path, kind="http", authorization=f"Bearer {good}")) == 200
        assert await asked.status(scope(path, authorization="Bearer wrong")) == 403  # a WebSocket

    played(scenario())
    assert f"request from 192.0.2.1:4711 for {path} refused: " in log.warnings()[0]


@pytest.mark.parametrize("path", ["/health", "/ping", "/metrics", "/metrics/", PATH])
def test_what_tells_no_text_stays_open(path: str) -> None:
    async def scenario() -> None:
        assert await Asked(door()).status(scope(path, kind="http")) == 200
        assert await Asked(door()).status({**scope(f"/base{path}", kind="http"), "root_path": "/base"}) == 200

    played(scenario())


def test_nothing_is_guarded_without_tokens_or_where_it_is_to_stay_open() -> None:
    async def scenario() -> None:
        for unguarded in (Door(None), door(routes_open=True)):
            assert not unguarded.guards_routes
            assert await Asked(unguarded).status(scope("/v1/completions", kind="http")) == 200
        assert await Asked(door()).status({"type": "lifespan"}) == 200

    played(scenario())


# On the server


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts what vLLM starts, as far as routes and middleware go; then it asks it for something."""
    monkeypatch.setattr(routes, "VllmEngine", lambda engine_client, top_k: Engine(TOY))
    monkeypatch.setattr(routes, "REGISTRY", SimpleNamespace(register=lambda collector: None))

    async def ask(path: str, token: str | None = None, **args: object) -> int:
        app = FastAPI()
        app.state.args = SimpleNamespace(host="127.0.0.1", **args)
        app.add_api_route("/v1/models", lambda: {}, methods=["POST"])
        app.add_api_route("/health", lambda: {}, methods=["POST"])
        plugin = routes.WanspecRoutes()
        plugin.attach_router(app)
        app.add_middleware(CORSMiddleware)
        app.middleware_stack = app.build_middleware_stack()  # as one of vLLM's own bootstraps does
        await plugin.init_state(client(), app.state, app.state.args)
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        await app(scope(path, kind="http", **headers), receive, send)
        return int(sent[0]["status"])

    return ask


def test_vllm_s_routes_want_the_drafter_s_token(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "secret, secret2")
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 0.0)

    async def scenario() -> None:
        assert await served("/v1/models") == 401
        assert await served("/v1/models", "secret2") == 200
        assert await served("/v1/models", "key") == 401
        assert await served("/v1/models", "key", api_key=["key"]) == 200
        monkeypatch.setenv(API_KEY_ENV, "key2")
        assert await served("/v1/models", "key2") == 200
        assert await served("/v1/models", "key2", api_key=["key"]) == 401  # as with vLLM, the flag counts
        assert await served("/health") == 200
        monkeypatch.setenv(OTHER_ROUTES_ENV, "open")
        assert await served("/v1/models") == 200

    asyncio.run(scenario())


def test_without_a_token_vllm_s_routes_are_as_vllm_has_them(served: Any) -> None:
    assert asyncio.run(served("/v1/models")) == 200
