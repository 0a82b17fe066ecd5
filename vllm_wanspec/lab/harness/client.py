"""A streaming client of ``/v1/completions`` that times tokens and compares them as ids.

Works against any vLLM server, with or without WANSpec.  Every wait is bounded.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from vllm_wanspec.errors import WanspecError

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 120.0
TOP_LOGPROBS = 20
#: How many of a model's most probable tokens `ranks` looks at.
RANKS = 8
TOKEN_ID_PREFIX = "token_id:"
#: Two log-probabilities this close are a floating-point tie (design, section 2).
TIE_NATS = 1e-3


class ClientError(WanspecError):
    """A completion request failed: refused, broken off, too slow, or answered with something else."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion.

    Args:
        prompt_ids: Token ids of the prompt, as the server tokenized it.
        token_ids: Generated token ids.
        text: Generated text.
        ttft_ms: Milliseconds from sending the request to the first token.
        last_ms: Milliseconds from sending the request to the last token.
        finish_reason: ``length``, ``stop``, or None if the server gave none.
        pieces: Milliseconds from sending the request and number of tokens, of each piece that had any.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    ttft_ms: float
    last_ms: float
    finish_reason: str | None
    pieces: tuple[tuple[float, int], ...] = ()

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds per token after the first; None with fewer than two tokens."""
        if len(self.token_ids) < 2:
            return None
        return (self.last_ms - self.ttft_ms) / (len(self.token_ids) - 1)

    def time_ms(self, tokens: int) -> float:
        """Return the milliseconds from the first token to the ``tokens``-th one, as the pieces came."""
        arrivals_ms = [at_ms for at_ms, count in self.pieces for _ in range(count)][:tokens]
        return arrivals_ms[-1] - arrivals_ms[0] if arrivals_ms else 0.0


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Return the first position at which two token lists differ (the shorter's end counts), or None."""
    pairs = itertools.zip_longest(left, right)
    return next((position for position, (a, b) in enumerate(pairs) if a != b), None)


