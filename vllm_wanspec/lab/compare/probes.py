"""What is read around the side-by-side bench's requests: counters, processor time, and the emulated WAN."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.counters import CONTROLLER_COUNTERS, DRAFTER_COUNTERS, Counters
from vllm_wanspec.lab.harness.cpu import CpuClock
from vllm_wanspec.lab.harness.launch import DRAFTER_NAME
from vllm_wanspec.lab.harness.scrape import link_is_up, read_samples

__all__ = ["Probe", "Reading", "Wan"]

VLLM_PREFIX = "vllm:spec_decode_num_"
VLLM_COUNTERS = {f"vllm:spec_decode_{name}_total": name for name in ("num_drafts", "num_draft_tokens")}
VLLM_COUNTERS["vllm:spec_decode_num_accepted_tokens_total"] = "num_accepted_tokens"
REMOTE_COUNTERS = (*CONTROLLER_COUNTERS, "local_draft_passes")
#: After a request its session ends once word has crossed the WAN; counters rise until then.
SETTLE_MIN_S = 0.1
SETTLE_MAX_S = 1.0
SETTLE_POLL_S = 0.05
RISING = ("branch_seconds", "drafted_tokens", "received_nodes")
WAN_TIMEOUT_S = 5.0
WAN_POLL_S = 0.05
#: How long a link may take to come up again and to measure the round trip.
LINK_DEADLINE_S = 20.0
NEAR_MS, NEAR_SHARE, NEAR_ZERO_MS = 2.0, 0.1, 3.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters by name, and processor seconds by side, at one moment."""

    counters: Mapping[str, float]
    cpu_s: Mapping[str, float]


class Probe:
    """Reads one arm's counters and processor time.

    Args:
        http: Open aiohttp session.
        target: Metrics URL of its target.
        controller: That of its controller; None without one.
        drafter: That of its drafter; None without one.
        groups: Process groups of the servers, by side.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        target: str,
        controller: str | None,
        drafter: str | None,
        groups: Mapping[str, int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._http = http
        self._target = target
        self._remote = [
            (url, names)
            for url, names in ((controller, REMOTE_COUNTERS), (drafter, DRAFTER_COUNTERS))
            if url is not None
        ]
        self._clocks = {side: CpuClock(group) for side, group in groups.items()}
        self._clock = clock

    def cpu_s(self) -> dict[str, float]:
        """Return the processor time of each side's processes; a side that cannot be read is absent."""
        read = {side: clock.read() for side, clock in self._clocks.items()}
        return {side: sum(seconds.values()) for side, seconds in read.items() if seconds}

    async def read(self) -> Counters:
        """Return the counters now."""
        return Counters.total([await self._vllm(), await self._remotes()])

    async def settled(self, rtt_ms: float | None) -> Counters:
        """Return the counters once what has just ended adds nothing more, or after a bounded time."""
        if not self._remote:
            return await self.read()
        floor_s = SETTLE_MIN_S + (rtt_ms or 0.0) / 1000.0
        end_s = self._clock() + floor_s + SETTLE_MAX_S
        await asyncio.sleep(floor_s)
        last = await self._remotes()
        while self._clock() < end_s:
            await asyncio.sleep(SETTLE_POLL_S)
            last, before = await self._remotes(), last
            if all(last.get(name) == before.get(name) for name in RISING):
                break
        return Counters.total([await self._vllm(), last])

    async def _vllm(self) -> Counters:
        values: dict[str, float] = {}
        for sample, _, value in await read_samples(self._http, self._target, VLLM_PREFIX):
            if sample in VLLM_COUNTERS:
                values[VLLM_COUNTERS[sample]] = values.get(VLLM_COUNTERS[sample], 0.0) + value
        return Counters(values)

    async def _remotes(self) -> Counters:
        pages = await asyncio.gather(*(read_samples(self._http, url) for url, _ in self._remote))
        parts = [Counters.of(page, names) for page, (_, names) in zip(pages, self._remote, strict=True)]
        return Counters(Counters.total(parts).values)


class Wan:
    """Sets the round trip of the WAN proxy.

    Args:
        http: Open aiohttp session.
        control_url: The proxy's control API.
        metrics: Metrics URLs of the controllers behind it.
        check_alive: Called while waiting; raises when that has become pointless.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        control_url: str,
        metrics: Sequence[str],
        check_alive: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._http = http
        self._url = control_url
        self._metrics = metrics
        self._check_alive = check_alive
        self._clock = clock

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
        end_s = self._clock() + LINK_DEADLINE_S
        while True:
            anew = (await self._ask("GET", "/counters"))["connections_total"] - before >= len(self._metrics)
            if anew and all([await self._is_near(url, rtt_ms) for url in self._metrics]):
                return True
            if self._clock() > end_s:
                break
            self._check_alive()
            await asyncio.sleep(WAN_POLL_S)
        if anew and all([await link_is_up(self._http, url, DRAFTER_NAME) for url in self._metrics]):
            return False
        raise ClientError(f"the link to the drafter was not up {LINK_DEADLINE_S:.0f} s after the WAN was changed")

    async def _is_near(self, url: str, rtt_ms: float) -> bool:
        labels_of = {name: value for name, _, value in await read_samples(self._http, url, "wanspec_drafter_")}
        measured_ms = 1000.0 * labels_of.get("wanspec_drafter_rtt_seconds", 0.0)
        near_ms = max(NEAR_MS, NEAR_SHARE * rtt_ms) if rtt_ms else NEAR_ZERO_MS
        return labels_of.get("wanspec_drafter_up") == 1.0 and abs(measured_ms - rtt_ms) <= near_ms

    async def _ask(self, method: str, path: str, body: Mapping[str, float] | None = None) -> dict[str, float]:
        timeout = aiohttp.ClientTimeout(total=WAN_TIMEOUT_S)
        try:
            async with self._http.request(method, self._url + path, json=body, timeout=timeout) as response:
                response.raise_for_status()
                answer: dict[str, float] = await response.json()
                return answer
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise ClientError(f"{self._url}{path}: {error or type(error).__name__}") from error
