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

from vllm_wanspec.config import EVENTS_ENV, HOST_ENV, TOKEN_ENV, WIDTH_ENV
from vllm_wanspec.drafter import routes
from vllm_wanspec.drafter.environment import running_branches
from vllm_wanspec.drafter.routes import WanspecRoutes, authorized
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.sim.engine import Engine

WRONG_TOKENS = {
    "empty": ("", "is empty"),
    "blanks": ("  ", "is empty"),
    "line end": ("secret\n", "line end"),
    "line end of Windows": ("secret\r\n", "line end"),
    "blank behind": ("secret ", "blank"),
    "not ASCII": ("secrét", "ASCII"),
    "control character": ("secret\x1b", "control character"),
}
wrong_tokens = pytest.mark.parametrize(("token", "what"), WRONG_TOKENS.values(), ids=WRONG_TOKENS.keys())


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (TOKEN_ENV, WIDTH_ENV, EVENTS_ENV, HOST_ENV):
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


@pytest.mark.parametrize(("name", "value"), [(WIDTH_ENV, "many"), (HOST_ENV, "moon")])
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


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer x"])
def test_an_empty_token_lets_nobody_in(header: str | None) -> None:
    assert not authorized(header, "")


@pytest.mark.parametrize("asked", ["010", "٣", "9" * 5000, "²", "1_0", "+1"])
def test_odd_numbers_of_branches(asked: str) -> None:
    with pytest.raises(ConfigError, match="is not a number of branches, as in 64") as caught:
        running_branches(asked, 100)
    assert len(str(caught.value)) < 200


EVIL = "\x1b[2J\nERROR nobody €€€€" * 40


@pytest.mark.parametrize("header", ["wrong", EVIL.replace("\n", " ")])
def test_where_a_refused_controller_says_that_it_is(
    monkeypatch: pytest.MonkeyPatch, log: LogLines, header: str
) -> None:
    """uvicorn takes the address from X-Forwarded-For, where a proxy on this machine has set it."""
    monkeypatch.setenv(TOKEN_ENV, "secret")
    peer = SimpleNamespace(host=EVIL, port=0)
    said: list[object] = []

    async def deny(response: object) -> None:
        said.append(response)

    websocket = SimpleNamespace(headers={"authorization": header}, client=peer, send_denial_response=deny)
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
