"""Section 6: what travels, and who is served."""

import asyncio
import logging
import os
from collections.abc import Iterator
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from conftest import LogLines
from pools import pool_of, up
from prometheus_client import CollectorRegistry
from readme import section
from test_routes import client, drafter, hello
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, limits, toy, wait_until

from vllm_wanspec.cli import launch
from vllm_wanspec.config import EVENTS_ENV, HOST_ENV, TOKEN_ENV, WIDTH_ENV
from vllm_wanspec.core.drafter import Action, DrafterSession, StartBranch, StopBranch
from vllm_wanspec.core.messages import MAX_CONTEXT_TOKENS, Commit, Nodes, Open, Welcome
from vllm_wanspec.core.wire import decode, encode
from vllm_wanspec.drafter import routes
from vllm_wanspec.drafter.environment import FRONT_END
from vllm_wanspec.drafter.routes import WanspecRoutes
from vllm_wanspec.drafter.tokens import Tokens
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.sim.engine import Engine

TOY = toy(seed=3)
GUESSES = 40


class PlayedSession:
    """A drafter's session with its engine, whose target commits after every fifth engine step."""

    def __init__(self, **more: object) -> None:
        self.context = [1, 2, 3]
        opened = Open(1, tuple(self.context), limits(24, 512, **more))
        self._session = DrafterSession(opened, vocab_size=VOCAB_SIZE, max_context=10**6)
        self._branches: dict[int, tuple[list[int], int]] = {}
        self.sent: list[Nodes] = []
        self.drafted = 0
        self._do(self._session.start(0.0))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartBranch():
                    self._branches[action.branch] = list(action.tokens), len(action.tokens) + action.max_tokens
                case StopBranch():
                    self._branches.pop(action.branch, None)
                case Nodes():
                    self.sent.append(action)

    def _engine_step(self) -> None:
        for branch in list(self._branches):
            if branch not in self._branches:
                continue
            tokens, longest = self._branches[branch]
            step = TOY.step(tokens)
            tokens.append(step.token)
            before = len(self.sent)
            self._do(self._session.drafted(branch, [step], 0.0))
            self.drafted += len(self.sent) - before  # without branching a step is a node, if it is used
            if branch in self._branches and len(tokens) == longest:
                del self._branches[branch]
                self._do(self._session.ended(branch, 0.0))

    @property
    def last_id(self) -> int:
        return self._session.tree.last_id

    def run(self, commits: int) -> "PlayedSession":
        for _ in range(commits):
            for _ in range(5):
                self._engine_step()
            draft = [node.token for node in self._session.tree.best_path(4)]
            tokens, position = TOY.verify(self.context, draft), len(self.context)
            self.context += tokens
            self._do(self._session.committed(Commit(1, position, tuple(tokens)), 0.0))
        return self


def test_a_node_takes_a_few_bytes() -> None:
    """With ids as a real vocabulary has them, of 17 bits."""
    tree = {"max_branches": 4, "running_branches": 16, "entropy_threshold_nats": 1.0, "min_probability": 0.02}
    size = count = 0
    for message in PlayedSession(**tree).run(100).sent:
        nodes = tuple(node._replace(token=node.token * 2654435761 % 128_000) for node in message.nodes)
        size += len(encode([Nodes(message.session, message.seen, nodes)]))
        count += len(nodes)
    assert size / count <= 12.0  # a message of two or three nodes has some bytes of its own


def test_committed_tokens_are_not_sent_back() -> None:
    played = PlayedSession().run(100)
    sent = [node.id for message in played.sent for node in message.nodes]
    assert len(sent) == len(set(sent)) == played.drafted  # no more than the engine gave
    assert len(sent) < played.last_id  # what was committed beside the tree has its nodes all the same


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (WIDTH_ENV, EVENTS_ENV, TOKEN_ENV):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(HOST_ENV, FRONT_END)
    monkeypatch.setattr(routes, "VllmEngine", lambda engine_client, top_k: Engine(TOY))
    monkeypatch.setattr(routes, "REGISTRY", CollectorRegistry())


