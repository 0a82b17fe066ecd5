"""The controller's metrics over HTTP."""

import socket
import urllib.request
from types import SimpleNamespace

import pytest
from conftest import LogLines
from prometheus_client import CollectorRegistry, generate_latest

from vllm_wanspec.config import MetricsSettings
from vllm_wanspec.controller import metrics
from vllm_wanspec.controller.metrics import PoolCollector, serve_metrics
from vllm_wanspec.core.counters import Counters, Shared
from vllm_wanspec.core.health import LinkHealth
from vllm_wanspec.core.learned.calibration import OUTCOMES, entropy_ranges


def fake_pool() -> SimpleNamespace:
    up, down = SimpleNamespace(name="eu", welcome=object()), SimpleNamespace(name="us", welcome=None)
    up.rtt_s, up.median_rtt_s, up.faults, up.sent_bytes, up.received_bytes = 0.02, 0.015, 2, 1000, 5000
    down.rtt_s, down.median_rtt_s, down.faults, down.sent_bytes, down.received_bytes = 0.0, 0.0, 3, 0, 7
    up.health, down.health = LinkHealth(), LinkHealth()
    shared = Shared(counters=Counters(hits=7))
    sessions = {"eu": 5, "us": 0}
    return SimpleNamespace(
        counters=shared.counters, shared=shared, links=[up, down], sessions_on=lambda link: sessions[link.name]
    )


def text(pool: SimpleNamespace) -> str:
    registry = CollectorRegistry()
    registry.register(PoolCollector(pool))
    return generate_latest(registry).decode()


def test_counters_and_drafters() -> None:
    lines = text(fake_pool()).splitlines()
    assert "wanspec_hits_total 7.0" in lines
    assert "wanspec_misses_total 0.0" in lines
    assert 'wanspec_peer_faults_total{drafter="eu"} 2.0' in lines
    assert 'wanspec_peer_faults_total{drafter="us"} 3.0' in lines
    assert 'wanspec_drafter_up{drafter="eu"} 1.0' in lines
    assert 'wanspec_drafter_up{drafter="us"} 0.0' in lines
    assert 'wanspec_drafter_rtt_seconds{drafter="eu"} 0.02' in lines
    assert 'wanspec_drafter_median_rtt_seconds{drafter="eu"} 0.015' in lines
    assert 'wanspec_sent_bytes_total{drafter="eu"} 1000.0' in lines
    assert 'wanspec_received_bytes_total{drafter="eu"} 5000.0' in lines
    assert 'wanspec_received_bytes_total{drafter="us"} 7.0' in lines


def test_what_is_thought_of_each_drafter() -> None:
    pool = fake_pool()
    eu, us = (link.health for link in pool.links)
    for _ in range(3):
        us.rejected("overloaded", 100.0)
    us.opened(1, 102.0, waits=True, probe=True)
    us.moves = 4
    eu.rows, eu.drafted_rows, eu.drafted_tokens = 1000, 500, 1500
    eu._began_s = 0.0
    eu.judge(1.0, 100.0)
    lines = text(pool).splitlines()
    assert 'wanspec_drafter_state{drafter="eu",state="healthy"} 1.0' in lines
    assert 'wanspec_drafter_state{drafter="eu",state="suspect"} 0.0' in lines
    assert 'wanspec_drafter_state{drafter="us",state="suspect"} 1.0' in lines
    assert 'wanspec_drafter_state{drafter="us",state="healthy"} 0.0' in lines
    assert 'wanspec_drafter_sessions{drafter="eu"} 5.0' in lines
    assert 'wanspec_drafter_added_tokens{drafter="eu"} 1.0' in lines
    assert not [line for line in lines if line.startswith('wanspec_drafter_added_tokens{drafter="us"')]
    assert 'wanspec_moved_sessions_total{drafter="us"} 4.0' in lines
    assert 'wanspec_probes_total{drafter="us"} 1.0' in lines
    assert 'wanspec_probes_total{drafter="eu"} 0.0' in lines
    assert 'wanspec_rejects_total{code="overloaded",drafter="us"} 3.0' in lines
    assert 'wanspec_rejects_total{code="engine",drafter="us"} 0.0' in lines


def test_what_became_of_positions_by_entropy() -> None:
    pool = fake_pool()
    calibration = pool.shared.calibration
    for entropy, outcome, count in ((0.1, 0, 5), (0.7, 1, 3), (0.7, 2, 2), (99.0, 3, 4)):
        for _ in range(count):
            calibration.saw_outcome(entropy, outcome)
    lines = text(pool).splitlines()
    assert 'wanspec_positions_total{entropy="0-0.25",outcome="agreed"} 5.0' in lines
    assert 'wanspec_positions_total{entropy="0.5-1",outcome="branch"} 3.0' in lines
    assert 'wanspec_positions_total{entropy="0.5-1",outcome="leaf"} 2.0' in lines
    assert 'wanspec_positions_total{entropy="4-inf",outcome="outside"} 4.0' in lines
    positions = [line for line in lines if line.startswith("wanspec_positions_total")]
    assert len(positions) == len(list(entropy_ranges())) * len(OUTCOMES)
    assert sum(float(line.split()[-1]) for line in positions) == 14.0


def test_every_counter_has_a_metric_that_follows_it() -> None:
    pool = fake_pool()
    names = [name for name, _ in pool.counters.items()]
    for name in names:
        setattr(pool.counters, name, 41)
    lines = text(pool).splitlines()
    for name in names:
        assert f"wanspec_{name}_total 41.0" in lines


def test_they_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = metrics.start_http_server

    def remember(*args: object, **kwargs: object) -> object:
        started.append(start(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(metrics, "start_http_server", remember)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve_metrics(fake_pool(), MetricsSettings(port=port))
    server, thread = started[0]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"wanspec_hits_total 7.0" in answer.read()
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "[::1]", "192.0.2.1"])
def test_a_host_that_is_not_ours_costs_only_the_metrics(log: LogLines, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        serve_metrics(fake_pool(), MetricsSettings(port=taken.getsockname()[1], host=host))
    [line] = log.warnings()
    assert f"cannot listen on {host}:" in line
    assert "choose another metrics.host" in line


def test_a_taken_port_costs_only_the_metrics(log: LogLines) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        serve_metrics(fake_pool(), MetricsSettings(port=port))
    [line] = log.warnings()
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert "choose another metrics.port" in line
