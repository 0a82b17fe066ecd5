"""The drafter's counts as Prometheus metrics, on its vLLM server's own ``/metrics``."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from vllm_wanspec.drafter.stats import HostStats


class HostCollector(Collector):
    """Reads a host's plain numbers at scrape time."""

    def __init__(self, stats: Callable[[], HostStats]) -> None:
        """Collect what ``stats`` gives."""
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Sessions, branches and contexts now; tokens, branches and time of branches, and refusals so far."""
        host = self._stats()
        yield from _of_branches(host)
        yield from _of_sessions(host)


def _of_branches(host: HostStats) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
    yield GaugeMetricFamily("wanspec_running_branches", "Branches that the engine is extending.", value=host.running)
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
    yield GaugeMetricFamily("wanspec_waiting_branches", "Branches that wait for a place.", value=host.waiting)
    yield CounterMetricFamily(
        "wanspec_waited_seconds", "From asking for a place to getting it, summed.", value=host.waited_seconds
    )


def _of_sessions(host: HostStats) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
    yield GaugeMetricFamily("wanspec_sessions", "Open sessions.", value=host.sessions)
    yield GaugeMetricFamily("wanspec_context_tokens", "In the contexts of all sessions.", value=host.context_tokens)
    yield GaugeMetricFamily("wanspec_draining", "1: no new sessions are taken.", value=host.draining)
    yield CounterMetricFamily("wanspec_expired_sessions", "Ended because nothing was said of them.", value=host.expired)
    yield CounterMetricFamily(
        "wanspec_dismissed_sessions", "Ended because the drafter or its engine stops.", value=host.dismissed
    )
    rejects = CounterMetricFamily("wanspec_rejects", "Sessions refused or ended.", labels=["code", "why"])
    for reject, count in host.rejects.items():
        code, _, why = reject.partition("/")
        rejects.add_metric([code, why], count)
    yield rejects
    yield _by_client("wanspec_client_drafted_tokens", "Tokens drafted.", host.drafted)
    yield _by_client("wanspec_client_used_tokens", "Committed tokens that had been drafted.", host.used)


def _by_client(name: str, text: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=["client"])
    for client, count in counts.items():
        family.add_metric([client], count)
    return family
