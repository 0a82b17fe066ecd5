"""The host inside the engine, over a played engine core; and the front end's gate to it, over played utility calls."""

import asyncio
import queue
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toys import FINGERPRINT, VOCAB_SIZE, draft_model, limits, toy

from vllm_wanspec.core.messages import Close, Commit, Hello, Message, Nodes, Open, Refuse, Reject, Welcome
from vllm_wanspec.core.wire import decode, encode
from vllm_wanspec.drafter import gate as gate_module
from vllm_wanspec.drafter import inside
from vllm_wanspec.drafter.engines import TOP_K
from vllm_wanspec.drafter.gate import EngineGate
from vllm_wanspec.drafter.ports import Port
from vllm_wanspec.drafter.stats import HostStats
from vllm_wanspec.errors import RemoteProtocolError

TOY = toy(seed=4)
PROMPT = (1, 2, 3)

pytestmark = pytest.mark.vllm


class PlayedCore:
    """As much of vLLM's engine core as the host uses; `step` gives each request one token."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.request_block_hasher = None
        self.step_fn = self._step
        self.stats: object = None
        self.ended: dict[str, Any] = {}
        self.started = 0

    def add_request(self, request: Any) -> None:
        self.started += 1
        self.requests[request.request_id] = request

    def abort_requests(self, ids: list[str]) -> None:
        for request in ids:
            self.requests.pop(request, None)

    def _step(self) -> tuple[dict[int, Any], bool]:
        outputs = [self._output(request) for request in list(self.requests.values())]
        made = {inside.CLIENT_INDEX: SimpleNamespace(outputs=outputs, scheduler_stats=self.stats)} if outputs else {}
        return made, bool(outputs)

    def _output(self, request: Any) -> Any:
        tokens = list(request.all_token_ids)
        token = TOY.draft(tuple(tokens))
        request.append_output_token_ids(token)
        reason = self.ended.get(request.request_id)
        if request.num_output_tokens == request.max_tokens:
            reason = self.finish_reason("LENGTH")
        if reason is not None:
            del self.requests[request.request_id]
        others = [other for other in range(VOCAB_SIZE) if other != token][:3]
        ranked = SimpleNamespace(
            logprob_token_ids=np.array([[token, token, *others]]), logprobs=np.array([[-0.1, -0.1, -3.0, -4.0, -5.0]])
        )
        return SimpleNamespace(
            request_id=request.request_id, new_token_ids=[token], new_logprobs=ranked, finish_reason=reason
        )

    @staticmethod
    def finish_reason(name: str) -> Any:
        from vllm.v1.engine import FinishReason

        return FinishReason[name]


def settings(places: int = 64) -> dict[str, Any]:
    model = draft_model()
    fields = {name: getattr(model, name) for name in model.__dataclass_fields__}
    return {"model": fields, "running_branches": places, "events": None, "top_k": TOP_K}


class Engine:
    """A played core with the utility calls, which a front end makes as vLLM's client does."""

    def __init__(self) -> None:
        self.core = PlayedCore()
        self.engine_core = SimpleNamespace(call_utility_async=self._call)
        self.dead = False

    async def _call(self, name: str, *arguments: Any) -> Any:
        await asyncio.sleep(0)
        if self.dead:
            raise RuntimeError("engine core died")
        result = getattr(inside, name)(self.core, *arguments)
        return await asyncio.wrap_future(result) if isinstance(result, Future) else result

    async def run(self) -> None:
        while True:
            self.core.step_fn()
            await asyncio.sleep(0)


