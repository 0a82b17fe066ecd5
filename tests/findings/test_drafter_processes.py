"""Section 5 where a drafter is several processes: the host in the engine's, several front ends."""

import asyncio
import os
import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from played_loop import now_s, played
from prometheus_client import CollectorRegistry
from test_inside import PROMPT, TOY, PlayedCore, opened, settings
from test_routes import client
from toys import FINGERPRINT

from vllm_wanspec.config import EVENTS_ENV, HOST_ENV, TOKEN_ENV, WIDTH_ENV
from vllm_wanspec.controller import engine
from vllm_wanspec.core.messages import Hello, Nodes
from vllm_wanspec.core.wire import decode, encode
from vllm_wanspec.drafter import inside, routes
from vllm_wanspec.drafter.environment import FRONT_END
from vllm_wanspec.drafter.gate import EngineGate
from vllm_wanspec.drafter.host import DEFAULT_RUNNING_BRANCHES, HostStats
from vllm_wanspec.drafter.ports import serve
from vllm_wanspec.drafter.routes import WanspecRoutes
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.sim.engine import Engine

HELLO = encode([Hello(1, FINGERPRINT, "test")])


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (WIDTH_ENV, EVENTS_ENV, TOKEN_ENV):
        monkeypatch.delenv(name, raising=False)


class BusyEngine:
    """vLLM's busy loop: all calls that wait are handled, then comes a step. Notes how old frames are when taken."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._calls: list[tuple[str, tuple[Any, ...], asyncio.Future[Any]]] = []
        self.engine_core = SimpleNamespace(call_utility_async=self._call)
        self.ages_s: list[float] = []

    async def _call(self, name: str, *arguments: Any) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.append((name, arguments, answer))
        return await answer

    async def run(self) -> None:
        while True:
            calls, self._calls = self._calls, []
            for name, arguments, answer in calls:
                if name == "wanspec_poll":
                    self._calls.append((name, arguments, answer))
                    continue
                self.ages_s += [now_s() - float(frame) for frame in frames_in(arguments)]
                if not answer.done():
                    answer.set_result([None, True, [], list(HostStats())] if name == "wanspec_receive" else None)
            await asyncio.sleep(self._step_s)


def frames_in(arguments: Any) -> list[bytes]:
    """The frames among a call's arguments, alone or in lists."""
    if isinstance(arguments, bytes):
        return [arguments]
    return [frame for item in arguments for frame in frames_in(item)] if isinstance(arguments, list | tuple) else []


def test_frames_reach_the_engine_within_a_few_steps() -> None:
    inbox: asyncio.Queue[bytes] = asyncio.Queue()

    async def arrivals() -> Any:
        while True:
            yield await inbox.get()

    async def unread(frame: bytes) -> None:
        pass

    async def committing() -> None:
        for _ in range(100 * 16):  # each stream's commit every 40 ms, for 4 s
            await asyncio.sleep(0.04 / 16)
            inbox.put_nowait(b"%.6f" % now_s())

    async def scenario() -> None:
        engine = BusyEngine(step_s=0.01)
        tasks = [asyncio.create_task(engine.run())]
        tasks.append(asyncio.create_task(serve(EngineGate(engine).port(), arrivals(), unread)))
        await committing()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert max(engine.ages_s) < 0.1

    played(scenario())


def made_ready(monkeypatch: pytest.MonkeyPatch, processes: int) -> int:
    """Places of all of a server's front ends together; they are made ready one after the other, as by vLLM."""
    monkeypatch.setenv(HOST_ENV, FRONT_END)
    monkeypatch.setattr(routes, "VllmEngine", lambda engine_client, top_k: Engine(TOY))
    places = 0
    for rank in range(processes):
        monkeypatch.setattr(routes, "REGISTRY", CollectorRegistry())
        engine_client = client()
        engine_client.vllm_config.parallel_config._api_process_count = processes
        engine_client.vllm_config.parallel_config._api_process_rank = rank
        state = SimpleNamespace()
        asyncio.run(WanspecRoutes().init_state(engine_client, state, SimpleNamespace(api_server_count=processes)))
        places += state.wanspec_port().connection._host.width()
    return places


