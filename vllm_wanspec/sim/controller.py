"""The controller without a target: a connection to a drafter, whose sessions are committed by a clock.

The sessions are the real ones over a real WebSocket.  What they commit is drawn from the draft itself, with the draft
model's own probabilities, so that the drafter's tree lives on and its calibration stays true.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import aiohttp

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.flat import FlatTree
from vllm_wanspec.core.messages import (
    PATH,
    PROTOCOL_VERSION,
    Hello,
    Limits,
    Message,
    Nodes,
    Refuse,
    Reject,
    Welcome,
    vocabulary_fingerprint,
)
from vllm_wanspec.core.turnaround import Turnaround
from vllm_wanspec.core.wire import MAX_DRAFTERS_BYTES, Sender, decode, encode, frames
from vllm_wanspec.errors import ConfigError, RemoteProtocolError, WanspecError

__all__ = [
    "DraftTokenizer",
    "DrafterClient",
    "DrafterError",
    "Stream",
    "Tally",
    "draw_commit",
    "keep_committing",
    "playing",
]

GREETING_TIMEOUT_S = 20.0


class DrafterError(WanspecError):
    """A drafter cannot be reached, refuses, or has ended a connection or a session."""


@dataclass(frozen=True, slots=True)
class DraftTokenizer:
    """What a controller must know of the draft model's tokenizer."""

    fingerprint: str
    encode: Callable[[str], list[int]]

    @classmethod
    def load(cls, model: Path) -> DraftTokenizer:
        """Read it from a model's folder.

        Raises:
            ConfigError: There is none, or the ``tokenizers`` package is missing.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ConfigError("the package tokenizers is missing; it comes with vLLM") from None
        path = model / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path} is missing: not a model's folder with a tokenizer")
        tokenizer = Tokenizer.from_file(str(path))
        fingerprint = vocabulary_fingerprint(tokenizer.get_vocab())
        return cls(fingerprint, lambda text: list(tokenizer.encode(text).ids))


@contextlib.asynccontextmanager
async def playing(play: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Let something go on while the block runs; what had ended it before is raised at the block's end."""
    task = asyncio.create_task(play)
    try:
        yield
        if task.done():
            await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass(slots=True)
class Tally:
    """What connections have received, bytes, and what their sessions have committed, tokens."""

    received_bytes: int = 0
    committed: int = 0


class DrafterClient:
    """One connection to a drafter, and the sessions on it.

    Attributes:
        welcome: The drafter's answer.
        tally: Counts; several connections may share one.
        broken: What ended the connection; None while it lives.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, welcome: Welcome, tally: Tally) -> None:
        """Use a connection that was welcomed; see `connect`."""
        self.welcome = welcome
        self.tally = tally
        self.broken: Exception | None = None
        self._socket = socket
        self._streams: dict[int, Stream] = {}
        self._last_number = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        http: aiohttp.ClientSession,
        url: str,
        fingerprint: str,
        token: str | None = None,
        tally: Tally | None = None,
    ) -> AsyncIterator[DrafterClient]:
        """Connect to the drafter at a base URL, and read from it until the block ends; see `Hello` for the fingerprint.

        Raises:
            DrafterError: It cannot be reached or refuses.
        """
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                socket = await http.ws_connect(url + PATH, headers=headers, max_msg_size=MAX_DRAFTERS_BYTES, compress=0)
                await socket.send_bytes(encode([Hello(PROTOCOL_VERSION, fingerprint, "wanspec-bench")]))
                [answer] = decode(await socket.receive_bytes(), Sender.DRAFTER)
        except (aiohttp.ClientError, OSError, TimeoutError, TypeError, ValueError, RemoteProtocolError) as error:
            raise DrafterError(f"{url}: no drafter there: {error or type(error).__name__}") from error
        if not isinstance(answer, Welcome):
            await socket.close()
            raise DrafterError(f"{url}: refused: {answer.reason if isinstance(answer, Refuse) else answer}")
        client = cls(socket, answer, tally or Tally())
        try:
            async with playing(client._read()):
                yield client
        finally:
            await socket.close()

    async def open(
        self,
        context: Sequence[int],
        limits: Limits,
        rng: Random,
        watch: Callable[[Nodes, float], None] | None = None,
    ) -> Stream:
        """Open a session whose commits are drawn with ``rng``; ``watch`` is told of nodes and when they came."""
        self._last_number += 1
        stream = Stream(self, self._last_number, context, rng, watch)
        self._streams[self._last_number] = stream
        await self.send(stream.opening(limits, self.welcome))
        return stream

    async def send(self, *messages: Message) -> None:
        """Send messages, in one frame where they fit.

        Raises:
            DrafterError: The connection is broken.
        """
        self.check_alive()
        try:
            for frame in frames(messages):
                await self._socket.send_bytes(frame)
        except (aiohttp.ClientError, OSError) as error:  # it ends just now: the reader has not seen it yet
            self.broken = self.broken or error
            self.check_alive()

    def check_alive(self) -> None:
        """Raise DrafterError if the connection is broken."""
        if self.broken is not None:
            raise DrafterError(f"the drafter's connection broke: {self.broken}") from self.broken

    def forget(self, number: int) -> None:
        """A session was closed: what still arrives for it is nobody's."""
        self._streams.pop(number, None)

    async def _read(self) -> None:
        try:
            async for frame in self._socket:
                if frame.type is not aiohttp.WSMsgType.BINARY:
                    break
                self.tally.received_bytes += len(frame.data)
                now = time.monotonic()
                for message in decode(frame.data, Sender.DRAFTER):
                    if isinstance(message, Nodes | Reject) and message.session in self._streams:
                        self._streams[message.session].receive(message, now)
            self.broken = DrafterError("closed by the drafter")
        except (aiohttp.ClientError, OSError, RemoteProtocolError, DrafterError) as error:
            self.broken = error


