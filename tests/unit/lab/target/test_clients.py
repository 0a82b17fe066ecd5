"""Clients in closed loops, with a client that takes a second per token."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from vllm_wanspec.lab.harness.client import ClientError, Completion
from vllm_wanspec.lab.target.clients import Text, serve_clients


class Target:
    """Answers with the prompt's last token, one per second of its own clock; all requests go on together.

    Attributes:
        now_s: The clock.
        running: Requests that have not ended.
        most: The highest number of those.
    """

    def __init__(self) -> None:
        self.now_s = 100.0
        self.running = self.most = 0
        self.cancelled = 0

    def clock(self) -> float:
        return self.now_s

    async def complete(self, prompt: Sequence[int], max_tokens: int) -> Completion:
        if prompt[-1] == 99:
            raise ClientError("refused")
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(3600.0 if prompt[-1] == 98 else 0.0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        self.now_s += max_tokens
        pieces = tuple((1000.0 * (number + 1), 1) for number in range(max_tokens))
        ids = (prompt[-1],) * max_tokens
        return Completion(tuple(prompt), ids, "", 1000.0, 1000.0 * max_tokens, "length", pieces)


def text(token: int, tokens: int = 2) -> Text:
    return Text(f"t{token}", (1, token), (token,) * tokens)


def serve(target: Any, requests: Sequence[Sequence[Text]], answers: list[int]) -> Any:
    return asyncio.run(serve_clients(target, requests, lambda: answers.append(1), target.clock))


def test_each_client_sends_one_request_after_the_other() -> None:
    target, answered = Target(), list[int]()
    (served,) = serve(target, [[text(5), text(6, 3)]], answered)
    assert [(one.name, done.token_ids) for one, done in served.answers] == [("t5", (5, 5)), ("t6", (6, 6, 6))]
    # The second request is sent at 102 s, when the first has ended.
    assert served.pieces == [(101.0, 1), (102.0, 1), (103.0, 1), (104.0, 1), (105.0, 1)]
    assert (target.most, len(answered)) == (1, 2)


def test_all_clients_are_served_at_once() -> None:
    target = Target()
    served = serve(target, [[text(5)], [text(6), text(7)], [text(8)]], [])
    assert target.most == 3
    assert [[one.name for one, _ in client.answers] for client in served] == [["t5"], ["t6", "t7"], ["t8"]]


def test_a_failed_request_ends_the_others() -> None:
    target = Target()
    with pytest.raises(ClientError, match="refused"):
        serve(target, [[text(98)], [text(5), text(99)]], [])
    assert (target.cancelled, target.running) == (1, 0)
