"""The drafter's counts as Prometheus metrics, on its vLLM server's own ``/metrics``."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from vllm_wanspec.drafter.host import HostStats


class HostCollector(Collector):
    """Reads a host's plain numbers at scrape time."""

    def __init__(self, stats: Callable[[], HostStats]) -> None:
        """Collect what ``stats`` gives."""
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Sessions and running branches now; tokens, branches and time of branches so far."""
        host = self._stats()
        yield GaugeMetricFamily("wanspec_sessions", "Open sessions.", value=host.sessions)
        yield GaugeMetricFamily(
            "wanspec_running_branches", "Branches that the engine is extending.", value=host.running
        )
        yield CounterMetricFamily("wanspec_drafted_tokens", "Tokens drafted for sessions.", value=host.drafted_tokens)
        yield CounterMetricFamily("wanspec_branches_started", "Engine requests.", value=host.branches_started)
        yield CounterMetricFamily(
            "wanspec_branch_seconds", "Time that branches have run, summed over them.", value=host.branch_seconds
        )
        yield CounterMetricFamily("wanspec_first_tokens", "Branches that have given a token.", value=host.first_tokens)
        yield CounterMetricFamily(
            "wanspec_first_seconds", "From a branch's start to its first token, summed.", value=host.first_seconds
        )
        yield CounterMetricFamily(
            "wanspec_gap_seconds",
            "Between a branch's tokens, summed over those that are not its first.",
            value=host.gap_seconds,
        )