async def read(port: Port, received: list[Message]) -> str | None:
    """Until the end: what was wrong, or nothing where the controller was refused."""
    try:
        while (frames := await port.frames()) is not None:
            for frame in frames:
                received += decode(frame)
    except (RemoteProtocolError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def with_gate(scenario: Any) -> None:
    async def main() -> None:
        engine = Engine()
        gate = EngineGate(engine)
        await gate.setup(settings())
        port = gate.port()
        received: list[Message] = []
        reading = asyncio.create_task(read(port, received))
        tasks = [asyncio.create_task(engine.run()), reading]

        async def until(condition: Any) -> None:
            async with asyncio.timeout(5.0):
                while not condition():
                    await asyncio.sleep(0)

        try:
            peer = SimpleNamespace(engine=engine, gate=gate, port=port, received=received, until=until, reading=reading)
            await scenario(peer)
        finally:
            await port.close()
            for task in (*tasks, gate._polling):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not engine.dead:
            assert engine.core.requests == {}

    asyncio.run(main())


def opened(number: int, lookahead: int = 8, tokens: tuple[int, ...] = PROMPT) -> Open:
    return Open(number, tokens, limits(lookahead, 64))


def drafted(received: list[Message], session: int) -> list[int]:
    return [n.token for m in received if isinstance(m, Nodes) and m.session == session for n in m.nodes]


async def greet(peer: Any) -> None:
    await peer.port.receive(encode([Hello(1, FINGERPRINT, "test")]))
    await peer.until(lambda: peer.received)
    assert isinstance(peer.received[0], Welcome)


def test_drafts_follow_commits() -> None:
    async def scenario(peer: Any) -> None:
        await greet(peer)
        await peer.port.receive(encode([opened(1)]))
        line = TOY.drafted(PROMPT, 8)
        await peer.until(lambda: drafted(peer.received, 1) == line)
        await peer.until(lambda: peer.gate.stats.running == 0)
        await peer.port.receive(encode([Commit(1, 3, tuple(line))]))
        await peer.until(lambda: drafted(peer.received, 1)[8:] == TOY.drafted((*PROMPT, *line), 8))
        assert peer.gate.stats.sessions == 1
        assert peer.gate.stats.drafted_tokens >= 16

    with_gate(scenario)


def test_a_token_that_was_not_drafted_stops_the_branch_and_starts_another_one() -> None:
    async def scenario(peer: Any) -> None:
        await greet(peer)
        await peer.port.receive(encode([opened(1, lookahead=60)]))
        await peer.until(lambda: len(drafted(peer.received, 1)) > 3)
        strange = (TOY.draft(PROMPT) + 1) % VOCAB_SIZE
        await peer.port.receive(encode([Commit(1, 3, (strange,))]))
        wanted = TOY.drafted((*PROMPT, strange), 5)
        await peer.until(lambda: wanted[-1] in drafted(peer.received, 1)[-20:] and len(peer.engine.core.requests) == 1)

    with_gate(scenario)


def test_two_front_ends_have_their_own_controllers() -> None:
    async def scenario(peer: Any) -> None:
        await greet(peer)
        other = EngineGate(peer.engine)
        await other.setup(settings())
        port = other.port()
        received: list[Message] = []
        reading = asyncio.create_task(read(port, received))
        await port.receive(encode([Hello(1, FINGERPRINT, "other")]))
        await port.receive(encode([opened(1, tokens=(4, 4))]))
        await peer.port.receive(encode([opened(1)]))
        await peer.until(lambda: len(drafted(received, 1)) == 8 and len(drafted(peer.received, 1)) == 8)
        assert drafted(received, 1) == TOY.drafted((4, 4), 8)
        assert drafted(peer.received, 1) == TOY.drafted(PROMPT, 8)
        await port.close()
        reading.cancel()
        assert other._polling is not None
        other._polling.cancel()

    with_gate(scenario)


def test_what_no_correct_controller_sends() -> None:
    async def scenario(peer: Any) -> None:
        await greet(peer)
        await peer.port.receive(encode([Commit(9, 3, (1,))]))
        assert "RemoteProtocolError" in (said := await peer.reading)
        assert "never opened" in said
        await peer.port.receive(encode([opened(1)]))  # was on its way
        await peer.until(lambda: not peer.port._flying)
        assert peer.gate.stats.sessions == 0

    with_gate(scenario)


def test_a_refused_controller_gets_its_last_word() -> None:
    async def scenario(peer: Any) -> None:
        await peer.port.receive(encode([Hello(1, "other", "test")]))
        assert await peer.reading is None
        [refuse] = peer.received
        assert isinstance(refuse, Refuse)
        assert refuse.code == "vocabulary"

    with_gate(scenario)


def test_closing_stops_the_engine() -> None:
    async def scenario(peer: Any) -> None:
        await greet(peer)
        await peer.port.receive(encode([opened(n, lookahead=60) for n in (1, 2, 3)]))
        await peer.until(lambda: len(peer.engine.core.requests) == 3)
        await peer.port.receive(encode([Close(2)]))
        await peer.until(lambda: len(peer.engine.core.requests) == 2)
        await peer.until(lambda: peer.gate.stats.sessions == peer.gate.stats.running == 2)
        await peer.port.close()
        assert not peer.engine.core.requests
        assert peer.gate.stats.sessions == peer.gate.stats.running == 0

    with_gate(scenario)


def test_a_request_that_the_engine_ends_rejects_its_session() -> None:
    async def scenario(peer: Any) -> None:
        await greet(peer)
        await peer.port.receive(encode([opened(1, lookahead=60)]))
        await peer.until(lambda: peer.engine.core.requests)
        name = next(iter(peer.engine.core.requests))
        peer.engine.core.ended[name] = PlayedCore.finish_reason("ABORT")
        await peer.until(lambda: Reject(1, "engine") in peer.received)

    with_gate(scenario)


def test_a_dead_engine_ends_the_connections() -> None:
    async def scenario(peer: Any) -> None:
        await greet(peer)
        peer.engine.dead = True
        await peer.port.receive(encode([opened(1)]))
        assert "OSError: the engine is gone" in await peer.reading

    with_gate(scenario)


def test_closing_does_not_wait_for_an_engine_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "CLOSE_DEADLINE_S", 0.01)

    async def scenario(peer: Any) -> None:
        await greet(peer)

        async def silent(name: str, *arguments: Any) -> Any:
            peer.engine.dead = True
            await asyncio.Event().wait()

        peer.gate._call = silent
        async with asyncio.timeout(5.0):
            await peer.port.close()
        assert peer.engine.dead

    with_gate(scenario)


