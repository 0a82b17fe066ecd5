"""The vLLM endpoint plugin: the drafter's WebSocket route on a vLLM server."""

import asyncio
import hmac
import logging
import os
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse

from vllm_wanspec.config import EVENTS_ENV, TOKEN_ENV, WIDTH_ENV
from vllm_wanspec.core.messages import PATH, vocabulary_fingerprint
from vllm_wanspec.drafter.engines import VllmEngine
from vllm_wanspec.drafter.metrics import HostCollector
from vllm_wanspec.drafter.service import DEFAULT_RUNNING_BRANCHES, Connection, DraftModel, Host
from vllm_wanspec.errors import ConfigError, RemoteProtocolError
from vllm_wanspec.eventlog import EventLog

logger = logging.getLogger("vllm.wanspec.drafter")

WARM_UP_TOKENS = 4
GOING_AWAY, PROTOCOL_ERROR = 1001, 1002


class WanspecRoutes:
    """Adds `/wanspec/v1` to a vLLM server whose model can generate; loaded when ``VLLM_PLUGINS`` names ``wanspec``."""

    name = "wanspec"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.add_api_websocket_route(PATH, serve_controller)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Get ready before the server reports that it is: the first request with log-probabilities compiles."""
        engine = VllmEngine(engine_client)
        config = engine_client.vllm_config.model_config
        vocabulary = engine_client.get_tokenizer().get_vocab()
        places = running_branches(os.environ.get(WIDTH_ENV), engine_client.vllm_config.scheduler_config.max_num_seqs)
        events = os.environ.get(EVENTS_ENV)
        log = EventLog(events, "drafter", str(config.model)) if events else None
        model = DraftModel(
            name=str(config.model),
            fingerprint=vocabulary_fingerprint(vocabulary),
            vocab_size=min(max(vocabulary.values()) + 1, config.get_vocab_size()),
            max_context=config.max_model_len - 1,
        )
        state.wanspec_host = Host(engine, model, running_branches=places, sink=log.record if log else None)
        REGISTRY.register(HostCollector(state.wanspec_host))
        async for _ in engine.draft((0,), WARM_UP_TOKENS):
            pass
        logger.info("drafter ready: %s, longest context %d tokens", config.model, config.max_model_len - 1)


async def serve_controller(websocket: WebSocket) -> None:
    """Serve one controller until it goes."""
    if not authorized(websocket.headers.get("authorization"), os.environ.get(TOKEN_ENV)):
        logger.warning("controller at %s refused: wrong or missing bearer token", _peer(websocket))
        await websocket.send_denial_response(JSONResponse({"error": "wrong or missing bearer token"}, status_code=401))
        return
    await websocket.accept()
    state = websocket.app.state
    connection = Connection(state.wanspec_host, websocket.send_bytes)
    reader = asyncio.create_task(_read(websocket, connection))
    writer = asyncio.create_task(connection.write())
    try:
        done, _ = await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        await _close(websocket, GOING_AWAY, "")
    except RemoteProtocolError as error:
        logger.warning("controller at %s dropped: %s", _peer(websocket), error)
        await _close(websocket, PROTOCOL_ERROR, str(error)[:100])
    except (WebSocketDisconnect, RuntimeError, OSError) as error:
        logger.info("controller at %s is gone (%s)", _peer(websocket), type(error).__name__)
    finally:
        reader.cancel()
        writer.cancel()
        await asyncio.gather(reader, writer, return_exceptions=True)
        await connection.close()


def authorized(header: str | None, token: str | None) -> bool:
    """Whether an Authorization header carries the token; without a token everybody is welcome."""
    return not token or hmac.compare_digest((header or "").encode(), f"Bearer {token}".encode())


def running_branches(asked: str | None, max_num_seqs: int) -> int:
    """Places for running branches: as asked, or the default; never more than vLLM runs at a time.

    Raises:
        ConfigError: ``asked`` is not a positive integer.
    """
    if asked is not None and not (asked.isdecimal() and int(asked) > 0):
        raise ConfigError(f"{WIDTH_ENV}: {asked!r} is not a number of branches, as in 64")
    return min(int(asked or DEFAULT_RUNNING_BRANCHES), max_num_seqs)


async def _read(websocket: WebSocket, connection: Connection) -> None:
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        frame = message.get("bytes")
        if frame is None:
            raise RemoteProtocolError("a text frame, where all are binary")
        if not await connection.receive(frame):
            return


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    with suppress(RuntimeError, WebSocketDisconnect):
        await websocket.close(code, reason)


def _peer(websocket: WebSocket) -> str:
    return f"{websocket.client.host}:{websocket.client.port}" if websocket.client else "unknown address"