def test_two_front_ends_do_not_double_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        places = made_ready(monkeypatch, processes=2)
    except WanspecError:
        return
    assert places <= DEFAULT_RUNNING_BRANCHES


SCRAPED = """
import asyncio, os, sys
from types import SimpleNamespace
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from test_routes import client
from toys import toy
from vllm_wanspec.sim.engine import Engine
from vllm_wanspec.drafter import routes
from vllm_wanspec.errors import WanspecError

routes.VllmEngine = lambda engine_client, top_k: Engine(toy(9))
engine_client = client()
engine_client.vllm_config.parallel_config._api_process_count = 2
engine_client.vllm_config.parallel_config._api_process_rank = 0
try:
    ready = routes.WanspecRoutes().init_state(engine_client, SimpleNamespace(), SimpleNamespace(api_server_count=2))
    asyncio.run(ready)
except WanspecError as error:
    print("refused:", error)
    sys.exit()
registry = CollectorRegistry()  # what vLLM's /metrics shows of several processes
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_a_scrape_of_several_front_ends_has_our_metrics(tmp_path: Path) -> None:
    variables = {
        **os.environ,
        HOST_ENV: FRONT_END,
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRAPED], env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:") or "wanspec_sessions" in done.stdout, done.stdout


def test_the_seams_of_the_host_in_the_engine_are_in_the_ledger() -> None:
    wraps = [*engine.LEDGER, *getattr(inside, "LEDGER", ())]
    targets = " ".join(wrap.target for wrap in wraps)
    assert [seam for seam in ("step_fn", "add_request", "abort_requests") if f"EngineCore.{seam}" not in targets] == []


@pytest.mark.vllm
@pytest.mark.parametrize("seam", ["step_fn", "add_request", "abort_requests", "request_block_hasher"])
def test_a_missing_seam_is_named_at_start(seam: str) -> None:
    complete = PlayedCore()
    names = ("step_fn", "add_request", "abort_requests", "request_block_hasher")
    core = SimpleNamespace(**{name: getattr(complete, name) for name in names if name != seam})
    said = "nothing"
    try:
        inside.wanspec_setup(core, settings())
    except WanspecError as error:
        said = str(error)
    except AttributeError as error:
        said = f"a traceback: {error!r}"
    assert seam in said
    assert "traceback" not in said


def hosted(core: PlayedCore, *controllers: int) -> None:
    """Sessions of some controllers on a played core, one each."""
    inside.wanspec_setup(core, settings())
    for number in controllers:
        inside.wanspec_connect(core, "front", number)
        inside.wanspec_receive(core, "front", number, HELLO)
        inside.wanspec_receive(core, "front", number, encode([opened(1, lookahead=60, tokens=(*PROMPT, number))]))


@pytest.mark.vllm
def test_what_vllm_says_of_our_requests_does_not_reach_its_output_thread() -> None:
    core = PlayedCore()
    core.output_queue = queue.SimpleQueue()  # type: ignore[attr-defined]
    hosted(core, 1)
    [request] = core.requests.values()
    core.output_queue.put_nowait((request.client_index, SimpleNamespace()))  # type: ignore[attr-defined]
    assert request.client_index >= 0 or core.output_queue.empty()  # type: ignore[attr-defined]


@pytest.mark.vllm
def test_a_bad_output_ends_only_its_own_session() -> None:
    class OnceBad(PlayedCore):
        def _output(self, request: Any) -> Any:
            output = super()._output(request)
            if request.request_id == bad:
                output.new_logprobs = None
            return output

    bad = ""
    core = OnceBad()
    hosted(core, 1, 2)
    core.step_fn()
    bad = next(iter(core.requests))
    core.step_fn()
    core.step_fn()
    connections = [c for c in core.wanspec._host.connections if c.sessions]  # type: ignore[attr-defined]
    assert len(connections) == 1
    sent = [message for frame in connections[0].frames() for message in decode(frame)]
    assert sum(len(message.nodes) for message in sent if isinstance(message, Nodes)) > 0