def test_a_fault_of_ours_drops_the_controllers_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(peer: Any) -> None:
        await greet(peer)
        await peer.port.receive(encode([opened(1, lookahead=60)]))
        await peer.until(lambda: drafted(peer.received, 1))

        def broken(outputs: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(peer.engine.core.wanspec._host, "stepped", broken)
        await peer.until(lambda: not peer.engine.core.requests)
        assert "fault of its own" in await peer.reading
        await peer.port.receive(encode([Commit(1, 3, (1,))]))

    with_gate(scenario)


def test_statistics_go_to_a_front_end() -> None:
    core = PlayedCore()
    inside.wanspec_setup(core, settings())
    inside.wanspec_connect(core, "a", 1)
    inside.wanspec_receive(core, "a", 1, encode([Hello(1, FINGERPRINT, "test")]))
    inside.wanspec_receive(core, "a", 1, encode([opened(1)]))
    core.stats = object()
    outputs, executed = core.step_fn()
    assert executed
    assert [index for index in outputs if index == inside.CLIENT_INDEX] == []
    assert [output.scheduler_stats for output in outputs.values()] == [core.stats]


# What is on its way


@pytest.mark.parametrize(("size", "most"), [(10, gate_module.MAX_FLYING_FRAMES), (gate_module.MAX_FLYING_BYTES, 1)])
def test_so_much_is_on_its_way_at_a_time(size: int, most: int) -> None:
    async def main() -> None:
        calls: list[asyncio.Future[Any]] = []

        async def slow(name: str, *arguments: Any) -> Any:
            if name == "wanspec_close":
                return list(HostStats())
            calls.append(asyncio.get_running_loop().create_future())
            return await calls[-1]

        port = EngineGate(SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=slow))).port()
        port._connected = True
        handed = 0

        async def hand_over() -> None:
            nonlocal handed
            for _ in range(most + 3):
                await port.receive(bytes(size))
                handed += 1

        handing = asyncio.create_task(hand_over())
        for _ in range(most + 10):
            await asyncio.sleep(0)
        assert handed == len(calls) == most
        calls[0].set_result(list(HostStats(sessions=7)))
        for _ in range(10):
            await asyncio.sleep(0)
        assert handed == len(calls) == most + 1
        assert port._gate.stats.sessions == 7
        handing.cancel()
        await port.close()
        await asyncio.gather(handing, *port._flying, return_exceptions=True)
        assert (port._flying, port._flying_bytes) == ({}, 0)

    asyncio.run(main())


