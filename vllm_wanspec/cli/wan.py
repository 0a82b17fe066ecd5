"""``wanspec wan``: run the WAN proxy, and change it over HTTP while it runs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
from random import Random
from typing import Annotated, Any

import typer
from aiohttp import web

from vllm_wanspec.emulate.wan import WanProxy, precise_loop
from vllm_wanspec.emulate.wan_settings import Address, Outage, WanSettings
from vllm_wanspec.errors import ConfigError

__all__ = ["control_app", "parse_address", "parse_outage", "wan"]

_COUNTERS = (
    "bytes_up",
    "bytes_down",
    "in_flight_bytes",
    "segments_lost",
    "connections_open",
    "connections_total",
    "connections_failed",
    "elapsed_s",
)


def wan(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Accept connections here; port 0 picks a free one.")],
    to: Annotated[str, typer.Option(metavar="HOST:PORT", help="Forward them there.")],
    rtt_ms: Annotated[float, typer.Option(help="Round trip, milliseconds; half of it in each direction.")],
    jitter_ms: Annotated[float, typer.Option(help="Extra delay per direction, uniform from 0 to this.")] = 0.0,
    loss: Annotated[
        float, typer.Option(help="Probability that a segment is lost, 0 to 0.5; TCP repeats it, which costs delay.")
    ] = 0.0,
    bandwidth_mbit: Annotated[
        float | None, typer.Option(help="Megabits per second in each direction.", show_default="no limit")
    ] = None,
    outage: Annotated[
        list[str] | None,
        typer.Option(metavar="START:DURATION", help="Nothing passes then; seconds since the start. Repeatable."),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve GET and PATCH /settings, GET /counters and DELETE /connections here, without a login.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the jitter and the losses.")] = 0,
) -> None:
    """Emulate a WAN in front of a TCP server: delay, jitter, losses, bandwidth, outages."""
    try:
        settings = WanSettings(rtt_ms, jitter_ms, bandwidth_mbit, tuple(map(parse_outage, outage or ())), loss)
        target = parse_address("--to", to, lowest_port=1)
        proxy = WanProxy(target, settings, rng=Random(seed), listen=parse_address("--listen", listen))
        control_address = parse_address("--control", control) if control else None
        with asyncio.Runner(loop_factory=precise_loop) as runner:
            runner.run(_serve(proxy, control_address))
    except ConfigError as error:
        typer.echo(f"wanspec wan: {error}", err=True)
        raise typer.Exit(2) from None


def parse_address(option: str, text: str, *, lowest_port: int = 0) -> Address:
    """Return the address in ``HOST:PORT`` (an IPv6 host in brackets); ConfigError names the option."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not (colon and host and port.isascii() and port.isdigit()) or (":" in host and not bracketed):
        raise ConfigError(f"{option}: {text!r} is not HOST:PORT")
    if not lowest_port <= int(port) <= 65535:
        raise ConfigError(f"{option}: port {port} is not from {lowest_port} to 65535")
    return Address(host, int(port))


def parse_outage(text: str) -> Outage:
    """Return the outage in ``START:DURATION``, both in seconds; ConfigError tells what is wrong."""
    start, _, duration = text.partition(":")
    try:
        return Outage(float(start), float(duration))
    except ValueError:
        raise ConfigError(f"--outage: {text!r} is not START:DURATION in seconds") from None


def control_app(proxy: WanProxy) -> web.Application:
    """Return the control API of a running proxy.

    ``GET /settings``; ``PATCH /settings`` with a JSON object of any of the fields, answered by all of them, or by 400
    and ``{"error": ...}``, in which case nothing changed; ``GET /counters``; ``DELETE /connections``, which resets all
    of them.  It has no login: serve it on loopback.
    """

    async def get_settings(_: web.Request) -> web.Response:
        return web.json_response(dataclasses.asdict(proxy.settings))

    async def patch_settings(request: web.Request) -> web.Response:
        try:
            proxy.update(**_json_object(await request.read()))
        except ConfigError as error:
            return web.json_response({"error": str(error)}, status=400)
        return await get_settings(request)

    async def get_counters(_: web.Request) -> web.Response:
        return web.json_response({name: getattr(proxy, name) for name in _COUNTERS})

    async def delete_connections(request: web.Request) -> web.Response:
        proxy.drop_connections()
        return await get_counters(request)

    app = web.Application()
    app.add_routes([web.get("/settings", get_settings), web.patch("/settings", patch_settings)])
    app.add_routes([web.get("/counters", get_counters), web.delete("/connections", delete_connections)])
    return app


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError("the body is not a JSON object")
    return value


async def _serve(proxy: WanProxy, control: Address | None) -> None:
    """Run the proxy until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(control_app(proxy), access_log=None)
    try:
        async with proxy:
            line = f"wan proxy: listening on {proxy.address} → {proxy.target}, R = {proxy.settings.rtt_ms:g} ms"
            if control is not None:
                line += f"; control http://{await _serve_control(runner, control)}"
            print(line, flush=True)
            await stop.wait()
            print(f"wan proxy: stopped; {proxy.bytes_up} bytes up, {proxy.bytes_down} down", flush=True)
    finally:
        await runner.cleanup()


async def _serve_control(runner: web.AppRunner, control: Address) -> Address:
    await runner.setup()
    try:
        await web.TCPSite(runner, *control).start()
    except OSError as error:
        raise ConfigError(f"cannot listen on {control}: {error.strerror or error}") from error
    return Address(*runner.addresses[0][:2])
