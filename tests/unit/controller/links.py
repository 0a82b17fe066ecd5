"""What tests of `DrafterLink` share: its user, a link that runs, and drafters that answer as they are told."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import WSMsgType, web
from conftest import LogLines
from toys import FINGERPRINT, VOCAB_SIZE, toy

from vllm_wanspec.config import DraftEndpoint
from vllm_wanspec.controller.link import DrafterLink, LinkThread
from vllm_wanspec.core.messages import Message, Welcome
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.sim.service import Handler

TOY = toy(seed=2)
WELCOME = Welcome(1, "invented", VOCAB_SIZE, FINGERPRINT, 8, 64, 64)


class User:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.ready = self.lost = 0
        self.messages: list[Message] = []
        self.unanswered: list[int] = []
        self.complaint = ""

    def link_ready(self, link: DrafterLink) -> None:
        self.ready += 1

    def link_lost(self, link: DrafterLink) -> None:
        assert link.welcome is None
        self.lost += 1

    def link_beats(self, link: DrafterLink, unanswered: int) -> None:
        self.unanswered.append(unanswered)

    def link_received(self, link: DrafterLink, messages: list[Message]) -> None:
        if self.complaint:
            raise RemoteProtocolError(self.complaint)
        self.messages += messages


@contextmanager
def running(url: str, *, fingerprint: str = FINGERPRINT, **keys: object) -> Iterator[tuple]:
    """A link; ``keys`` are further ones of its endpoint."""
    user = User()
    endpoint = DraftEndpoint.model_validate({"name": "eu", "url": url, **keys})
    link = DrafterLink(endpoint, fingerprint, user, random.Random(1))
    thread = LinkThread([link])
    thread.start()
    try:
        yield link, user
    finally:
        thread.stop()
        assert not thread._thread.is_alive()


def only_warning(log: LogLines, *fragments: str) -> str:
    """The one line that is said, however often it is tried."""
    [line] = log.warnings()
    assert line.startswith("drafter eu (http://127.0.0.1:")
    for fragment in fragments:
        assert fragment in line
    return line


def answering(*frames: bytes | str, then_silent: bool = True) -> Handler:
    """A server that opens the WebSocket, sends these frames after the first it gets, and then says nothing."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        await socket.receive()
        for frame in frames:
            await (socket.send_bytes(frame) if isinstance(frame, bytes) else socket.send_str(frame))
        while then_silent and (await socket.receive()).type is WSMsgType.BINARY:
            pass
        return socket

    return handler
