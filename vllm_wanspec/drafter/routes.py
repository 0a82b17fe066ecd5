"""The vLLM endpoint plugin: the drafter's WebSocket route on a vLLM server."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse

from vllm_wanspec.config import EVENTS_ENV, HOST_ENV, TOKEN_ENV, WIDTH_ENV
from vllm_wanspec.core.messages import PATH, vocabulary_fingerprint
from vllm_wanspec.core.vocabulary import Tokens
from vllm_wanspec.drafter.access import Door, Guard, Refusal, peer
from vllm_wanspec.drafter.drain import GRACE_S, before_shutdown
from vllm_wanspec.drafter.engines import VllmEngine
from vllm_wanspec.drafter.environment import (
    ENGINE,
    capacity_tokens,
    check_environment,
    check_one_front_end,
    check_reach,
    host_place,
    running_branches,
)
from vllm_wanspec.drafter.gate import EngineGate
from vllm_wanspec.drafter.host import DraftModel, StreamingHost
from vllm_wanspec.drafter.metrics import HostCollector
from vllm_wanspec.drafter.ports import LocalPort, serve
from vllm_wanspec.drafter.startup import alternatives
from vllm_wanspec.drafter.tokens import asks_nobody
from vllm_wanspec.errors import ConfigError, RemoteProtocolError
from vllm_wanspec.eventlog import EventLog
from vllm_wanspec.text import printable

logger = logging.getLogger("vllm.wanspec.drafter")

WARM_UP_TOKENS = 4
GOING_AWAY, PROTOCOL_ERROR = 1001, 1002
CLOSE_DEADLINE_S = 1.0
"""For a close frame to get away."""


class WanspecRoutes:
    """Adds `/wanspec/v1` to a vLLM server whose model can generate; loaded when ``VLLM_PLUGINS`` names ``wanspec``."""

    name = "wanspec"
    required_tasks = ("generate",)
    _app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the route; ends the server with one line and status 2 where its environment is wrong."""
        args = getattr(app.state, "args", None)
        try:
            check_environment(os.environ)
            app.state.wanspec_door = Door.of_environment(getattr(args, "api_key", None))
        except ConfigError as error:
            _end(error)
        _check_reach(args)
        app.add_api_websocket_route(PATH, serve_controller)
        self._app = app

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Get ready before the server reports that it is: the first request with log-probabilities compiles.

        Raises:
            ConfigError: The server is several processes.
            UnsupportedError: vLLM lacks what a drafter needs.
        """
        _check_reach(args)
        self._guard_other_routes()
        check_one_front_end(engine_client.vllm_config.parallel_config)
        config = engine_client.vllm_config.model_config
        vocabulary = engine_client.get_tokenizer().get_vocab()
        places = running_branches(os.environ.get(WIDTH_ENV), engine_client.vllm_config.scheduler_config.max_num_seqs)
        model = DraftModel(
            name=str(config.model),
            fingerprint=vocabulary_fingerprint(vocabulary),
            vocab_size=min(max(vocabulary.values()) + 1, config.get_vocab_size()),
            max_context=config.max_model_len - 1,
            tokens=Tokens.of(vocabulary).by_id,
        )
        capacity = capacity_tokens(engine_client.vllm_config)
        top_k = alternatives(config.max_logprobs)
        engine = VllmEngine(engine_client, top_k)
        events = os.environ.get(EVENTS_ENV)
        if host_place(os.environ.get(HOST_ENV), engine_client.vllm_config.parallel_config.data_parallel_size) == ENGINE:
            gate = EngineGate(engine_client)
            settings = {"model": asdict(model), "running_branches": places, "capacity_tokens": capacity}
            await gate.setup({**settings, "events": events, "top_k": top_k})
            state.wanspec_port, stats, drain = gate.port, lambda: gate.stats, gate.drain
        else:
            log = EventLog(events, "drafter", model.name) if events else None
            sink = log.record if log else None
            host = StreamingHost(engine, model, running_branches=places, capacity_tokens=capacity, sink=sink)
            state.wanspec_port, stats, drain = partial(LocalPort, host), host.stats, host.let_go
        before_shutdown(engine_client, drain, getattr(engine_client.vllm_config, "shutdown_timeout", 0) or GRACE_S)
        REGISTRY.register(HostCollector(stats))
        if asks_nobody(os.environ):
            said = "is none" if TOKEN_ENV in os.environ else "is not set"
            logger.warning("%s %s: everybody who reaches this port is served drafts", TOKEN_ENV, said)
        async for _ in engine.draft((0,), WARM_UP_TOKENS):
            pass
        logger.info("drafter ready: %s, longest context %d tokens", config.model, config.max_model_len - 1)

    def _guard_other_routes(self) -> None:
        """Stand before all that vLLM has put before its routes by now: a token must not be guessed there either."""
        if self._app is not None and self._app.state.wanspec_door.guards_routes:
            inner = self._app.middleware_stack or self._app.build_middleware_stack()
            self._app.middleware_stack = Guard(inner, self._app.state.wanspec_door)


async def serve_controller(websocket: WebSocket) -> None:
    """Serve one controller until it goes."""
    client = await websocket.app.state.wanspec_door.controller(websocket.scope)
    if isinstance(client, Refusal):
        denial = JSONResponse({"error": client.reason}, status_code=client.status)
        with suppress(RuntimeError, WebSocketDisconnect, OSError):  # it may not have waited for the answer
            await websocket.send_denial_response(denial)
        return
    await websocket.accept()
    try:
        await serve(websocket.app.state.wanspec_port(client=client), _frames(websocket), websocket.send_bytes)
        await _close(websocket, GOING_AWAY, "")
    except RemoteProtocolError as error:
        said = printable(str(error))
        logger.warning("controller at %s dropped: %s", peer(websocket.scope), said)
        # A close frame takes 123 bytes of reason.
        await _close(websocket, PROTOCOL_ERROR, said.encode("ascii", "backslashreplace")[:100].decode())
    except (WebSocketDisconnect, RuntimeError, OSError) as error:
        logger.info("controller at %s is gone (%s)", peer(websocket.scope), type(error).__name__)


async def _frames(websocket: WebSocket) -> AsyncGenerator[bytes, None]:
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        frame = message.get("bytes")
        if frame is None:
            raise RemoteProtocolError("a text frame, where all are binary")
        yield frame


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    """Say that it is over; a peer that reads nothing is not waited for."""
    try:
        with suppress(RuntimeError, WebSocketDisconnect):
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await websocket.close(code, reason)
    except TimeoutError:
        # ASGI has no word for it; uvicorn would wait for ever until its buffer is read.
        transport = getattr(getattr(websocket._receive, "__self__", None), "transport", None)
        if transport is not None:
            transport.abort()


def _check_reach(args: Any) -> None:
    """End a server that others reach and that asks nobody for a token; ``args`` are vLLM's, where it has told them."""
    if not hasattr(args, "host"):
        return
    try:
        check_reach(args.host, getattr(args, "uds", None), os.environ)
    except ConfigError as error:
        _end(error)


def _end(error: ConfigError) -> NoReturn:
    sys.stderr.write(f"wanspec: {error}\n")
    raise SystemExit(2) from None
