"""DrafterLink: the WebSocket connection to one drafter, kept alive from a thread of its own.

The link connects, greets, measures the round trip and moves messages; who uses it and what the messages mean is the
pool's. Trouble on the network never raises here: it is one log line that says what is wrong and what would be right,
a counter, and another try after a back-off with jitter.
"""

import asyncio
import logging
import random
import secrets
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from math import inf
from typing import Any, Protocol, cast

import aiohttp

from vllm_wanspec.config import DraftEndpoint
from vllm_wanspec.config.tls import ClientTls
from vllm_wanspec.controller.outbox import MAX_WAITING, Outbox
from vllm_wanspec.controller.troubles import (
    Trouble,
    connect_trouble,
    handshake_trouble,
    redirect_trouble,
    via_proxy,
)
from vllm_wanspec.core.health import LinkHealth
from vllm_wanspec.core.learned.estimates import Smoothed
from vllm_wanspec.core.messages import (
    PATH,
    PROTOCOL_VERSION,
    Drain,
    Have,
    Hello,
    Message,
    Nodes,
    Open,
    Ping,
    Pong,
    Refuse,
    Reject,
    Welcome,
)
from vllm_wanspec.core.turnaround import Turnaround
from vllm_wanspec.core.vocabulary import Tokens
from vllm_wanspec.core.wire import MAX_DRAFTERS_BYTES, Sender, decode, frames, greeting
from vllm_wanspec.errors import ConfigError, RemoteProtocolError
from vllm_wanspec.text import printable, without_secret

logger = logging.getLogger("vllm.wanspec.link")

NO_TOKENS = Tokens()
FIRST_BACKOFF_S = 0.25
MAX_BACKOFF_S = 5.0
REFUSED_BACKOFF_S = 30.0
GREETING_TIMEOUT_S = 10.0
CLOSING_TIMEOUT_S = 0.5
TLS_GOODBYE_S = 0.2
PING_INTERVAL_S = 1.0
PINGS_KEPT = 15
MAX_PINGS_UNANSWERED = 64
"""So many are remembered; while none of them is answered no more are sent."""
SILENCE_LIMIT_S = 15.0
SEND_DEADLINE_S = 10.0
"""A peer that has not taken a frame of some kilobytes by then does not read."""
UNSENT_BYTES = 32 * 1024
"""So much of what was written may wait in the socket: more only delays what is more urgent."""
IDLE_AFTER_S = 1.0
"""A drafter that has drafted nothing for an open for so long and two round trips is told of commits less often..."""
IDLE_FLUSH_INTERVAL_S = 0.05
"""...at most so often: waking the link thread costs every step of the target some time."""


class LinkUser(Protocol):
    """What a link tells its user; called from the link thread."""

    def link_ready(self, link: "DrafterLink") -> None:
        """The drafter has welcomed us."""

    def link_lost(self, link: "DrafterLink") -> None:
        """The connection is gone."""

    def link_beats(self, link: "DrafterLink", unanswered: int) -> None:
        """Now and then while it lives, with the number of pings that are unanswered though two round trips are over."""

    def link_drains(self, link: "DrafterLink") -> None:
        """The drafter takes no new sessions any more."""

    def link_received(self, link: "DrafterLink", messages: list[Message]) -> None:
        """Messages for sessions; may raise RemoteProtocolError, which drops the connection."""


