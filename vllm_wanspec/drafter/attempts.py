"""Attempts to come in that failed: how long the next answer to the same address waits, and what the log says of them.

Everything here is bounded, whoever knocks: addresses remembered, answers held back, lines logged.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from ipaddress import IPv6Address, ip_address, ip_network

from vllm_wanspec.text import printable

logger = logging.getLogger("vllm.wanspec.drafter")

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 8.0
"""Doubled per failure up to this; below the 10 s that a controller waits for its answer."""
FORGET_S = 600.0
MAX_ADDRESSES = 4096
MAX_HELD = 64
MAX_HELD_PER_ADDRESS = 4
"""An honest controller with a wrong token has one attempt under way."""
LOG_INTERVAL_S = 60.0
IPV6_SITE_BITS = 64
"""What one subscriber has of IPv6, and can change at will below."""


class Attempts:
    """Failed attempts by address."""

    def __init__(self) -> None:
        """Nobody has failed yet."""
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Answers that are held back now."""
        return self._held.total()

    def crowded(self, host: str) -> bool:
        """Whether another attempt from there is refused unheard: so many are held back that it could not be slowed."""
        site = _site(host)
        return self._held[site] >= MAX_HELD_PER_ADDRESS or (self.held >= MAX_HELD and self._count(site) > 0)

    async def failed(self, host: str) -> None:
        """An attempt from there was wrong: holds its answer back, if there is room for that."""
        site, now_s = _site(host), asyncio.get_running_loop().time()
        count = self._count(site)
        self._failures[site] = count + 1, now_s
        self._failures.move_to_end(site)
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)
        if self.held >= MAX_HELD:
            return
        self._held[site] += 1
        try:
            await asyncio.sleep(min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(count, 30)))
        finally:
            self._held[site] -= 1
            if not self._held[site]:
                del self._held[site]

    def _count(self, site: str) -> int:
        """Failures from there that are not forgotten."""
        count, last_s = self._failures.get(site, (0, 0.0))
        return count if asyncio.get_running_loop().time() - last_s < FORGET_S else 0


class RefusalLog:
    """Refusals in the log: the first at once, and what follows within a minute as one line with its number."""

    def __init__(self) -> None:
        """Nobody has been refused yet."""
        self._more = 0
        self._last = ""
        self._timer: asyncio.TimerHandle | None = None

    def note(self, who: str, why: str) -> None:
        """Somebody is refused.

        Args:
            who: What asked, and from where, as in "controller at 192.0.2.1:4711".
            why: The reason.
        """
        if self._timer is None:
            logger.warning("%s refused: %s", who, why)
            self._wait()
        else:
            self._more += 1
            self._last = f"{who}: {why}"

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LOG_INTERVAL_S, self._tell)

    def _tell(self) -> None:
        self._timer = None
        if self._more:
            logger.warning("%d more attempts refused in the last minute; the last by %s", self._more, self._last)
            self._more = 0
            self._wait()


def _site(host: str) -> str:
    """What failures are counted by: an address, or the network that one of IPv6 is in."""
    try:
        address = ip_address(host)
    except ValueError:
        return printable(host, 80)
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or ip_network((int(address), IPV6_SITE_BITS), strict=False))
    return str(address)
