"""What is read around requests: counters, forwards and processor time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import aiohttp

from vllm_wanspec.lab.harness.counters import CONTROLLER_COUNTERS, DRAFTER_COUNTERS, Counters
from vllm_wanspec.lab.harness.cpu import CpuClock
from vllm_wanspec.lab.harness.pacing_counts import DRAFTS, Paced, read_counts
from vllm_wanspec.lab.harness.scrape import read_samples
from vllm_wanspec.lab.target.colocated import read_counts as read_colocated

VLLM_PREFIX = "vllm:spec_decode_"
VLLM_COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
RTT = "wanspec_drafter_median_rtt_seconds"
#: What the counts of a co-located draft model with lookup are called here.
COLOCATED_NAMES = {
    "accepted_main_line": "accepted_draft",
    "accepted_lookup": "accepted_lookup",
    "drafted_tokens": "offered_draft",
}
#: After a request its session ends once word has crossed the WAN; counters rise until then.
SETTLE_MIN_S = 0.1
SETTLE_MAX_S = 1.0
SETTLE_POLL_S = 0.05
RISING = (
    "branch_seconds",
    "drafted_tokens",
    "received_nodes",
    "target_forwards",
    "local_draft_passes",
    "drafter_forwards",
)


class Probe:
    """Reads one arm's counters and processor time.

    Args:
        http: Open aiohttp session.
        target: Metrics URL of its target.
        controller: That of its controller; None without one.
        drafter: That of its drafter; None without one.
        groups: Process groups of the servers, by side.
        paced: Pacing statistics files of the servers, by side: "target" and "drafter"; what has none is not counted.
        control: Control file of a co-located draft model with lookup, which counts who its accepted tokens came from;
            None for other targets.

    Attributes:
        rtt_ms: The path's round trip, the median of the link's last pings when its controller's counters were last
            read; None without one.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        target: str,
        controller: str | None,
        drafter: str | None,
        groups: Mapping[str, int],
        paced: Mapping[str, Path] | None = None,
        control: Path | None = None,
    ) -> None:
        self._http = http
        self._target = target
        remote = ((controller, CONTROLLER_COUNTERS), (drafter, DRAFTER_COUNTERS))
        self._remote = [(url, names) for url, names in remote if url is not None]
        self._paced = dict(paced or {})
        self._control = control
        self.rtt_ms: float | None = None
        self._clocks = {side: CpuClock(group) for side, group in groups.items()}

    def cpu_s(self) -> dict[str, float]:
        """Return the processor time of each side's processes; a side that cannot be read is absent."""
        read = {side: clock.read() for side, clock in self._clocks.items()}
        return {side: sum(seconds.values()) for side, seconds in read.items() if seconds}

    async def read(self) -> Counters:
        """Return the counters now."""
        return Counters.total([await self._vllm(), await self._rising()])

    async def settled(self, rtt_ms: float | None) -> Counters:
        """Return the counters once what has just ended adds nothing more, or after a bounded time."""
        if not self._remote and not self._paced:
            return await self.read()
        floor_s = SETTLE_MIN_S + (rtt_ms or 0.0) / 1000.0 if self._remote else 0.0
        end_s = time.monotonic() + floor_s + SETTLE_MAX_S
        await asyncio.sleep(floor_s)
        last = await self._rising()
        while time.monotonic() < end_s:
            await asyncio.sleep(SETTLE_POLL_S)
            last, before = await self._rising(), last
            if all(last.get(name) == before.get(name) for name in RISING):
                break
        return Counters.total([await self._vllm(), last])

    async def _vllm(self) -> Counters:
        return Counters.of(await read_samples(self._http, self._target, VLLM_PREFIX), VLLM_COUNTERS, VLLM_PREFIX)

    async def _rising(self) -> Counters:
        """What may still rise when a request has ended: that of controller and drafter, and all forwards."""
        pages = await asyncio.gather(*(read_samples(self._http, url) for url, _ in self._remote))
        read = [Counters.of(page, names) for page, (_, names) in zip(pages, self._remote, strict=True)]
        trips_s = [value for page in pages for name, _, value in page if name == RTT and value > 0.0]
        self.rtt_ms = 1000.0 * max(trips_s) if trips_s else None
        remotes = Counters.total(read)
        return Counters({**remotes.values, **self._forwards(), **self._behind()}, remotes.positions)

    def _behind(self) -> dict[str, float]:
        """Who the tokens came from of a co-located draft model with lookup, in the controller's words."""
        if self._control is None:
            return {}
        counts = read_colocated(self._control)
        return {name: float(counts[own]) for name, own in COLOCATED_NAMES.items()} | {"accepted_branch": 0.0}

    def _forwards(self) -> dict[str, float]:
        """Forwards, as the processes count them that run them."""
        found: dict[str, float] = {}
        for side, path in self._paced.items():
            counts = read_counts(path)
            if counts is not None:
                found |= {f"{side}_forwards": counts.steps, f"{side}_overruns": counts.overruns}
                if side == "target":
                    found |= {"local_draft_passes": counts.draft_steps, "local_draft_overruns": counts.draft_overruns}
                    found |= {"local_draft_paced_ms": counts.draft_paced_ms_total}
        return found


def paced_of(gained: Counters, target: str, drafter: str) -> dict[str, Paced]:
    """Return the forwards that a probe counted, by who ran them; `DRAFTS` marks those of a co-located draft model."""
    names = {"target_forwards": target, "drafter_forwards": drafter, "local_draft_passes": f"{target}{DRAFTS}"}
    found: dict[str, Paced] = {}
    for counter, name in names.items():
        steps, overruns = gained.get(counter), gained.get(f"{counter.rpartition('_')[0]}_overruns")
        if steps and overruns is not None:
            found[name] = Paced(int(steps), int(overruns))
    return found
