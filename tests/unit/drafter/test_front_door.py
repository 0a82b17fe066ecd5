"""What the drafter says of its environment at start, and of controllers in its log."""

import asyncio
from types import SimpleNamespace

import aiohttp
import msgpack
import pytest
from conftest import LogLines
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from test_routes import TOY, client, connected, drafter, hello

from vllm_wanspec.config import EVENTS_ENV, HOST_ENV, OTHER_ROUTES_ENV, TOKEN_ENV, TOKEN_FILE_ENV, WIDTH_ENV
from vllm_wanspec.drafter import attempts, routes
from vllm_wanspec.drafter.environment import running_branches
from vllm_wanspec.drafter.routes import WanspecRoutes
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.sim.engine import Engine

WRONG_TOKENS = {
    "empty": ("", "is empty"),
    "blanks": ("  ", "is empty"),
    "none of several": ("secret,none", "the word none"),
    "a name alone": ("eu:", "no token behind it"),
    "not ASCII": ("secrét", "ASCII"),
    "control character": ("secret\x1b", "control character"),
}
wrong_tokens = pytest.mark.parametrize(("token", "what"), WRONG_TOKENS.values(), ids=WRONG_TOKENS.keys())


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (TOKEN_ENV, TOKEN_FILE_ENV, OTHER_ROUTES_ENV, WIDTH_ENV, EVENTS_ENV, HOST_ENV):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(routes, "REGISTRY", CollectorRegistry())
    monkeypatch.setattr(routes, "VllmEngine", lambda client, top_k: Engine(TOY))


def started() -> None:
    asyncio.run(WanspecRoutes().init_state(client(), SimpleNamespace(), None))


@wrong_tokens
def test_a_token_that_cannot_be_right_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token: str, what: str
) -> None:
    monkeypatch.setenv(TOKEN_ENV, token)
    with pytest.raises(SystemExit) as caught:
        WanspecRoutes().attach_router(FastAPI())
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wanspec: the environment variable {TOKEN_ENV} ")
    assert what in line
    assert "secr" not in line


@pytest.mark.parametrize(("name", "value"), [(WIDTH_ENV, "many"), (HOST_ENV, "moon"), (OTHER_ROUTES_ENV, "ajar")])
def test_other_wrong_variables_end_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        WanspecRoutes().attach_router(FastAPI())
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wanspec: {name}: {value!r} ")


def test_without_a_token_it_says_that_everybody_is_served(log: LogLines) -> None:
    started()
    [line] = log.warnings()
    assert f"{TOKEN_ENV} is not set" in line
    assert "everybody" in line


def test_with_a_token_it_says_nothing_of_it(log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "secret")
    started()
    assert log.warnings() == []
    assert not any("secret" in line for line in log.lines())


ALL_INTERFACES = [
    SimpleNamespace(host=None, uds=None),
    SimpleNamespace(host="0.0.0.0"),
    SimpleNamespace(host="10.0.0.1"),
]
ONE_MACHINE = [
    SimpleNamespace(host="127.0.0.1", uds=None),
    SimpleNamespace(host="localhost"),
    SimpleNamespace(host="::1"),
    SimpleNamespace(host=None, uds="/run/drafter.sock"),
]


@pytest.mark.parametrize("args", ALL_INTERFACES, ids=str)
def test_without_a_token_nobody_else_is_served(capsys: pytest.CaptureFixture[str], args: SimpleNamespace) -> None:
    """Where vLLM tells us its arguments with the application, and where only later."""
    app = FastAPI()
    app.state.args = args
    with pytest.raises(SystemExit) as early:
        WanspecRoutes().attach_router(app)
    with pytest.raises(SystemExit) as late:
        asyncio.run(WanspecRoutes().init_state(client(), SimpleNamespace(), args))
    assert (early.value.code, late.value.code) == (2, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"wanspec: {TOKEN_ENV} is not set, and the drafter would listen on ")
        assert (args.host or "all interfaces") in line
        assert "--host 127.0.0.1" in line
        assert f"{TOKEN_ENV}=none" in line


@pytest.mark.parametrize(
    ("args", "variables"),
    [
        *((args, {}) for args in ONE_MACHINE),
        (ALL_INTERFACES[0], {TOKEN_ENV: "secret"}),
        (ALL_INTERFACES[0], {TOKEN_ENV: "none"}),
    ],
    ids=str,
)
def test_who_is_asked_or_is_on_this_machine_is_served(
    monkeypatch: pytest.MonkeyPatch, args: SimpleNamespace, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    app = FastAPI()
    app.state.args = args
    WanspecRoutes().attach_router(app)
    asyncio.run(WanspecRoutes().init_state(client(), SimpleNamespace(), args))


def test_that_everybody_is_meant_to_be_served_is_said_too(log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "none")
    started()
    [line] = log.warnings()
    assert line == f"{TOKEN_ENV} is none: everybody who reaches this port is served drafts"


@pytest.mark.parametrize("asked", ["010", "٣", "9" * 5000, "²", "1_0", "+1"])
def test_odd_numbers_of_branches(asked: str) -> None:
    with pytest.raises(ConfigError, match="is not a number of branches, as in 64") as caught:
        running_branches(asked, 100)
    assert len(str(caught.value)) < 200


EVIL = "\x1b[2J\nERROR nobody €€€€" * 40


def test_where_a_refused_controller_says_that_it_is(monkeypatch: pytest.MonkeyPatch, log: LogLines) -> None:
    """uvicorn takes the address from X-Forwarded-For, where a proxy on this machine has set it; it may be gone."""
    monkeypatch.setenv(TOKEN_ENV, "secret")
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 0.0)
    app = FastAPI()
    WanspecRoutes().attach_router(app)
    said: list[object] = []

    async def deny(response: object) -> None:
        said.append(response)
        raise OSError("gone")

    scope = {"headers": [(b"authorization", EVIL.encode())], "client": (EVIL, 0)}
    websocket = SimpleNamespace(app=app, scope=scope, send_denial_response=deny)
    asyncio.run(routes.serve_controller(websocket))  # type: ignore[arg-type]
    assert len(said) == 1
    [line] = log.warnings()
    assert line.isprintable()
    assert len(line) < 400


def test_a_controller_that_breaks_the_protocol_in_long_words(log: LogLines) -> None:
    """The reason goes back to it in a close frame, which takes 123 bytes."""
    frame = msgpack.packb([[8, "€" * 40, "", ""]])

    async def scenario() -> None:
        async with drafter() as (url, _), connected(url) as peer:
            await hello(peer)
            await peer.send_bytes(frame)
            message = await peer.receive(timeout=5.0)
            assert message.type is aiohttp.WSMsgType.CLOSE
            assert message.data == 1002

    asyncio.run(scenario())
    [line] = [line for line in log.warnings() if "dropped" in line]
    assert line.isprintable()
    assert not [record for record in log.records if record.exc_info]
