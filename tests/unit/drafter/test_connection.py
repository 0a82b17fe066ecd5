"""The session host without a transport: frames in, frames out, a toy engine between."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest
from host_peer import PROMPT, TOY, Peer, opened, with_peer
from toys import FINGERPRINT, VOCAB_SIZE, draft_model

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.messages import (
    Close,
    Commit,
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
from vllm_wanspec.drafter import connection
from vllm_wanspec.drafter.admission import SESSION_IDLE_S
from vllm_wanspec.drafter.host import StreamingHost
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.sim.engine import Engine


def test_welcome() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        assert peer.received == [Welcome(1, "invented", VOCAB_SIZE, FINGERPRINT, 256, 4096, 4096)]

    with_peer(scenario)


@pytest.mark.parametrize(
    ("hello", "code"), [(Hello(1, "other", "t"), "vocabulary"), (Hello(2, FINGERPRINT, "t"), "version")]
)
def test_refusals_say_why_and_end_the_connection(hello: Hello, code: str) -> None:
    async def scenario(peer: Peer) -> None:
        assert not await peer.say(hello)
        [refuse] = peer.received
        assert isinstance(refuse, Refuse)
        assert refuse.code == code
        assert refuse.reason

    with_peer(scenario)


def test_a_session_is_drafted_up_to_its_lookahead() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1))
        await peer.settled()
        assert peer.tokens(1) == TOY.drafted(PROMPT, 8)

    with_peer(scenario)


def test_commits_go_on_and_what_is_wrong_is_corrected() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1))
        await peer.settled()
        line = TOY.drafted(PROMPT, 8)
        strange = (line[4] + 1) % VOCAB_SIZE
        await peer.say(Commit(1, 3, tuple(line[:4])), Commit(1, 7, (strange,)))
        await peer.settled()
        context = (*PROMPT, *line[:4], strange)
        assert peer.tokens(1)[-8:] == TOY.drafted(context, 8)

    with_peer(scenario)


def test_many_sessions_share_frames() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(*[opened(n, tokens=(n, 2, 3)) for n in range(1, 33)])
        await peer.settled()
        for number in range(1, 33):
            assert peer.tokens(number) == TOY.drafted((number, 2, 3), 8)
        assert peer.frames < 32

    with_peer(scenario)


def test_close_stops_the_engine() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1, lookahead=4000))
        await peer.until(lambda: len(peer.tokens(1)) > 3)
        await peer.say(Close(1))
        await peer.settled()
        assert peer.connection.sessions == 0
        assert peer.engine.running == 0  # type: ignore[attr-defined]
        await peer.say(Commit(1, 3, (4,)), Close(1))  # in flight when it was closed: nobody's fault
        count = len(peer.received)
        await peer.settled()
        assert len(peer.received) == count

    with_peer(scenario)


def test_ping_is_answered() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(Ping(12345))
        await peer.until(lambda: Pong(12345) in peer.received)

    with_peer(scenario)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (opened(1, tokens=(0,) * 21), "too_long"),
        (opened(1, tokens=(0, VOCAB_SIZE)), "vocabulary"),
    ],
)
def test_rejects_at_open(message: Open, code: str) -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(message)
        await peer.until(lambda: Reject(1, code) in peer.received)
        assert peer.connection.sessions == 0
        await peer.say(Commit(1, 3, (4,)))

    with_peer(scenario, model=draft_model(max_context=20))


def test_too_many_sessions_are_rejected_and_places_become_free() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1), opened(2), opened(3))
        await peer.until(lambda: Reject(3, "overloaded") in peer.received)
        await peer.say(Close(1), opened(4))
        await peer.settled()
        assert peer.tokens(4)

    with_peer(scenario, model=draft_model(max_sessions=2))


@pytest.mark.parametrize(("commit", "code"), [(Commit(1, 9, (1,)), "gap"), (Commit(1, 3, (VOCAB_SIZE,)), "vocabulary")])
def test_rejects_at_commit_end_the_session(commit: Commit, code: str) -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1, lookahead=4000), commit)
        await peer.until(lambda: Reject(1, code) in peer.received)
        await peer.settled()
        assert peer.connection.sessions == 0

    with_peer(scenario)


@pytest.mark.parametrize(
    "messages",
    [
        [opened(1), opened(1)],
        [opened(5), opened(4)],
        [opened(1, max_nodes=5000)],
        [Commit(1, 3, (1,))],
        [Welcome(1, "m", 1, "f", 1, 1, 1)],
        [Nodes(1, 3, ())],
        [Pong(1)],
        [Reject(1, "gap")],
        [Hello(1, FINGERPRINT, "again")],
    ],
    ids=lambda messages: f"{len(messages)} {type(messages[-1]).__name__}",
)
def test_what_no_correct_controller_sends(messages: list[Message]) -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        with pytest.raises(RemoteProtocolError):
            await peer.say(*messages)

    with_peer(scenario)


@pytest.mark.parametrize("first", [opened(1), Ping(1), Close(1)])
def test_the_first_message_must_be_hello(first: Message) -> None:
    async def scenario(peer: Peer) -> None:
        with pytest.raises(RemoteProtocolError, match="not hello"):
            await peer.say(first)

    with_peer(scenario)


def test_garbage() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        with pytest.raises(RemoteProtocolError):
            await peer.port.receive(b"\xc1garbage")

    with_peer(scenario)


def test_a_controller_that_sends_without_reading_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_OUTBOX", 50)

    async def scenario(peer: Peer) -> None:
        await peer.greet()
        peer.reading.clear()
        with pytest.raises(RemoteProtocolError, match="does not read"):
            for _ in range(200):
                await peer.say(Ping(1))
                await asyncio.sleep(0)
        assert len(peer.connection._outbox) <= 60
        peer.reading.set()

    with_peer(scenario)


def test_an_engine_failure_rejects_the_session_and_spares_the_others() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1))
        await peer.settled()
        engine = peer.engine
        assert isinstance(engine, Engine)
        engine.fault = RuntimeError("out of memory")
        await peer.say(opened(2))
        await peer.until(lambda: Reject(2, "engine") in peer.received)
        engine.fault = None
        assert peer.connection.sessions == 1
        await peer.say(Commit(1, 3, tuple(TOY.drafted(PROMPT, 8))))
        await peer.settled()
        assert len(peer.tokens(1)) == 16

    with_peer(scenario)


class FailsWhenStopped(Engine):
    """An engine whose abort fails, as one's may that is busy shutting a request down."""

    async def draft(self, tokens: Sequence[int], max_tokens: int) -> AsyncGenerator[list[DraftStep], None]:
        try:
            async for steps in super().draft(tokens, max_tokens):
                yield steps
        except (GeneratorExit, asyncio.CancelledError) as error:
            raise RuntimeError("abort failed") from error


