"""``wanspec wan``: its arguments, its control API, and the command as a process."""

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import aiohttp
import pytest
import typer
from aiohttp import web
from typer.testing import CliRunner

from vllm_wanspec.cli.wan import control_app, parse_address, parse_outage, wan
from vllm_wanspec.emulate.wan import WanProxy
from vllm_wanspec.emulate.wan_settings import Outage, WanSettings
from vllm_wanspec.errors import ConfigError

app = typer.Typer()
app.command()(wan)
ADDRESSES = ["--listen", "127.0.0.1:0", "--to", "127.0.0.1:9"]
PROCESS = [sys.executable, "-c", "import typer; from vllm_wanspec.cli.wan import wan; typer.run(wan)"]


def run(main: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30.0))


@asynccontextmanager
async def control(**settings: object) -> AsyncIterator[tuple[aiohttp.ClientSession, WanProxy]]:
    proxy = WanProxy(("127.0.0.1", 9), WanSettings().changed(**settings), rng=random.Random(7))
    runner = web.AppRunner(control_app(proxy))
    async with proxy:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        async with aiohttp.ClientSession(f"http://{host}:{port}") as client:
            yield client, proxy
        await runner.cleanup()


def test_control_api() -> None:
    change = {"rtt_ms": 12, "bandwidth_mbit": 100.0, "outages": [{"start_s": 5000, "duration_s": 1.5}], "loss": 0.25}
    changed = change | {"jitter_ms": 1.0}

    async def main() -> None:
        async with control(jitter_ms=1.0) as (client, proxy):
            assert (await (await client.get("/settings")).json())["rtt_ms"] == 0.0
            answer = await client.patch("/settings", json=change)
            assert (answer.status, await answer.json()) == (200, changed)
            assert await (await client.get("/settings")).json() == changed
            assert proxy.settings == WanSettings(12, 1.0, 100.0, (Outage(5000, 1.5),), 0.25)
            answer = await client.patch("/settings", json={"jitter_ms": 7.5})
            assert await answer.json() == changed | {"jitter_ms": 7.5}
            assert proxy.settings.jitter_ms == 7.5
            counters = await (await client.get("/counters")).json()
            assert counters.pop("elapsed_s") > 0.0
            assert "segments_lost" in counters
            assert set(counters.values()) == {0}

    run(main())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rtt_ms": -1}, "rtt_ms: -1 is not a number from 0 to 60000"),
        ({"rtt_ms": True}, "rtt_ms: True is not a number"),
        ({"rtt_ms": "20"}, "rtt_ms: '20' is not a number"),
        ({"rtt_ms": None}, "rtt_ms: None is not a number"),
        ({"jitter_ms": float("nan")}, "jitter_ms: nan is not a number"),
        ({"loss": 0.51}, "loss: 0.51 is not a number from 0 to 0.5"),
        ({"loss": -0.01}, "loss: -0.01 is not a number from 0 to 0.5"),
        ({"loss": float("nan")}, "loss: nan is not a number from 0 to 0.5"),
        ({"loss": float("inf")}, "loss: inf is not a number"),
        ({"loss": 10**400}, "loss: 1000"),
        ({"loss": "0.1"}, "loss: '0.1' is not a number"),
        ({"loss": False}, "loss: False is not a number"),
        ({"loss": None}, "loss: None is not a number"),
        ({"rtt_ms": 9, "loss": 1}, "loss: 1 is not a number"),
        ({"bandwidth_mbit": 0}, "bandwidth_mbit: 0 is not a number from 0.001"),
        ({"rtt": 5}, "rtt: no such setting; there are rtt_ms, jitter_ms, bandwidth_mbit, outages, loss"),
        ({"self": 5}, "self: no such setting"),
        ({"outages": 5}, "outages: 5 is not a list"),
        ({"outages": [[1, 2]]}, "outages: [1, 2] is not an entry of a list"),
        ({"rtt_ms": 9, "outages": [{"start_s": 1, "duration_s": -2}]}, "duration_s: -2 is not a number"),
    ],
)
def test_control_api_rejects(change: dict[str, object], message: str) -> None:
    async def main() -> None:
        async with control(rtt_ms=5.0) as (client, proxy):
            answer = await client.patch("/settings", data=json.dumps(change))
            assert answer.status == 400
            assert message in (await answer.json())["error"]
            assert proxy.settings == WanSettings(rtt_ms=5.0)

    run(main())


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"5", b"\xff\xfe", b"[" * 100_000])
def test_control_api_rejects_what_is_not_an_object(body: bytes) -> None:
    async def main() -> None:
        async with control() as (client, _):
            answer = await client.patch("/settings", data=body)
            assert answer.status == 400
            assert "the body is not" in (await answer.json())["error"]

    run(main())