@pytest.fixture
def said() -> Iterator[LogLines]:
    """What the drafter logs."""
    handler, logger = LogLines(), logging.getLogger("vllm.wanspec")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_a_foreign_origin_is_refused(environment: None) -> None:
    async def scenario() -> None:
        async with drafter() as (url, _), aiohttp.ClientSession() as http:
            try:
                async with http.ws_connect(url, headers={"Origin": "https://elsewhere.example"}) as peer:
                    answer = await hello(peer)
            except aiohttp.WSServerHandshakeError as error:
                answer = error
            assert not isinstance(answer, Welcome)

    asyncio.run(scenario())


async def guess(count: int) -> int:
    """How many of so many wrong tokens from one address are simply told to be wrong, within 5 s."""
    told = 0
    async with drafter() as (url, _), aiohttp.ClientSession() as http:
        try:
            async with asyncio.timeout(5.0):
                for number in range(count):
                    try:
                        await http.ws_connect(url, headers={"Authorization": f"Bearer guess{number}"})
                    except aiohttp.WSServerHandshakeError as error:
                        told += error.status == 401
                    except aiohttp.ClientError:
                        continue
        except TimeoutError:
            return told
    return told


def test_guesses_are_slowed_down(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "secret")
    assert asyncio.run(guess(GUESSES)) < GUESSES


def test_guesses_do_not_fill_the_log(environment: None, monkeypatch: pytest.MonkeyPatch, said: LogLines) -> None:
    monkeypatch.setenv(TOKEN_ENV, "secret")
    told = asyncio.run(guess(GUESSES))
    assert told
    assert 1 <= len(said.lines()) <= GUESSES // 4


def test_an_old_and_a_new_token_can_be_good_at_the_same_time() -> None:
    forms = [f"new{separator}old" for separator in (",", ", ", " ", ";", "\n")]
    assert any(Tokens.of(form).client(b"Bearer new") and Tokens.of(form).client(b"Bearer old") for form in forms)


def test_a_drafter_without_a_token_says_that_everybody_is_served(environment: None, said: LogLines) -> None:
    try:
        asyncio.run(WanspecRoutes().init_state(client(), SimpleNamespace(), None))
    except WanspecError as error:
        assert TOKEN_ENV in str(error)
        return
    assert [line for line in said.warnings() if TOKEN_ENV in line]


def test_the_recipe_closes_the_rest_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a key for vLLM's own routes, in the recipe or given by `wanspec drafter` itself."""
    calls: list[tuple] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setenv(TOKEN_ENV, "secret")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    launch.become_vllm_serve(["model", "--host", "0.0.0.0"], routes=True)
    [(_, command, environment)] = calls
    recipe = section("Two machines").split("On the target's machine")[0]
    closed = ["--api-key" in recipe, "VLLM_API_KEY" in recipe, "--api-key" in command, "VLLM_API_KEY" in environment]
    assert any(closed)


def test_a_long_open_lets_other_sessions_speak() -> None:
    bytes_before: list[int] = []

    async def counting(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode([Welcome(1, "toy", VOCAB_SIZE, FINGERPRINT, 8, 4096, MAX_CONTEXT_TOKENS)]))
        received = 0
        async for frame in socket:
            if any(isinstance(message, Commit) for message in decode(frame.data)):
                bytes_before.append(received)
            received += len(frame.data)
        return socket

    with DrafterServer(TOY) as server:
        server.handler = counting
        with pool_of(server.url) as pool:
            wait_until(lambda: up(pool))
            [link] = pool.links
            link.send(Open(1, (1, 2, 3), limits()))
            link.send(Open(2, (40_000,) * 128_000, limits()))
            link.send(Commit(1, 3, (4,)))
            link.flush()
            wait_until(lambda: bytes_before)
    assert bytes_before[0] <= 64 * 1024
