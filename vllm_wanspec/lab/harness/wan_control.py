"""Setting the emulated WAN while it runs, through the proxy's control API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.launch import DRAFTER_NAME
from vllm_wanspec.lab.harness.probes import RTT
from vllm_wanspec.lab.harness.scrape import link_is_up, read_samples

TIMEOUT_S = 5.0
POLL_S = 0.05
#: For some pings after the greeting, which come once a second.
PINGS_S = 4.0
#: How long a link may take to come up again and to measure the round trip.
LINK_DEADLINE_S = 20.0
#: What a link measures may differ from R by so much and this share of R, both before the time scale; a run in which it
#: differs by more is invalid.
R_TOLERANCE_MS = 2.0
R_TOLERANCE_SHARE = 0.05


def expected_ms(rtt_ms: float, jitter_ms: float = 0.0) -> float:
    """Return the mean round trip through the proxy.

    The jitter of each direction is drawn uniformly from 0 to ``jitter_ms``: half of that in the mean, twice per trip.
    """
    return rtt_ms + jitter_ms


def trip_ms(link: Mapping[str, float]) -> float:
    """Return the round trip of a link by its samples; 0 before it has measured one."""
    return 1000.0 * link.get(RTT, 0.0)


def is_off(measured_ms: float, rtt_ms: float, time_scale: float = 1.0) -> bool:
    """Whether a measured round trip is not the one that was set.

    Args:
        measured_ms: What a link measures, the median of its last pings.
        rtt_ms: The mean that is to be expected, jitter included (`expected_ms`).  Losses are not: a ping that waited
            for a time-out counts for half a minute, so judge what is measured before there are any, as `Wan.set` does.
        time_scale: By which both have been multiplied, as all times of the run.
    """
    return not abs(measured_ms - rtt_ms) <= R_TOLERANCE_MS * time_scale + R_TOLERANCE_SHARE * rtt_ms


@dataclass(slots=True)
class Wan:
    """Sets round trip, jitter and losses of the WAN proxy, and reads what the links measure.

    A round trip is what links measure while nothing else happens. They, the proxy and the drafter take a millisecond or
    two of it themselves: by so much the proxy's delay is shorter.

    Args:
        http: Open aiohttp session.
        control_url: The proxy's control API.
        metrics: Metrics URLs of the controllers behind it.
        check_alive: Called while waiting; raises when that has become pointless.
        time_scale: By which all times of the run are multiplied.
        path_ms: The round trip without any delay; measured when one is set first, unless given.
    """

    http: aiohttp.ClientSession
    control_url: str
    metrics: Sequence[str]
    check_alive: Callable[[], None] = lambda: None
    time_scale: float = 1.0
    path_ms: float | None = None

    async def set(self, rtt_ms: float, jitter_ms: float = 0.0, loss: float = 0.0) -> bool:
        """Change the WAN, and wait until every link has connected anew and measured the round trip.

        A running link would go on averaging over the former one for half a minute.  Losses begin once it is measured.

        Args:
            rtt_ms: Round trip without jitter.
            jitter_ms: Greatest extra delay per direction.
            loss: Probability that a segment is lost, 0 to 0.5.

        Returns:
            Whether all of them measure this round trip (`is_off`), within a bounded time.

        Raises:
            ClientError: The proxy cannot be changed, or a link did not come up again.
        """
        if self.path_ms is None:
            await self._ask("PATCH", "/settings", {"rtt_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0})
            await self._connect_anew(0.0)
            await asyncio.sleep(PINGS_S)  # the greeting alone is dearer than pings
            trips_ms = [trip_ms(await self._link_samples(url)) for url in self.metrics]
            self.path_ms = sum(trips_ms) / len(trips_ms)
        delay_ms = max(0.0, rtt_ms - self.path_ms)
        await self._ask("PATCH", "/settings", {"rtt_ms": delay_ms, "jitter_ms": jitter_ms, "loss": 0.0})
        measured = await self._connect_anew(expected_ms(rtt_ms, jitter_ms))
        if loss:
            await self._ask("PATCH", "/settings", {"loss": loss})
        return measured

    async def _connect_anew(self, rtt_ms: float) -> bool:
        """Reset all connections; whether all links come to measure this round trip."""
        before = (await self._ask("DELETE", "/connections"))["connections_total"]
        end_s = time.monotonic() + LINK_DEADLINE_S
        while True:
            anew = (await self._ask("GET", "/counters"))["connections_total"] - before >= len(self.metrics)
            if anew and all([await self._is_near(url, rtt_ms) for url in self.metrics]):
                return True
            if time.monotonic() > end_s:
                break
            self.check_alive()
            await asyncio.sleep(POLL_S)
        if anew and all([await link_is_up(self.http, url, DRAFTER_NAME) for url in self.metrics]):
            return False
        raise ClientError(f"the link to the drafter was not up {LINK_DEADLINE_S:.0f} s after the WAN was changed")

    async def _is_near(self, url: str, rtt_ms: float) -> bool:
        link = await self._link_samples(url)
        return link.get("wanspec_drafter_up") == 1.0 and not is_off(trip_ms(link), rtt_ms, self.time_scale)

    async def _link_samples(self, url: str) -> dict[str, float]:
        samples = await read_samples(self.http, url, "wanspec_drafter_")
        return {name: value for name, labels, value in samples if labels.get("drafter") == DRAFTER_NAME}

    async def _ask(self, method: str, path: str, body: Mapping[str, float] | None = None) -> dict[str, float]:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            async with self.http.request(method, self.control_url + path, json=body, timeout=timeout) as response:
                response.raise_for_status()
                answer: dict[str, float] = await response.json()
                return answer
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise ClientError(f"{self.control_url}{path}: {error or type(error).__name__}") from error
