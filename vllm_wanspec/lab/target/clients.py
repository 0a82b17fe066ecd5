"""Clients in closed loops: each sends one greedy request after the other, and remembers when its tokens came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_wanspec.lab.harness.client import Completion, CompletionClient

Pieces = list[tuple[float, int]]
"""When tokens came, seconds, and how many of them."""


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, and what plain vLLM makes of it."""

    name: str
    prompt_ids: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """What one client got: its answers, each beside what plain vLLM says, and when their tokens came."""

    answers: Sequence[tuple[Text, Completion]]
    pieces: Pieces


async def serve_clients(
    client: CompletionClient,
    requests: Sequence[Sequence[Text]],
    on_answer: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    **asked: Any,
) -> list[Served]:
    """Serve all clients at once, each its requests in turn.

    Args:
        client: Sends them.
        requests: Of each client.
        on_answer: Called after each of them.
        clock: Monotonic seconds.
        asked: What else is asked of `CompletionClient.complete`.

    Raises:
        ClientError: A request failed; the others are given up.
    """

    async def one(texts: Sequence[Text]) -> Served:
        answers: list[tuple[Text, Completion]] = []
        pieces: Pieces = []
        for text in texts:
            sent_s = clock()
            done = await client.complete(text.prompt_ids, len(text.expected), **asked)
            pieces += [(sent_s + at_ms / 1000.0, tokens) for at_ms, tokens in done.pieces]
            answers.append((text, done))
            on_answer()
        return Served(answers, pieces)

    tasks = [asyncio.create_task(one(texts)) for texts in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
