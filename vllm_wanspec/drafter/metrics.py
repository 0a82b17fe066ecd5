"""The drafter's counts as Prometheus metrics, on its vLLM server's own ``/metrics``."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from vllm_wanspec.drafter.service import Host


class HostCollector(Collector):
    """Reads a host's plain numbers at scrape time."""

    def __init__(self, host: Host) -> None:
        """Collect from ``host``."""
        self._host = host

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Sessions and running branches now; tokens, branches and time of branches so far."""
        host = self._host
        yield GaugeMetricFamily("wanspec_sessions", "Open sessions.", value=host.sessions)
        yield GaugeMetricFamily(
            "wanspec_running_branches", "Branches that the engine is extending.", value=host.running
        )
        yield CounterMetricFamily("wanspec_drafted_tokens", "Tokens drafted for sessions.", value=host.drafted_tokens)
        yield CounterMetricFamily("wanspec_branches_started", "Engine requests.", value=host.branches_started)
        yield CounterMetricFamily(
            "wanspec_branch_seconds", "Time that branches have run, summed over them.", value=host.branch_seconds
        )