def test_a_failing_abort_does_not_cost_the_session_its_new_branch() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1, lookahead=4000))
        await peer.until(lambda: len(peer.tokens(1)) > 3)
        strange = (TOY.draft(PROMPT) + 1) % VOCAB_SIZE
        await peer.say(Commit(1, 3, (strange,)))
        wanted = TOY.drafted((*PROMPT, strange), 5)
        await peer.until(lambda: peer.tokens(1)[-1:] == wanted[-1:] and peer.tokens(1)[-5:] == wanted)
        assert not [m for m in peer.received if isinstance(m, Reject)]

    with_peer(scenario, FailsWhenStopped(TOY))


class EndsAtOnce(Engine):
    """An engine that finishes requests without a token."""

    async def draft(self, tokens: Sequence[int], max_tokens: int) -> AsyncGenerator[list[DraftStep], None]:
        self.started += 1
        await asyncio.sleep(0)
        if tokens == ():
            yield []


def test_an_engine_that_gives_nothing_is_asked_once() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(opened(1))
        await peer.until(lambda: Reject(1, "engine") in peer.received)
        assert peer.engine.started == 1  # type: ignore[attr-defined]

    with_peer(scenario, EndsAtOnce(TOY))


def test_closing_the_connection_stops_everything() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(*[opened(n, lookahead=4000) for n in range(1, 9)])
        await peer.until(lambda: peer.connection.running == 8 and len(peer.tokens(8)) > 2)
        await peer.port.close()
        assert peer.connection.running == 0
        assert peer.engine.running == 0  # type: ignore[attr-defined]

    with_peer(scenario)


def test_a_session_of_which_nothing_is_said_is_ended() -> None:
    now = [0.0]

    async def main() -> None:
        peer = Peer(host=StreamingHost(Engine(TOY), draft_model(), clock=lambda: now[0]))
        await peer.greet()
        await peer.say(opened(1), opened(2))
        await peer.settled()
        now[0] = 100.0
        await peer.say(Commit(1, 3, tuple(TOY.drafted(PROMPT, 4))))
        await peer.settled()
        now[0] = SESSION_IDLE_S + 1.0
        await peer.say(Ping(1))
        await peer.until(lambda: Reject(2, "unknown") in peer.received)
        assert list(peer.connection._sessions) == [1]
        now[0] += 100.0
        await peer.say(Commit(2, 3, (1,)))  # in flight: nobody's fault
        await peer.until(lambda: Reject(1, "unknown") in peer.received)
        assert peer.host.stats().expired == 2
        await peer.end()
        assert peer.connection._heard_s == {}

    asyncio.run(main())


def test_the_main_line_is_known_to_the_queue() -> None:
    asked: list[bool] = []

    class Watched(StreamingHost):
        def start(self, owner, number, start, *, main=True):  # type: ignore[no-untyped-def]
            asked.append(main)
            return super().start(owner, number, start, main=main)

    async def main() -> None:
        peer = Peer(host=Watched(Engine(TOY), draft_model()))
        await peer.greet()
        await peer.say(opened(1, lookahead=24, max_nodes=512, max_branches=4, running_branches=8, branch_depth=4))
        await peer.settled()
        await peer.end()

    asyncio.run(main())
    assert asked[0]
    assert False in asked