class CompletionClient:
    """Sends completion requests to one server.

    Args:
        http: Open aiohttp session.
        base_url: The server's base URL, without ``/v1``.
        model: Model name to ask for.
        timeout_s: Longest time one request may take.
        clock: Monotonic seconds.
        fields: What every request has besides, such as ``vllm_xargs``.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        base_url: str,
        model: str,
        timeout_s: float = REQUEST_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        self._http = http
        self._url = base_url.rstrip("/") + "/v1/completions"
        self._model = model
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._timeout_s = timeout_s
        self._clock = clock
        self._fields = dict(fields or {})

    async def complete(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        ignore_eos: bool = False,
        extra: dict[str, Any] | None = None,
        on_text: Callable[[str, int], None] = lambda text, tokens: None,
    ) -> Completion:
        """Generate from a prompt, streaming.

        Args:
            prompt: Text or token ids.
            max_tokens: Tokens to generate at most.
            temperature: 0 is greedy.
            ignore_eos: Go on past the end-of-sequence token.
            extra: More fields of the request, such as ``seed`` or ``vllm_xargs``.
            on_text: Called with each piece of text and the number of tokens in it, as it arrives.

        Raises:
            ClientError: The request failed; the message names the server and the reason.
        """
        body = {
            "model": self._model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "ignore_eos": ignore_eos,
            "return_token_ids": True,
            "stream": True,
        } | (extra or {})
        gathered = _Gathered()
        sent_s = self._clock()
        async for event in self._events(body):
            now_ms = (self._clock() - sent_s) * 1000.0
            text, tokens = gathered.add(event, now_ms)
            if tokens or text:
                on_text(text, tokens)
        return gathered.completion(self._url)

    async def next_logprobs(self, context_ids: Sequence[int]) -> dict[int, float]:
        """Return the log-probabilities (nats) of the 20 most probable next tokens after a context.

        Raises:
            ClientError: The request failed.
        """
        answer = await self._answer(context_ids, logprobs=TOP_LOGPROBS, return_tokens_as_token_ids=True)
        try:
            top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            return {int(key.removeprefix(TOKEN_ID_PREFIX)): float(value) for key, value in top.items()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ClientError(f"{self._url}: the answer has no log-probabilities by token id") from error

    async def ranks(self, prompt_ids: Sequence[int], following: Sequence[int]) -> tuple[int | None, ...]:
        """Return each following token's rank after what comes before it, from 0; None outside the best eight.

        Raises:
            ClientError: The request failed.
        """
        answer = await self._answer([*prompt_ids, *following], prompt_logprobs=RANKS)
        try:
            return read_ranks(answer["choices"][0]["prompt_logprobs"][len(prompt_ids) :], following)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ClientError(f"{self._url}: the answer has no ranks of the prompt's tokens") from error

    async def is_tie(
        self, prompt_ids: Sequence[int], plain_ids: Sequence[int], other_ids: Sequence[int], position: int
    ) -> bool:
        """Whether two texts after one prompt part at a floating-point tie.

        Asked of the plain target: both tokens at ``position`` must be among the 20 most probable ones and within
        1e-3 nats there.  A text that simply ends earlier is no tie.

        Raises:
            ClientError: The request failed.
        """
        if position >= min(len(plain_ids), len(other_ids)):
            return False
        logprobs = await self.next_logprobs([*prompt_ids, *plain_ids[:position]])
        first, second = (logprobs.get(ids[position], -math.inf) for ids in (plain_ids, other_ids))
        return math.isfinite(first) and math.isfinite(second) and abs(first - second) <= TIE_NATS

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the JSON objects of the server-sent events."""
        async with self._posted(body) as response:
            async for data in _sse_data(response):
                if data == b"[DONE]":
                    return
                yield self._parse(data)
        raise ClientError(f"{self._url}: the stream broke off before [DONE]")

    async def _answer(self, prompt_ids: Sequence[int], **asked: Any) -> dict[str, Any]:
        """Ask for one token after a prompt, and for what else is to be told of it."""
        body = {"model": self._model, "prompt": list(prompt_ids), "max_tokens": 1, "temperature": 0.0}
        async with self._posted(body | asked) as response:
            return self._parse(await response.read())

    @contextlib.asynccontextmanager
    async def _posted(self, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._http.post(self._url, json=self._fields | body, timeout=self._timeout) as response:
                if response.status != 200:
                    text = (await response.text())[:500].strip()
                    raise ClientError(f"{self._url} answered {response.status}: {_error_message(text)}")
                yield response
        except (aiohttp.ClientError, OSError) as error:
            is_late = type(error) is TimeoutError  # other kinds of it say themselves what took too long
            problem = f"no complete answer within {self._timeout_s:g} s" if is_late else error or type(error).__name__
            raise ClientError(f"{self._url}: {problem}") from error

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except ValueError as error:
            raise ClientError(f"{self._url}: the answer is not JSON: {data[:100]!r}") from error
        if not isinstance(event, dict):
            raise ClientError(f"{self._url}: the answer is not an object: {data[:100]!r}")
        if "error" in event:
            raise ClientError(f"{self._url}: {_error_message(json.dumps(event))}")
        return event


def read_ranks(entries: Sequence[dict[str, Any]], tokens: Sequence[int]) -> tuple[int | None, ...]:
    """Return each token's rank, from 0, in vLLM's ``prompt_logprobs``; None outside the most probable ones."""
    ranks = [int(entry[str(token)]["rank"]) - 1 for entry, token in zip(entries, tokens, strict=True)]
    return tuple(rank if rank < RANKS else None for rank in ranks)


class _Gathered:
    """The parts of a stream so far."""

    def __init__(self) -> None:
        self.prompt_ids: tuple[int, ...] | None = None
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.pieces: list[tuple[float, int]] = []
        self.finish_reason: str | None = None

    def add(self, event: dict[str, Any], now_ms: float) -> tuple[str, int]:
        """Take one event; return its text and number of tokens."""
        choices = event.get("choices") or []
        if not choices:
            return "", 0
        choice = choices[0]
        ids = choice.get("token_ids") or []
        text = choice.get("text") or ""
        if choice.get("prompt_token_ids") is not None:
            self.prompt_ids = tuple(choice["prompt_token_ids"])
        if ids:
            self.pieces.append((now_ms, len(ids)))
            self.token_ids.extend(ids)
        self.texts.append(text)
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return text, len(ids)

    def completion(self, url: str) -> Completion:
        if self.prompt_ids is None or not self.token_ids:
            raise ClientError(f"{url}: the stream has no token ids; is this vLLM, which knows return_token_ids?")
        return Completion(
            prompt_ids=self.prompt_ids,
            token_ids=tuple(self.token_ids),
            text="".join(self.texts),
            ttft_ms=self.pieces[0][0],
            last_ms=self.pieces[-1][0],
            finish_reason=self.finish_reason,
            pieces=tuple(self.pieces),
        )


async def _sse_data(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the payload of each ``data:`` line; lines may have any length."""
    pending = b""
    async for piece in response.content.iter_any():
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _error_message(text: str) -> str:
    """Return the message inside an OpenAI-style error object, or the text itself."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text or "no message"