# The end


def test_sessions_are_let_go_before_the_engine_is() -> None:
    async def scenario(peer: Any) -> None:
        await greet(peer)
        await peer.port.receive(encode([opened(1, lookahead=60)]))
        await peer.until(lambda: drafted(peer.received, 1))
        assert await peer.gate.drain(last=False) == 1
        await peer.port.receive(encode([opened(2)]))
        await peer.until(lambda: Reject(2, "overloaded") in peer.received)
        assert peer.engine.core.requests
        assert await peer.gate.drain(last=True) == 0
        await peer.until(lambda: Reject(1, "overloaded") in peer.received)
        assert not peer.engine.core.requests
        peer.engine.dead = True
        assert await peer.gate.drain(last=False) == 0

    with_gate(scenario)


class Output(SimpleNamespace):
    """vLLM's ``EngineCoreOutputs``, as it makes them when it ends requests itself."""


def ended_by_vllm(core: PlayedCore) -> None:
    """As on SIGTERM and when it pauses: requests are gone, and a message for their front end is queued."""
    names = list(core.requests)
    core.requests.clear()
    outputs = [SimpleNamespace(request_id=name, new_token_ids=[], finish_reason="abort") for name in names]
    core.output_queue.put_nowait((inside.CLIENT_INDEX, Output(outputs=outputs)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("runs", [True, False], ids=["pauses", "stops"])
def test_what_vllm_ends_itself_ends_sessions_and_stays_out_of_its_queue(runs: bool) -> None:
    core = PlayedCore()
    plain = core.output_queue = queue.SimpleQueue()  # type: ignore[attr-defined]
    core.is_running = lambda: runs  # type: ignore[attr-defined]
    inside.wanspec_setup(core, settings(places=2))
    inside.wanspec_connect(core, "a", 1)
    inside.wanspec_receive(core, "a", 1, encode([Hello(1, FINGERPRINT, "test")]))
    inside.wanspec_receive(core, "a", 1, encode([opened(n, lookahead=60) for n in (1, 2, 3)]))
    assert len(core.requests) == 2
    started = core.started
    ended_by_vllm(core)
    assert plain.empty()
    host = core.wanspec._host  # type: ignore[attr-defined]
    assert (host.sessions, host.running, host.waiting, core.started) == (0, 0, 0, started)
    assert host.draining is not runs
    sent = [m for frames in inside.wanspec_poll(core, "a").result()[0] for frame in frames[1] for m in decode(frame)]
    assert {m.session for m in sent if isinstance(m, Reject)} == {1, 2, 3}
    item = (0, object())
    core.output_queue.put_nowait(item)  # type: ignore[attr-defined]
    assert core.output_queue.get() is item  # type: ignore[attr-defined]


def test_an_engine_that_waits_until_nothing_runs_gets_there() -> None:
    core = PlayedCore()
    core.is_running = lambda: core.started == 0  # type: ignore[attr-defined]
    inside.wanspec_setup(core, settings())
    inside.wanspec_connect(core, "a", 1)
    inside.wanspec_receive(core, "a", 1, encode([Hello(1, FINGERPRINT, "test")]))
    inside.wanspec_receive(core, "a", 1, encode([opened(1, lookahead=60)]))
    core.step_fn()
    assert not core.requests
    assert core.wanspec._host.draining  # type: ignore[attr-defined]


def test_a_last_output_that_cannot_be_read_gives_its_place_back() -> None:
    core = PlayedCore()
    inside.wanspec_setup(core, settings(places=1))
    inside.wanspec_connect(core, "a", 1)
    inside.wanspec_receive(core, "a", 1, encode([Hello(1, FINGERPRINT, "test")]))
    inside.wanspec_receive(core, "a", 1, encode([opened(1), opened(2)]))
    [name] = core.requests
    host = core.wanspec._host  # type: ignore[attr-defined]
    del core.requests[name]
    broken = SimpleNamespace(request_id=name, new_token_ids=[1], new_logprobs=None, finish_reason="length")
    host.stepped(SimpleNamespace(outputs=[broken]))
    assert (host.sessions, host.running) == (1, 1)