def test_parse_address() -> None:
    assert parse_address("--to", "host.example:80") == ("host.example", 80)
    assert str(parse_address("--to", "[::1]:80")) == "[::1]:80"


@pytest.mark.parametrize("text", ["", ":80", "host", "host:", "host:x", "host:-1", "::1:80", "host:65536"])
def test_parse_address_rejects(text: str) -> None:
    with pytest.raises(ConfigError, match="--to: "):
        parse_address("--to", text)


def test_parse_outage() -> None:
    assert parse_outage("1.5:10") == Outage(1.5, 10.0)


@pytest.mark.parametrize("text", ["", "5", "5:", "a:b", "1:2:3", "-1:2", "nan:1"])
def test_parse_outage_rejects(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_outage(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ADDRESSES, "--rtt-ms", "-5"], "rtt_ms: -5.0 is not a number from 0 to 60000"),
        ([*ADDRESSES, "--rtt-ms", "5", "--loss", "1"], "loss: 1.0 is not a number from 0 to 0.5"),
        ([*ADDRESSES, "--rtt-ms", "5", "--outage", "soon"], "--outage: 'soon' is not START:DURATION in seconds"),
        (["--listen", "9000", "--to", "127.0.0.1:9", "--rtt-ms", "5"], "--listen: '9000' is not HOST:PORT"),
        (["--listen", "127.0.0.1:0", "--to", "127.0.0.1:0", "--rtt-ms", "5"], "--to: port 0 is not from 1 to 65535"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (2, f"wanspec wan: {message}\n")


def test_options_reach_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[WanProxy] = []

    async def serve(proxy: WanProxy, _: object) -> None:
        served.append(proxy)

    monkeypatch.setattr(sys.modules[wan.__module__], "_serve", serve)
    options = ["--rtt-ms", "5", "--jitter-ms", "2", "--loss", "0.01", "--bandwidth-mbit", "8", "--outage", "1:2"]
    assert CliRunner().invoke(app, [*ADDRESSES, *options]).exit_code == 0
    assert [proxy.settings for proxy in served] == [WanSettings(5.0, 2.0, 8.0, (Outage(1.0, 2.0),), 0.01)]


@pytest.mark.parametrize("option", ["--listen", "--control"])
def test_port_in_use(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = CliRunner().invoke(app, [*ADDRESSES, "--rtt-ms", "5", option, address])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert result.output.startswith(f"wanspec wan: cannot listen on {address}: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_process(number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        to = f"127.0.0.1:{server.getsockname()[1]}"
        options = ["--listen", "127.0.0.1:0", "--to", to, "--rtt-ms", "2.5", "--control", "127.0.0.1:0"]
        with subprocess.Popen(
            [*PROCESS, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                listening = line.removeprefix("wan proxy: listening on ").partition(" ")[0]
                assert line.startswith(
                    f"wan proxy: listening on {listening} → {to}, R = 2.5 ms; control http://127.0.0.1:"
                )
                with socket.create_connection(parse_address("", listening)) as client:
                    client.sendall(b"hello")
                    accepted, _ = server.accept()
                    with accepted:
                        assert accepted.recv(5, socket.MSG_WAITALL) == b"hello"
                        process.send_signal(number)
                        out, err = process.communicate(timeout=20)
            finally:
                process.kill()
        assert (process.returncode, out, err) == (0, "wan proxy: stopped; 5 bytes up, 0 down\n", "")
