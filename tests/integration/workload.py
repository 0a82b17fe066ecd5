"""Requests that overlap, and the comparison of their tokens with plain vLLM's."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from vllm_wanspec.lab.harness.client import Completion, CompletionClient, first_difference

from .fleet import MODEL_NAME, Target
from .records import note

REQUEST_TIMEOUT_S = 240.0
STAGGER_TOKENS = 24
PLAIN_AT_ONCE = 8


@dataclass(frozen=True)
class Request:
    """One completion request; greedy unless ``temperature`` says otherwise, and never ended by a stop token."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass
class Run:
    """What a workload did.

    Attributes:
        completions: In the order of the requests.
        most_at_once: Most requests that were streaming at one time.
        tokens: Tokens received so far.
    """

    completions: list[Completion | None]
    most_at_once: int = 0
    tokens: int = 0
    streaming: int = 0

    def done(self) -> list[Completion]:
        finished = [completion for completion in self.completions if completion is not None]
        assert len(finished) == len(self.completions)
        return finished


def client_of(http: aiohttp.ClientSession, target: Target) -> CompletionClient:
    return CompletionClient(http, target.url, MODEL_NAME, REQUEST_TIMEOUT_S)


def vary(prompts: Sequence[tuple[int, ...]], shortest: int = 96, step: int = 8, kinds: int = 5) -> list[Request]:
    """Greedy requests for ``shortest`` tokens or more, of different lengths, so that they end at different times."""
    return [Request(prompt, shortest + step * (index % kinds)) for index, prompt in enumerate(prompts)]


async def send(client: CompletionClient, request: Request, run: Run | None = None) -> Completion:
    """Send one request; ``run`` counts its tokens as they arrive."""
    started = False

    def count(text: str, tokens: int) -> None:
        nonlocal started
        if run is not None:
            run.tokens += tokens
            run.streaming += not started
            run.most_at_once = max(run.most_at_once, run.streaming)
        started = True

    try:
        return await client.complete(
            request.prompt,
            request.max_tokens,
            temperature=request.temperature,
            ignore_eos=True,
            extra=request.extra,
            on_text=count,
        )
    finally:
        if run is not None:
            run.streaming -= started


async def run_staggered(client: CompletionClient, requests: Sequence[Request], at_once: int) -> Run:
    """Send requests, at most ``at_once`` at a time: each place starts later than the one before it."""
    run = Run([None] * len(requests))
    queue = list(enumerate(requests))

    async def place(index: int) -> None:
        while run.tokens < STAGGER_TOKENS * index:
            await asyncio.sleep(0.002)
        while queue:
            number, request = queue.pop(0)
            run.completions[number] = await send(client, request, run)

    async with asyncio.timeout(2 * REQUEST_TIMEOUT_S), asyncio.TaskGroup() as group:
        for index in range(min(at_once, len(requests))):
            group.create_task(place(index))
    return run


@dataclass
class PlainTruth:
    """What plain vLLM answers, remembered over the whole test session."""

    target: Target
    known: dict[Request, Completion] = field(default_factory=dict)

    async def answers(self, http: aiohttp.ClientSession, requests: Sequence[Request]) -> list[Completion]:
        client = client_of(http, self.target)
        places = asyncio.Semaphore(PLAIN_AT_ONCE)

        async def learn(request: Request) -> None:
            async with places:
                self.known[request] = await send(client, request)

        async with asyncio.TaskGroup() as group:
            for request in {r: None for r in requests if r not in self.known}:
                group.create_task(learn(request))
        return [self.known[request] for request in requests]

    async def check(
        self, http: aiohttp.ClientSession, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> None:
        """Fail unless each completion is token for token plain vLLM's; floating-point ties are counted and shown."""
        assert len(requests) == len(completions) > 0
        plain = await self.answers(http, [Request(r.prompt, r.max_tokens) for r in requests])
        ties = 0
        for number, (expected, got) in enumerate(zip(plain, completions, strict=True)):
            assert len(expected.token_ids) == requests[number].max_tokens, "the reference is short"
            ties += await self._follow(http, number, expected, got)
        tokens = sum(len(completion.token_ids) for completion in completions)
        print(f"{len(completions)} requests, {tokens} tokens, all plain vLLM's; ties: {ties}")
        note(requests=len(completions), tokens=tokens, ties=ties)

    async def check_as_asked(
        self, http: aiohttp.ClientSession, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[Completion]:
        """As `check`, against plain vLLM's answers to the same requests with all that they ask for; those answers.

        What follows a tie is not compared.
        """
        client = client_of(http, self.target)
        expected = await asyncio.gather(*(send(client, request) for request in requests))
        ties = 0
        for number, (right, got) in enumerate(zip(expected, completions, strict=True)):
            position = first_difference(right.token_ids, got.token_ids)
            assert position is None or await client.is_tie(
                right.prompt_ids, right.token_ids, got.token_ids, position
            ), (
                f"request {number} ({requests[number].extra}) differs from plain vLLM at token {position}: "
                f"{got.token_ids[position:][:3]} for {right.token_ids[position:][:3]}"
            )
            ties += position is not None
        tokens = sum(len(completion.token_ids) for completion in completions)
        print(f"{len(completions)} requests, {tokens} tokens, all plain vLLM's; ties: {ties}")
        note(requests=len(completions), tokens=tokens, ties=ties)
        return expected

    async def _follow(self, http: aiohttp.ClientSession, number: int, plain: Completion, got: Completion) -> int:
        """Ties of one completion; after a tie plain vLLM goes on from the other token."""
        client = client_of(http, self.target)
        expected, ties = list(plain.token_ids), 0
        while (position := first_difference(expected, got.token_ids)) is not None:
            assert await client.is_tie(plain.prompt_ids, expected, got.token_ids, position), (
                f"request {number} differs from plain vLLM at token {position}: "
                f"{got.token_ids[position : position + 3]} for {expected[position : position + 3]}"
            )
            ties += 1
            expected = list(got.token_ids[: position + 1])
            left = len(plain.token_ids) - len(expected)
            if left:
                rest = await send(client, Request((*plain.prompt_ids, *expected), left))
                expected += rest.token_ids
        return ties
