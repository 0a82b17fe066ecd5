"""The drafter's metrics, and the counts behind them."""

from typing import cast
from unittest.mock import Mock

import pytest
from host_peer import PROMPT, TOY, Peer, opened, with_peer
from prometheus_client import CollectorRegistry, generate_latest
from toys import VOCAB_SIZE, draft_model

from vllm_wanspec.core.drafter import DraftStep, StartBranch
from vllm_wanspec.core.messages import Close, Commit
from vllm_wanspec.drafter.connection import Connection
from vllm_wanspec.drafter.host import Host, StreamingHost
from vllm_wanspec.drafter.metrics import HostCollector
from vllm_wanspec.sim.engine import Engine


def metrics(host: StreamingHost) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(HostCollector(host.stats))
    lines = generate_latest(registry).decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}


def test_what_a_host_that_rests_says() -> None:
    assert metrics(StreamingHost(Engine(TOY), draft_model())) == {
        "wanspec_sessions": 0.0,
        "wanspec_running_branches": 0.0,
        "wanspec_drafted_tokens_total": 0.0,
        "wanspec_branches_started_total": 0.0,
        "wanspec_branch_seconds_total": 0.0,
        "wanspec_first_tokens_total": 0.0,
        "wanspec_first_seconds_total": 0.0,
        "wanspec_gap_seconds_total": 0.0,
        "wanspec_waiting_branches": 0.0,
        "wanspec_waited_seconds_total": 0.0,
        "wanspec_context_tokens": 0.0,
        "wanspec_draining": 0.0,
        "wanspec_expired_sessions_total": 0.0,
        "wanspec_dismissed_sessions_total": 0.0,
    }


def test_refusals_and_tokens_by_client() -> None:
    async def scenario(peer: Peer) -> None:
        peer.connection.client_name = "eu"
        await peer.greet()
        await peer.say(opened(1), opened(2), opened(3, tokens=(0,) * 21), opened(4))
        await peer.settled()
        line = TOY.drafted(PROMPT, 8)
        await peer.say(Commit(1, 3, (*line[:3], (line[3] + 1) % VOCAB_SIZE)), Commit(1, 3, tuple(line[:2])))
        await peer.settled()
        now = metrics(peer.host)
        assert now['wanspec_rejects_total{code="overloaded",why="sessions"}'] == 1.0
        assert now['wanspec_rejects_total{code="too_long",why=""}'] == 1.0
        assert now['wanspec_client_used_tokens_total{client="eu"}'] == 3.0  # the fourth was not drafted
        assert now['wanspec_client_drafted_tokens_total{client="eu"}'] == now["wanspec_drafted_tokens_total"]
        assert now["wanspec_context_tokens"] == 3 + 4 + 3
        await peer.say(Close(1), Close(2))
        assert metrics(peer.host)["wanspec_context_tokens"] == 0.0

    with_peer(scenario, model=draft_model(max_sessions=2, max_context=20))


def test_they_follow_what_happens() -> None:
    async def scenario(peer: Peer) -> None:
        engine = peer.engine
        assert isinstance(engine, Engine)
        await peer.greet()
        engine.held = True
        await peer.say(opened(1), opened(2))
        await peer.until(lambda: engine.running == 2)
        now = metrics(peer.host)
        assert (now["wanspec_sessions"], now["wanspec_running_branches"]) == (2.0, 2.0)
        engine.held = False
        await peer.settled()
        await peer.say(Close(1))
        now = metrics(peer.host)
        assert (now["wanspec_sessions"], now["wanspec_running_branches"]) == (1.0, 0.0)
        # Eight tokens each, as far as the lookahead goes; what the engine gives beyond them counts as drafted too.
        assert now["wanspec_drafted_tokens_total"] >= 16.0
        assert now["wanspec_branches_started_total"] == engine.started == 2.0

    with_peer(scenario)


class PlayedHost(Host):
    """A host whose engine does what the test says."""

    def _extend(self, handle: int, start: StartBranch) -> None:
        pass

    def _cease(self, handle: int) -> None:
        self.gone(handle)


def test_times_to_the_first_token_and_between_tokens() -> None:
    now = [100.0]
    step = DraftStep(1, -0.1, 0.3)
    host = PlayedHost(draft_model(), clock=lambda: now[0])
    connection = Connection(host)
    handles = [host.start(connection, 1, StartBranch(branch, 0, (1,), 1, (), 8)) for branch in (1, 2)]
    for handle, seconds, tokens in ((handles[0], 2.0, 1), (handles[1], 1.0, 1), (handles[0], 3.0, 2)):
        now[0] += seconds
        host.drafted(handle, [step] * tokens)
    assert (host.stats().first_tokens, host.stats().first_seconds) == (2, pytest.approx(2.0 + 3.0))
    assert host.stats().gap_seconds == pytest.approx(1.0 + 3.0)


def test_the_mean_number_of_running_branches_is_the_growth_of_their_time() -> None:
    now = [100.0]
    host = PlayedHost(draft_model(), clock=lambda: now[0])
    connection = cast(Connection, Mock())
    handles = []
    for starts, seconds, total in ((True, 2.0, 2.0), (True, 3.0, 8.0), (True, 1.0, 11.0), (False, 4.0, 19.0)):
        if starts:
            handles.append(host.start(connection, 1, StartBranch(len(handles), 0, (1,), 1, (), 8)))
        else:
            host.stop(handles.pop())
        now[0] += seconds
        assert host.branch_seconds == pytest.approx(total)
    for handle in handles:
        host.stop(handle)
    now[0] += 1000.0
    assert host.branch_seconds == pytest.approx(19.0)
    assert host.running == 0
    assert host.branches_started == 3
