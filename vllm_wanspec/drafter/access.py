"""The drafter's door: who may use its route, and vLLM's other routes on the same port."""

import json
import os
from collections.abc import Iterable, MutableMapping
from contextlib import suppress
from typing import Any, NamedTuple

from vllm_wanspec.core.messages import PATH
from vllm_wanspec.drafter.attempts import Attempts, RefusalLog
from vllm_wanspec.drafter.environment import API_KEY_ENV, other_routes_open
from vllm_wanspec.drafter.tokens import Tokens, TokenSource, token_source
from vllm_wanspec.text import printable

Scope = MutableMapping[str, Any]
"""What ASGI tells of a request."""
FORBIDDEN, UNAUTHORIZED, TOO_MANY = 403, 401, 429
NO_TOKEN = "wrong or missing bearer token"
OPEN_PATHS = frozenset({PATH, "/health", "/ping", "/metrics", "/metrics/"})
"""Ours, which has its own door, and what tells no text: whether the server lives, and counts."""


class Refusal(NamedTuple):
    """Why somebody is not let in, and the HTTP status that says so."""

    status: int
    reason: str


class Door:
    """Judges by bearer token who comes in; wrong ones are answered late, and counted in the log."""

    def __init__(self, tokens: TokenSource | None, keys: Iterable[str] = (), *, routes_open: bool = False) -> None:
        """Ask for tokens.

        Args:
            tokens: Those that are good; None asks nobody.
            keys: Of vLLM's API; they open its routes as well, which vLLM guards by them.
            routes_open: Whether vLLM's other routes are as vLLM has them.
        """
        self._tokens = tokens
        self._keys = Tokens({str(number): key for number, key in enumerate(keys)})
        self._attempts = Attempts()
        self._log = RefusalLog()
        self.guards_routes = tokens is not None and not routes_open

    @classmethod
    def of_environment(cls, api_keys: Iterable[str] | None = None) -> "Door":
        """The door that the environment asks for; ``api_keys``: what ``--api-key`` gives.

        Raises:
            ConfigError: A variable is wrong.
        """
        keys = [key for key in (api_keys or [os.environ.get(API_KEY_ENV, "")]) if key]
        return cls(token_source(os.environ), keys, routes_open=other_routes_open(os.environ))

    async def controller(self, scope: Scope) -> str | Refusal:
        """Judge who asks for our route: the client's name, empty where nobody is asked for a token, or a refusal."""
        who = f"controller at {peer(scope)}"
        if _header(scope, b"origin") is not None:
            # No controller sends one. A browser always does, whatever page it shows, and can reach what its user can.
            return self._refuse(who, Refusal(FORBIDDEN, "an Origin header, as browsers send it for a page"))
        if self._tokens is None:
            return ""
        return await self._judged(scope, who, [self._tokens()])

    async def caller(self, scope: Scope) -> Refusal | None:
        """Judge who asks for another route."""
        if self._tokens is None or not self.guards_routes:
            return None
        who = f"request from {peer(scope)} for {printable(str(scope['path']), 80)}"
        verdict = await self._judged(scope, who, [self._tokens(), self._keys])
        return verdict if isinstance(verdict, Refusal) else None

    async def _judged(self, scope: Scope, who: str, good: list[Tokens]) -> str | Refusal:
        host = _host(scope)
        if self._attempts.crowded(host):
            return self._refuse(who, Refusal(TOO_MANY, "too many wrong bearer tokens from there"))
        header = _header(scope, b"authorization")
        names = [tokens.client(header) for tokens in good]
        for name in names:
            if name is not None:
                return name
        refusal = self._refuse(who, Refusal(UNAUTHORIZED, NO_TOKEN))
        await self._attempts.failed(host)
        return refusal

    def _refuse(self, who: str, refusal: Refusal) -> Refusal:
        self._log.note(who, refusal.reason)
        return refusal


class Guard:
    """ASGI middleware: all routes but `OPEN_PATHS` want a token."""

    def __init__(self, app: Any, door: Door) -> None:
        """Stand before ``app``."""
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] in {"http", "websocket"} and _path(scope) not in OPEN_PATHS:
            refusal = await self._door.caller(scope)
            if refusal is not None:
                await _answer(scope, send, refusal)
                return
        await self._app(scope, receive, send)


async def _answer(scope: Scope, send: Any, refusal: Refusal) -> None:
    if scope["type"] == "websocket":
        with suppress(OSError):  # it may not have waited for the answer
            await send({"type": "websocket.close", "code": 1008})  # before the handshake ends: HTTP 403
        return
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": refusal.reason}).encode()})


def peer(scope: Scope) -> str:
    """The other end's address, for a log line; a proxy on this machine may have written it."""
    client = scope.get("client")
    return printable(f"{client[0]}:{client[1]}", 80) if client else "unknown address"


def _host(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _header(scope: Scope, name: bytes) -> bytes | None:
    """A header as it came; the first, where there are several."""
    return next((value for key, value in scope["headers"] if key.lower() == name), None)


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path") or "")