class Stream:
    """One session that is committed from outside."""

    def __init__(
        self,
        client: DrafterClient,
        number: int,
        context: Sequence[int],
        rng: Random,
        watch: Callable[[Nodes, float], None] | None = None,
    ) -> None:
        """Begin with a context; `DrafterClient.open` does."""
        self._watch = watch
        self._client = client
        self._number = number
        self._session = ControllerSession(context, Shared())
        self._rng = rng
        self._start = self._session.length

    @property
    def length(self) -> int:
        """Tokens of committed context."""
        return self._session.length

    @property
    def lead(self) -> int:
        """Tokens of the most probable path that wait for a commit."""
        tree = self._session.tree
        return 0 if tree is None else max(0, tree.line[1] - len(tree.pending))

    @property
    def drafted(self) -> int:
        """Tokens of the text drafted so far: those committed and those ahead of them."""
        return self.length - self._start + self.lead

    def opening(self, limits: Limits, welcome: Welcome) -> Message:
        """The message that opens the session."""
        return self._session.open(
            self._number, limits, time.monotonic(), vocab_size=welcome.vocab_size, turnaround=Turnaround()
        )

    def receive(self, message: Nodes | Reject, now: float) -> None:
        """Take what the drafter sent.

        Raises:
            DrafterError: It has rejected the session.
            RemoteProtocolError: No correct drafter sends that.
        """
        if self._watch is not None and isinstance(message, Nodes):
            self._watch(message, now)
        self._session.receive(message, now)
        if isinstance(message, Reject):
            raise DrafterError(f"session {self._number} rejected: {message.code}")

    async def commit(self, most: int) -> int:
        """Commit up to ``most`` tokens of the draft; returns how many."""
        tree = self._session.tree
        tokens = draw_commit(tree, most, self._rng) if tree is not None and not tree.pending else []
        message = self._session.commit(tokens, time.monotonic()) if tokens else None
        if message is not None:
            await self._client.send(message)
        self._client.tally.committed += len(tokens)
        return len(tokens)

    async def close(self) -> None:
        """End the session."""
        message = self._session.close(time.monotonic())
        self._client.forget(self._number)
        if message is not None:
            await self._client.send(message)


def draw_commit(tree: FlatTree, most: int, rng: Random) -> list[int]:
    """Draw at most ``most`` tokens of a tree among those that are extended already, by their probabilities.

    The most probable one may always be drawn; where nothing else is extended it is certain.
    """
    tokens: list[int] = []
    below = tree.below()
    while below and len(tokens) < most:
        extended = [(node, token, logprob) for node, token, logprob, best in below if best or tree.below(node)]
        weights = [math.exp(logprob) for _, _, logprob in extended]
        node, token, _ = rng.choices(extended, weights)[0] if len(extended) > 1 else extended[0]
        tokens.append(token)
        below = tree.below(node)
    return tokens


async def keep_committing(stream: Stream, interval_s: float, most: int, longest_lead: int, longest: int) -> None:
    """Commit at regular times, until the text, drafts included, is ``longest`` tokens long.

    Args:
        stream: The session.
        interval_s: Between two commits: the step time of the target that is played.
        most: Tokens of a commit ...
        longest_lead: ... but for a draft that is further ahead than this: then all that is beyond, so that the drafter
            never rests because its lookahead is used up.
        longest: Tokens.
    """
    due_s = time.monotonic()
    while stream.length + stream.lead < longest:
        due_s = max(due_s + interval_s, time.monotonic())
        await asyncio.sleep(due_s - time.monotonic())
        await stream.commit(max(most, stream.lead - longest_lead))
