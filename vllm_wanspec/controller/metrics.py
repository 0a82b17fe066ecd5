"""The controller's counters as Prometheus metrics, on a port of their own.

vLLM's own ``/metrics`` belongs to another process than the model runner's, hence the port.
"""

import errno
import logging
import socket
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from vllm_wanspec.config import MetricsSettings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.core.learned.calibration import OUTCOMES, entropy_ranges
from vllm_wanspec.core.messages import REJECT_CODES
from vllm_wanspec.core.states import LinkState

logger = logging.getLogger("vllm.wanspec.metrics")


class PoolCollector(Collector):
    """Reads a pool's plain integers at scrape time, so that counting costs the serving path nothing more."""

    def __init__(self, pool: DraftPool) -> None:
        """Collect from ``pool``."""
        self._pool = pool

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """``wanspec_<counter>_total`` for each counter; what is known of each drafter."""
        for name, value in self._pool.counters.items():
            yield CounterMetricFamily(f"wanspec_{name}", f"See Counters.{name}.", value=value)
        positions = CounterMetricFamily(
            "wanspec_positions",
            "Committed positions at which a draft distribution was known, by its entropy in nats and by what the "
            "target took there.",
            labels=["entropy", "outcome"],
        )
        for entropy, counts in zip(entropy_ranges(), self._pool.shared.calibration.outcomes, strict=True):
            for outcome, count in zip(OUTCOMES, counts, strict=True):
                positions.add_metric([entropy, outcome], count)
        yield positions
        yield from self._connections()
        yield from self._health()

    def _connections(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Per drafter if it is up, its round trip, its faults, and the bytes of both ways."""
        up = GaugeMetricFamily("wanspec_drafter_up", "Whether the drafter has welcomed us.", labels=["drafter"])
        rtt = GaugeMetricFamily("wanspec_drafter_rtt_seconds", "Smoothed round trip.", labels=["drafter"])
        median = GaugeMetricFamily(
            "wanspec_drafter_median_rtt_seconds", "Median of the last round trips.", labels=["drafter"]
        )
        faults = CounterMetricFamily(
            "wanspec_peer_faults", "Connections dropped because the drafter broke the protocol.", labels=["drafter"]
        )
        sent = CounterMetricFamily("wanspec_sent_bytes", "Payload sent to the drafter.", labels=["drafter"])
        received = CounterMetricFamily("wanspec_received_bytes", "Payload from the drafter.", labels=["drafter"])
        for link in self._pool.links:
            sent.add_metric([link.name], float(link.sent_bytes))
            received.add_metric([link.name], float(link.received_bytes))
            up.add_metric([link.name], float(link.welcome is not None))
            rtt.add_metric([link.name], link.rtt_s)
            median.add_metric([link.name], link.median_rtt_s)
            faults.add_metric([link.name], float(link.faults))
        yield from (up, rtt, median, faults, sent, received)

    def _health(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Per drafter what it is thought of, what it serves, and what has been taken from it."""
        state = GaugeMetricFamily(
            "wanspec_drafter_state", "1 for the state that the drafter is in.", labels=["drafter", "state"]
        )
        sessions = GaugeMetricFamily("wanspec_drafter_sessions", "Sessions that it serves.", labels=["drafter"])
        added = GaugeMetricFamily(
            "wanspec_drafter_added_tokens",
            "Tokens per step and request that its drafts added when they were last judged.",
            labels=["drafter"],
        )
        moved = CounterMetricFamily(
            "wanspec_moved_sessions", "Sessions taken from it for its failures.", labels=["drafter"]
        )
        probes = CounterMetricFamily("wanspec_probes", "Sessions opened to see what it does.", labels=["drafter"])
        rejects = CounterMetricFamily("wanspec_rejects", "Rejects received.", labels=["drafter", "code"])
        for link in self._pool.links:
            health = link.health
            for each in LinkState:
                state.add_metric([link.name, each], float(health.state is each))
            sessions.add_metric([link.name], self._pool.sessions_on(link))
            if health.added is not None:
                added.add_metric([link.name], health.added)
            moved.add_metric([link.name], health.moves)
            probes.add_metric([link.name], health.probes)
            for code in sorted(REJECT_CODES):
                rejects.add_metric([link.name, code], health.rejects[code])
        yield from (state, sessions, added, moved, probes, rejects)


def serve_metrics(pool: DraftPool, settings: MetricsSettings) -> None:
    """Serve the metrics; a port that is taken costs the metrics, not the target."""
    registry = CollectorRegistry()
    registry.register(PoolCollector(pool))
    try:
        start_http_server(settings.port, addr=settings.host, registry=registry)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host name can be that
        no_address = isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL
        logger.warning(
            "metrics: cannot listen on %s:%d (%s); choose another metrics.%s; serving without metrics",
            settings.host,
            settings.port,
            error.strerror if isinstance(error, OSError) else error,
            "host" if no_address else "port",
        )
