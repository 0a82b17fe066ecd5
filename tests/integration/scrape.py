"""Counters of running servers, read from their Prometheus pages; and waiting until something holds."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from .fleet import Target
from .records import note

LEAST_ACCEPTED = 300
LEAST_REJECTED = 300
FILLERS_RIGHT = 0.05
POLL_S = 0.05
WAIT_S = 60.0


class Page:
    """One reading of a metrics page."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self._samples = [sample for family in families for sample in family.samples]

    def get(self, name: str, **labels: str) -> float:
        """Sum of the samples called ``name`` that have these labels; there must be one."""
        values = [s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()]
        assert values, f"no metric {name} with {labels}"
        return sum(values)


@dataclass(frozen=True)
class Drafts:
    """Tokens that a drafter made: neither prompt lookup's nor what fills drafts up counts."""

    accepted: int
    rejected: int

    def __sub__(self, other: "Drafts") -> "Drafts":
        return Drafts(self.accepted - other.accepted, self.rejected - other.rejected)


async def read_page(http: aiohttp.ClientSession, url: str) -> Page:
    async with http.get(url, timeout=aiohttp.ClientTimeout(total=10.0)) as response:
        assert response.status == 200, f"{url} answered {response.status}"
        return Page(await response.text())


async def vllm_page(http: aiohttp.ClientSession, target: Target) -> Page:
    return await read_page(http, target.url + "/metrics")


async def wanspec_page(http: aiohttp.ClientSession, target: Target) -> Page:
    assert target.metrics_url is not None
    return await read_page(http, target.metrics_url)


async def read_drafts(http: aiohttp.ClientSession, target: Target) -> Drafts:
    page = await wanspec_page(http, target)
    accepted = sum(int(page.get(f"wanspec_accepted_{source}_total")) for source in ("main_line", "branch"))
    return Drafts(accepted, int(page.get("wanspec_offered_drafted_total")) - accepted)


async def is_up(http: aiohttp.ClientSession, target: Target, drafter: str) -> bool:
    """Whether the controller says that a drafter serves it."""
    return (await wanspec_page(http, target)).get("wanspec_drafter_up", drafter=drafter) == 1.0


@asynccontextmanager
async def drafts_decide(
    http: aiohttp.ClientSession, target: Target, accepted: int = LEAST_ACCEPTED, rejected: int = LEAST_REJECTED
) -> AsyncIterator[None]:
    """Fail a block that says nothing: so many drafts must be accepted and rejected in it."""
    before = await read_drafts(http, target)
    yield
    drafts = await read_drafts(http, target) - before
    print(f"drafts accepted {drafts.accepted}, rejected {drafts.rejected}")
    note(accepted=drafts.accepted, rejected=drafts.rejected)
    assert drafts.accepted >= accepted, f"vacuous: only {drafts.accepted} drafts accepted"
    assert drafts.rejected >= rejected, f"vacuous: only {drafts.rejected} drafts rejected"


@asynccontextmanager
async def each_is_somebody_s(http: aiohttp.ClientSession, target: Target, fillers: bool = False) -> AsyncIterator[None]:
    """Fail a block in which the controller does not say of each draft that vLLM accepted who made it.

    ``fillers`` says that drafts are filled up with tokens that nobody made, a few of which are right by chance.
    """
    accepted, made = await _accepted(http, target), await _makers(http, target)
    yield

    async def same() -> bool:
        count = await _accepted(http, target) - accepted
        by_maker = [now - then for now, then in zip(await _makers(http, target), made, strict=True)]
        print(f"accepted {count}; by main line, branch and lookup: {by_maker}")
        return 0 <= count - sum(by_maker) <= (FILLERS_RIGHT * count if fillers else 0)

    await until(same, "vLLM's count of accepted drafts is the controller's", limit_s=5.0)


async def _accepted(http: aiohttp.ClientSession, target: Target) -> float:
    """Draft tokens that the target took, as vLLM counts them."""
    return (await vllm_page(http, target)).get("vllm:spec_decode_num_accepted_tokens_total")


async def _makers(http: aiohttp.ClientSession, target: Target) -> list[float]:
    """Accepted draft tokens of the main line, of branches and of prompt lookup, as the controller counts them."""
    page = await wanspec_page(http, target)
    return [page.get(f"wanspec_accepted_{maker}_total") for maker in ("main_line", "branch", "lookup")]


async def until(condition: Callable[[], Awaitable[bool]], what: str, limit_s: float = WAIT_S) -> None:
    """Wait until a condition holds; fail after ``limit_s`` seconds."""
    deadline_s = time.monotonic() + limit_s
    while not await condition():
        assert time.monotonic() < deadline_s, f"not within {limit_s:.0f} s: {what}"
        await asyncio.sleep(POLL_S)
