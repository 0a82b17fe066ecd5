"""Setting the emulated WAN while it runs, through the proxy's control API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.launch import DRAFTER_NAME
from vllm_wanspec.lab.harness.scrape import link_is_up, read_samples

TIMEOUT_S = 5.0
POLL_S = 0.05
#: How long a link may take to come up again and to measure the round trip.
LINK_DEADLINE_S = 20.0
NEAR_MS, NEAR_SHARE, NEAR_ZERO_MS = 2.0, 0.1, 3.0


@dataclass(frozen=True, slots=True)
class Wan:
    """Sets the round trip of the WAN proxy.

    Args:
        http: Open aiohttp session.
        control_url: The proxy's control API.
        metrics: Metrics URLs of the controllers behind it.
        check_alive: Called while waiting; raises when that has become pointless.
    """

    http: aiohttp.ClientSession
    control_url: str
    metrics: Sequence[str]
    check_alive: Callable[[], None] = lambda: None

    async def set(self, rtt_ms: float) -> bool:
        """Change the round trip, and wait until every link has connected anew and measured it.

        A running link would go on averaging over the former one for half a minute.

        Returns:
            Whether all of them measure about this round trip, within a bounded time.

        Raises:
            ClientError: The proxy cannot be changed, or a link did not come up again.
        """
        await self._ask("PATCH", "/settings", {"rtt_ms": rtt_ms})
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
        labels_of = {name: value for name, _, value in await read_samples(self.http, url, "wanspec_drafter_")}
        measured_ms = 1000.0 * labels_of.get("wanspec_drafter_rtt_seconds", 0.0)
        near_ms = max(NEAR_MS, NEAR_SHARE * rtt_ms) if rtt_ms else NEAR_ZERO_MS
        return labels_of.get("wanspec_drafter_up") == 1.0 and abs(measured_ms - rtt_ms) <= near_ms

    async def _ask(self, method: str, path: str, body: Mapping[str, float] | None = None) -> dict[str, float]:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            async with self.http.request(method, self.control_url + path, json=body, timeout=timeout) as response:
                response.raise_for_status()
                answer: dict[str, float] = await response.json()
                return answer
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise ClientError(f"{self.control_url}{path}: {error or type(error).__name__}") from error
