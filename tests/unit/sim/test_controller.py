"""Streams without a target: what they commit, on a toy drafter on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from toys import FINGERPRINT, DrafterServer, draft_model, limits, toy, wait_until

from vllm_wanspec.core.flat import FlatTree
from vllm_wanspec.core.messages import Close
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.sim.controller import (
    DrafterClient,
    DrafterError,
    DraftTokenizer,
    Stream,
    Tally,
    draw_commit,
    keep_committing,
)


def with_client(scenario: Callable[[DrafterClient], Coroutine[Any, Any, None]], token: str | None = None) -> None:
    """Run a scenario on a connection to a toy drafter."""

    async def run(url: str) -> None:
        async with asyncio.timeout(20.0), aiohttp.ClientSession() as http:
            async with DrafterClient.connect(http, url, FINGERPRINT, token) as client:
                await scenario(client)

    with DrafterServer(toy(), token=token) as server:
        asyncio.run(run(server.url))
        wait_until(lambda: server.sessions == 0)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_stream_commits_what_was_drafted() -> None:
    async def scenario(client: DrafterClient) -> None:
        stream = await client.open((1, 2, 3), limits(lookahead=12), Random(0))
        await until(lambda: stream.lead == 12)
        assert stream.drafted == 12
        assert await stream.commit(5) == 5
        assert stream.length == 8
        await until(lambda: stream.lead == 12)
        assert stream.drafted == 17
        assert client.tally.committed == 5
        assert client.tally.received_bytes > 0
        await stream.close()

    with_client(scenario)


def test_without_a_draft_nothing_is_committed() -> None:
    async def scenario(client: DrafterClient) -> None:
        stream = Stream(client, 9, (1, 2), Random(0))
        assert await stream.commit(5) == 0
        assert (stream.length, stream.lead, stream.drafted) == (2, 0, 0)

    with_client(scenario)


def test_streams_are_committed_at_regular_times_to_their_end() -> None:
    async def scenario(client: DrafterClient) -> None:
        stream = await client.open((1, 2, 3), limits(lookahead=16, max_branches=4, running_branches=4), Random(1))
        await keep_committing(stream, interval_s=0.001, most=3, longest_lead=8, longest=60)
        assert stream.length + stream.lead >= 60
        assert client.broken is None

    with_client(scenario)


def test_a_draft_far_ahead_is_followed() -> None:
    async def scenario(client: DrafterClient) -> None:
        stream = await client.open((1, 2, 3), limits(lookahead=40), Random(1))
        await until(lambda: stream.lead == 40)
        task = asyncio.create_task(keep_committing(stream, 0.001, most=1, longest_lead=10, longest=10_000))
        await until(lambda: stream.length > 3)
        assert stream.length >= 3 + 30
        task.cancel()

    with_client(scenario)


def test_only_extended_tokens_are_drawn() -> None:
    tree = FlatTree(4, vocab_size=10, max_nodes=64)
    tree.append(
        [
            NodeRecord(1, 0, 5, -0.7, 1.0),
            NodeRecord(2, 0, 6, -1.2, 1.0),  # extended by 4
            NodeRecord(3, 0, 7, -1.3, 1.0),  # a leaf
            NodeRecord(4, 2, 8, -0.1, 0.2),
        ]
    )
    rng = Random(3)
    drawn = [tuple(draw_commit(tree, 2, rng)) for _ in range(200)]
    assert set(drawn) == {(5,), (6, 8)}
    assert 40 <= drawn.count((6, 8)) <= 110  # 0.30 / (0.30 + 0.50) of them
    assert draw_commit(tree, 0, rng) == []


def test_another_vocabulary_is_refused() -> None:
    async def run(url: str) -> None:
        async with aiohttp.ClientSession() as http:
            with pytest.raises(DrafterError, match="maps ids to other tokens"):
                async with DrafterClient.connect(http, url, "0" * 64):
                    raise AssertionError("was welcomed")
            with pytest.raises(DrafterError, match="no drafter there"):
                async with DrafterClient.connect(http, url + "/nothing", FINGERPRINT):
                    raise AssertionError("was welcomed")

    with DrafterServer(toy()) as server:
        asyncio.run(run(server.url))


def test_a_rejected_session_breaks_the_connection() -> None:
    async def run(url: str) -> None:
        async with asyncio.timeout(20.0), aiohttp.ClientSession() as http:
            async with DrafterClient.connect(http, url, FINGERPRINT) as client:
                await client.open([1] * 200, limits(), Random(0))
                await until(lambda: client.broken)
                with pytest.raises(DrafterError, match="session 1 rejected: too_long"):
                    await client.send()

    with DrafterServer(toy(), model=draft_model(max_context=100)) as server:
        asyncio.run(run(server.url))


def test_a_connection_that_ends_while_something_is_sent_is_broken() -> None:
    class Closing:
        async def send_bytes(self, data: bytes) -> None:
            raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    socket: Any = Closing()
    welcome: Any = None
    client = DrafterClient(socket, welcome, Tally())
    for _ in range(2):
        with pytest.raises(DrafterError, match="connection broke: Cannot write to closing transport"):
            asyncio.run(client.send(Close(1)))


def test_a_tokenizer_must_be_there(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        DraftTokenizer.load(tmp_path)
