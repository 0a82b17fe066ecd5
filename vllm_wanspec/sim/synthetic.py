"""A drafter without a model: the real session host and a real WebSocket over an engine that drafts by the clock.

It runs in a process of its own (``python -m vllm_wanspec.sim.synthetic --port 8200``), so that what it costs is not
seen by whoever measures a controller. ``GET /stats`` tells how its engine kept the pace.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncGenerator

from aiohttp import WSMsgType, web

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.messages import MAX_FRAME_BYTES, PATH
from vllm_wanspec.drafter.host import DraftModel, StreamingHost
from vllm_wanspec.drafter.ports import LocalPort, serve
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.sim.language import TAIL, Language

__all__ = ["FINGERPRINT", "RUNNING_BRANCHES", "STATS_PATH", "SteppedEngine", "make_app", "synthetic_model"]

FINGERPRINT = "made-up"
HEALTH_PATH = "/health"
STATS_PATH = "/stats"
STEP_MS = 5.0
BRANCH_MS = 0.02
MAX_CONTEXT_TOKENS = 4096
RUNNING_BRANCHES = 64


class _Branch:
    """One request of the engine: the tokens that count for the next one, and what has not been fetched yet."""

    __slots__ = ("left", "ready", "tail", "wake")

    def __init__(self, tail: list[int], max_tokens: int) -> None:
        self.tail = tail
        self.left = max_tokens
        self.ready: list[DraftStep] = []
        self.wake = asyncio.Event()


class SteppedEngine:
    """A draft engine with continuous batching: every step gives each running branch one token.

    A step takes ``step_ms`` and ``branch_ms`` for each branch. Its tokens are made at its end in one go; tokens that
    a branch has not fetched by then come together, as from vLLM's front end.
    """

    def __init__(self, language: Language, step_ms: float = STEP_MS, branch_ms: float = BRANCH_MS) -> None:
        """Draft in ``language``; `run` must run beside."""
        self._language = language
        self._step_s = step_ms / 1e3
        self._branch_s = branch_ms / 1e3
        self._branches: dict[_Branch, None] = {}
        self._started = asyncio.Event()
        self.steps = 0
        self.tokens = 0
        self.busy_s = 0.0
        self.paced_s = 0.0

    async def draft(self, tokens: tuple[int, ...], max_tokens: int) -> AsyncGenerator[list[DraftStep], None]:
        """Stream the greedy continuation; see `DraftEngine`."""
        branch = _Branch(list(tokens[-TAIL:]), max_tokens)
        self._branches[branch] = None
        self._started.set()
        try:
            while branch.left or branch.ready:
                await branch.wake.wait()
                branch.wake.clear()
                steps, branch.ready = branch.ready, []
                yield steps
        finally:
            self._branches.pop(branch, None)

    async def run(self) -> None:
        """Step for ever, while there are branches."""
        loop = asyncio.get_running_loop()
        due_s = ended_s = loop.time()
        while True:
            if not self._branches:
                self._started.clear()
                await self._started.wait()
                due_s = ended_s = loop.time()
            batch = list(self._branches)
            pace_s = self._step_s + self._branch_s * len(batch)
            due_s += pace_s
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            self._advance(batch)
            now_s = loop.time()
            # Against the clock, so that late timers do not add up; but time lost by overload stays lost.
            due_s = max(due_s, now_s - self._step_s / 2)
            self.steps += 1
            self.busy_s += now_s - ended_s
            self.paced_s += pace_s
            ended_s = now_s

    def stats(self) -> dict[str, float]:
        """What was done so far; differences of two calls are what counts.

        ``busy_s`` is the time in steps, ``paced_s`` what it should have been; ``cpu_s`` is the process's.
        """
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "busy_s": self.busy_s,
            "paced_s": self.paced_s,
            "cpu_s": time.process_time(),
        }

    def _advance(self, batch: list[_Branch]) -> None:
        for branch in batch:
            if branch in self._branches and branch.left:
                step = self._language.step(branch.tail)
                branch.tail = [*branch.tail[1:], step.token]
                branch.left -= 1
                branch.ready.append(step)
                branch.wake.set()
                self.tokens += 1


def synthetic_model(language: Language) -> DraftModel:
    """What the drafter says of itself."""
    return DraftModel("made-up", FINGERPRINT, language.vocab_size, MAX_CONTEXT_TOKENS)


def make_app(host: StreamingHost, engine: SteppedEngine) -> web.Application:
    """The drafter as an application: the WebSocket, ``/health`` and ``/stats``."""

    async def health(request: web.Request) -> web.Response:
        return web.Response(text="ready")

    async def stats(request: web.Request) -> web.Response:
        return web.json_response(engine.stats())

    async def draft(request: web.Request) -> web.StreamResponse:
        return await _serve(request, host)

    app = web.Application()
    app.router.add_get(PATH, draft)
    app.router.add_get(HEALTH_PATH, health)
    app.router.add_get(STATS_PATH, stats)
    return app


async def _serve(request: web.Request, host: StreamingHost) -> web.StreamResponse:
    """One controller's connection, from handshake to end."""
    socket = web.WebSocketResponse(max_msg_size=MAX_FRAME_BYTES)
    await socket.prepare(request)
    try:
        await serve(LocalPort(host), _frames(socket), socket.send_bytes)
    except RemoteProtocolError as error:
        print(f"the controller broke the protocol: {error}", flush=True)
    finally:
        await socket.close()
    return socket


async def _frames(socket: web.WebSocketResponse) -> AsyncGenerator[bytes, None]:
    async for message in socket:
        if message.type is not WSMsgType.BINARY:
            return
        yield message.data


async def _main(port: int, running_branches: int) -> None:
    language = Language()
    engine = SteppedEngine(language)
    host = StreamingHost(engine, synthetic_model(language), running_branches=running_branches)
    runner = web.AppRunner(make_app(host, engine), shutdown_timeout=0.2)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        await engine.run()
    finally:
        await runner.cleanup()


def main() -> None:
    """Serve until a signal ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument("--running-branches", type=int, default=RUNNING_BRANCHES, help="over all sessions")
    arguments = parser.parse_args()
    asyncio.run(_main(arguments.port, arguments.running_branches))


if __name__ == "__main__":
    main()