class DrafterLink:
    """One drafter's connection; `send` and `flush` may be called from any thread, the rest from the link's loop."""

    def __init__(
        self,
        endpoint: DraftEndpoint,
        fingerprint: str,
        user: LinkUser,
        rng: random.Random,
        tokens: Tokens = NO_TOKENS,
    ) -> None:
        """Prepare; `run` connects.

        Args:
            endpoint: Where the drafter is.
            fingerprint: Of the target's vocabulary.
            user: Who is told what happens.
            rng: For the jitter of the back-off.
            tokens: The target's, to name those that a drafter has others for.
        """
        self.endpoint = endpoint
        self.welcome: Welcome | None = None
        self.next_number = 1
        self.faults = 0
        self.sent_bytes = 0
        self.received_bytes = 0
        self.client = ""
        self.turnaround = Turnaround()
        self.health = LinkHealth()
        self.draining = False
        self._fingerprint = fingerprint
        self._tokens = tokens
        self._user = user
        self._rng = rng
        self._rtt_s = Smoothed()
        self._trips_s: deque[float] = deque(maxlen=PINGS_KEPT)
        self._pings: dict[int, float] = {}
        self._outbox = Outbox()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tls = ClientTls(endpoint.url, endpoint.tls)
        self._wake = asyncio.Event()
        self._last_trouble: Trouble | None = None
        self._token: str | None = None
        self._asked_s = inf
        self._flushed_s = 0.0

    @property
    def name(self) -> str:
        """The endpoint's name."""
        return self.endpoint.name

    @property
    def rtt_s(self) -> float:
        """Smoothed round trip in seconds; 0 before the first measurement."""
        return self._rtt_s.get(0.0)

    @property
    def median_rtt_s(self) -> float:
        """Median of the last round trips in seconds; 0 before the first.

        What waits now and then behind a busy drafter is part of `rtt_s`, and hardly of this one: it is the path's.
        """
        return statistics.median(list(self._trips_s) or [0.0])

    @property
    def encrypted(self) -> bool:
        """Whether the connection is one of TLS."""
        return self._tls.encrypted

    def send(self, message: Message) -> None:
        """Queue a message; `flush` sets it on its way. Keeps order."""
        if isinstance(message, Open):
            self._asked_s = min(self._asked_s, time.monotonic())
            self._flushed_s = 0.0
        self._outbox.put(message)

    def send_all(self, commits: Iterable[Message]) -> None:
        """Queue what sessions that have been opened go on with; as `send`."""
        self._outbox.extend(commits)

    def flush(self) -> None:
        """Wake the writer, if there is anything to send; for a drafter that drafts nothing only now and then.

        What is left behind goes with the next flush, or the next ping.
        """
        if not self._outbox or self._loop is None:
            return
        now = time.monotonic()
        idle = now - self._asked_s > IDLE_AFTER_S + 2.0 * self.rtt_s
        if not idle or now - self._flushed_s >= IDLE_FLUSH_INTERVAL_S:
            self._flushed_s = now
            self._loop.call_soon_threadsafe(self._wake.set)

    async def run(self) -> None:
        """Connect, serve the connection, and do so again for ever; ends by cancellation."""
        self._loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        watched = aiohttp.TraceConfig()
        watched.on_request_redirect.append(self._refuse_redirect)
        # A drafter that has moved to another address is found with the next attempt, not when a cache thinks so.
        connector = aiohttp.TCPConnector(use_dns_cache=False)
        async with aiohttp.ClientSession(connector=connector, trace_configs=[watched], ws_response_class=_Peer) as http:
            while True:
                try:
                    await self._connect(http)
                except Trouble as trouble:
                    unwanted = trouble.refused or trouble.fault
                    self.faults += trouble.fault
                    self._log(trouble)
                except Exception:
                    unwanted = True
                    logger.exception("drafter %s: connection lost by a fault of ours", self.name)
                if self.welcome is not None:
                    backoff_s = FIRST_BACKOFF_S
                    self.welcome = None
                    self._user.link_lost(self)
                wait_s = REFUSED_BACKOFF_S if unwanted else backoff_s
                await asyncio.sleep(wait_s * self._rng.uniform(0.5, 1.0))
                backoff_s = min(MAX_BACKOFF_S, 2.0 * backoff_s)

    async def _connect(self, http: aiohttp.ClientSession) -> None:
        """One connection from handshake to end; always ends in `Trouble`."""
        try:
            token, proxy, tls = self.endpoint.token(), self.endpoint.proxy_url(), self._tls.context()
        except ConfigError as error:
            raise Trouble(str(error)) from error
        self._token = token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                peer = cast(
                    _Peer,
                    await http.ws_connect(
                        self.endpoint.url + PATH,
                        headers=headers,
                        max_msg_size=MAX_DRAFTERS_BYTES,
                        compress=0,
                        proxy=proxy,
                        ssl=tls,
                    ),
                )
        except aiohttp.WSServerHandshakeError as error:
            raise handshake_trouble(error.status, self.endpoint, proxy) from error
        except TimeoutError as error:
            within = f"within {GREETING_TIMEOUT_S:.0f} s{via_proxy(proxy)}"
            raise Trouble(f"does not answer {within}; is its address right?") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: no host name can be that
            raise connect_trouble(error, self.endpoint, proxy) from error
        try:
            _bound_unsent(peer)
            await self._greet(peer)
            await self._serve(peer)
        except RemoteProtocolError as error:
            said = printable(str(error))
            reason = f"broke the protocol ({said}); connection dropped; run a `wanspec drafter` of our version there"
            raise Trouble(reason, fault=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Trouble(f"connection lost ({printable(str(error))})") from error
        finally:
            with suppress(TimeoutError):  # a peer that is dead does not shake hands
                async with asyncio.timeout(CLOSING_TIMEOUT_S):
                    await peer.close()
            peer.abort()

    async def _refuse_redirect(self, _: object, __: object, asked: aiohttp.TraceRequestRedirectParams) -> None:
        """Called by aiohttp before it follows."""
        asked.response.close()
        raise redirect_trouble(asked.response.status, self.endpoint, asked.response.headers.get("Location"))

    async def _greet(self, peer: aiohttp.ClientWebSocketResponse) -> None:
        began_s = time.monotonic()
        self.client = secrets.token_hex(6)  # who knows it can resume our sessions
        tokens = self._tokens
        hello = Hello(PROTOCOL_VERSION, self._fingerprint, self.client, tokens.digests, tuple(tokens.apart))
        for frame in frames([hello]):
            await self._send(peer, frame)
        try:
            answer_frame = await self._receive(peer, GREETING_TIMEOUT_S)
        except TimeoutError as error:
            raise Trouble(f"does not greet within {GREETING_TIMEOUT_S:.0f} s") from error
        _, version = greeting(answer_frame)
        if version not in (None, PROTOCOL_VERSION):
            reason = f"speaks version {version} of the protocol, this target {PROTOCOL_VERSION}; match the versions"
            raise Trouble(reason, refused=True)
        [answer] = decode(answer_frame, Sender.DRAFTER)
        if isinstance(answer, Refuse):
            wrong_vocabulary = answer.code == "vocabulary"
            right = "serve a draft model with the target's tokenizer" if wrong_vocabulary else "match the versions"
            named = f"; differing are {self._tokens.named(answer.first, answer.tokens)}" if answer.tokens else ""
            said = f"{printable(answer.code, 40)}: {printable(answer.reason)}{named}"
            raise Trouble(f"refuses us ({said}); {right}", refused=True)
        if not isinstance(answer, Welcome):
            raise RemoteProtocolError("the answer to hello is neither welcome nor refuse")
        if answer.fingerprint != self._fingerprint:
            raise RemoteProtocolError("welcomed us with another vocabulary")
        self._rtt_s, self.turnaround = Smoothed(), Turnaround()
        self._trips_s = deque(maxlen=PINGS_KEPT)
        self._took(time.monotonic() - began_s)
        self._outbox.clear()
        self._asked_s = inf
        self.draining = False
        self.health.load = answer.load / 100.0
        self.welcome = answer
        if self._last_trouble is not None and not self._last_trouble.fault:
            self._last_trouble = None
        model = without_secret(printable(answer.model), self._token)
        logger.info("drafter %s: connected, model %s, R = %.1f ms", self.name, model, 1000 * self.rtt_s)
        self._user.link_ready(self)

    async def _serve(self, peer: aiohttp.ClientWebSocketResponse) -> None:
        writer = asyncio.create_task(self._write(peer))
        pinger = asyncio.create_task(self._ping())
        reader = asyncio.create_task(self._read(peer))
        tasks = (writer, pinger, reader)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, peer: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outbox:
                for frame in frames(self._outbox.take()):
                    self.sent_bytes += len(frame)
                    await self._send(peer, frame)

    async def _send(self, peer: aiohttp.ClientWebSocketResponse, frame: bytes) -> None:
        """Send a frame, or give the connection up in good time."""
        try:
            async with asyncio.timeout(SEND_DEADLINE_S):
                await peer.send_bytes(frame)
        except TimeoutError as error:
            raise Trouble(f"does not read: a frame waited {SEND_DEADLINE_S:.0f} s; connection dropped") from error

    async def _ping(self) -> None:
        self._pings = {}
        while True:
            if self._outbox.overflows:
                raise Trouble(f"does not read: over {MAX_WAITING} messages wait; connection dropped")
            if len(self._pings) < MAX_PINGS_UNANSWERED:
                number = secrets.randbits(53)  # nobody answers it who has not read it
                self._pings[number] = time.monotonic()
                self.send(Ping(number))
            self._wake.set()
            await asyncio.sleep(PING_INTERVAL_S)
            overdue_s = time.monotonic() - 2.0 * self.rtt_s
            self._user.link_beats(self, sum(sent_s < overdue_s for sent_s in self._pings.values()))

    async def _read(self, peer: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            try:
                messages = decode(await self._receive(peer, SILENCE_LIMIT_S), Sender.DRAFTER)
            except TimeoutError as error:
                raise Trouble(f"silent for {SILENCE_LIMIT_S:.0f} s; connection dropped") from error
            now = time.monotonic()
            for message in messages:
                if isinstance(message, Pong):
                    self._answered(message, now)
                elif isinstance(message, Have):
                    self._outbox.resume(message)
                    self._wake.set()
                elif isinstance(message, Reject):
                    self._outbox.forget(message.session)
                elif isinstance(message, Drain):
                    self.draining = True
                    logger.info("drafter %s: is about to end; no new sessions there", self.name)
                    self._user.link_drains(self)
            answers: list[Message] = [message for message in messages if not isinstance(message, Pong | Have | Drain)]
            if any(map(_has_draft, answers)):
                self._asked_s = inf
            self._user.link_received(self, answers)

    def _answered(self, pong: Pong, now: float) -> None:
        """Learn from the answer to a ping.

        Raises:
            RemoteProtocolError: It answers none of ours.
        """
        sent_s = self._pings.pop(pong.number, None)
        if sent_s is None:
            raise RemoteProtocolError("a pong answers no ping, or one that has been answered")
        self._took(now - sent_s)
        self.health.load = pong.load / 100.0

    def _took(self, trip_s: float) -> None:
        self._rtt_s.add(trip_s)
        self._trips_s.append(trip_s)

    async def _receive(self, peer: aiohttp.ClientWebSocketResponse, timeout_s: float) -> bytes:
        frame = await peer.receive(timeout=timeout_s)
        if frame.type is aiohttp.WSMsgType.BINARY:
            self.received_bytes += len(frame.data)
            data: bytes = frame.data
            return data
        if frame.type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED}:
            said = printable(str(frame.extra)) if frame.extra else "no reason given"
            raise Trouble(f"closed the connection ({said})")
        raise RemoteProtocolError(f"sent a WebSocket frame of type {frame.type.name}")

    def _log(self, trouble: Trouble) -> None:
        """One line per kind of trouble, not one per attempt."""
        if str(trouble) != str(self._last_trouble):
            said = without_secret(str(trouble), self._token)  # a peer can put what we have sent it into its answer
            logger.warning("drafter %s (%s): %s; trying again, requests are served without it", *self._who(), said)
        self._last_trouble = trouble

    def _who(self) -> tuple[str, str]:
        return self.name, self.endpoint.url


def _has_draft(message: Message) -> bool:
    """Whether a drafter has drafted anything for it."""
    return isinstance(message, Nodes) and bool(message.nodes)


def _bound_unsent(peer: aiohttp.ClientWebSocketResponse) -> None:
    """Keep what cannot go yet out of the kernel, so that what is said next need not wait for it."""
    connection = peer.get_extra_info("socket")
    if connection is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


class _Peer(aiohttp.ClientWebSocketResponse):
    """A WebSocket that can be ended whether or not its peer takes what is still to be sent."""

    def __init__(
        self, reader: Any, writer: Any, protocol: Any, response: aiohttp.ClientResponse, *more: Any, **named: Any
    ):
        """As aiohttp makes it; ``response`` is that of the handshake, and knows the connection."""
        super().__init__(reader, writer, protocol, response, *more, **named)
        connection = response.connection
        self._transport = None if connection is None else connection.transport

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()


class LinkThread:
    """The one daemon thread whose event loop runs all links."""

    def __init__(self, links: list[DrafterLink]) -> None:
        """Prepare a thread for ``links``; nothing runs before `start`."""
        self._links = links
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="wanspec-links", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Close all connections; waits at most ``timeout_s`` seconds."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join(timeout_s)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._keep_all())
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            logger.debug("links stopped")
        finally:
            encrypted = any(link.encrypted for link in self._links)
            self._loop.run_until_complete(_wind_up(goodbye_s=TLS_GOODBYE_S if encrypted else 0.0))
            self._loop.close()

    async def _keep_all(self) -> None:
        """Run all links; cancelled, ends when every one of them has ended."""
        await asyncio.gather(*(link.run() for link in self._links))


async def _wind_up(*, goodbye_s: float = 0.0) -> None:
    """End what the links have left behind: a connection attempt's own tasks, transports that close one turn later.

    Args:
        goodbye_s: Time for transports that close when the peer has answered, as those of TLS do.
    """
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
    await asyncio.sleep(goodbye_s)
