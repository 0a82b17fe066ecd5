"""What an emulated WAN is like: delay, jitter, losses, bandwidth, outages, and the addresses at its ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from vllm_wanspec.errors import ConfigError

_LIMITS: dict[str, tuple[float, float]] = {
    "rtt_ms": (0.0, 60_000.0),
    "jitter_ms": (0.0, 60_000.0),
    "loss": (0.0, 0.5),
    "bandwidth_mbit": (0.001, 1_000_000.0),
    "start_s": (0.0, 1e9),
    "duration_s": (0.0, 1e9),
}
_MIN_VARIANCE_S = 0.2  # Linux: TCP_RTO_MIN, the floor of 4 · RTTVAR


class Address(NamedTuple):
    """A TCP address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _check_number(name: str, value: Any) -> None:
    low, high = _LIMITS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # which no NaN fulfils
        raise ConfigError(f"{name}: {value!r} is not a number from {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class Outage:
    """A time in which nothing passes; ``start_s`` counts from the start of the proxy, ``duration_s`` from there."""

    start_s: float
    duration_s: float

    def __post_init__(self) -> None:
        _check_number("start_s", self.start_s)
        _check_number("duration_s", self.duration_s)


@dataclass(frozen=True, slots=True)
class WanSettings:
    """What the emulated WAN is like.

    ``rtt_ms``: round trip without jitter, milliseconds.  ``jitter_ms``: extra delay per direction, uniform from 0 to
    this, so that the mean round trip is ``rtt_ms + jitter_ms``.  ``bandwidth_mbit``: megabits per second in each
    direction, None for no limit.  ``outages``: see :class:`Outage`; they may overlap.  ``loss``: probability that a
    segment is lost, which costs delay, see :mod:`vllm_wanspec.emulate.wan_loss`.  :class:`ConfigError` names the field,
    the value and the range.
    """

    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    bandwidth_mbit: float | None = None
    outages: tuple[Outage, ...] = ()
    loss: float = 0.0

    def __post_init__(self) -> None:
        _check_number("rtt_ms", self.rtt_ms)
        _check_number("jitter_ms", self.jitter_ms)
        _check_number("loss", self.loss)
        if self.bandwidth_mbit is not None:
            _check_number("bandwidth_mbit", self.bandwidth_mbit)

    @property
    def retransmission_timeout_s(self) -> float:
        """How long TCP waits for an acknowledgement before it repeats a segment, once it has seen many round trips.

        RFC 6298, section 2: SRTT + 4 · RTTVAR, the latter at least 200 ms as in Linux.
        """
        rtt_s = (self.rtt_ms + self.jitter_ms) / 1e3
        deviation_s = self.jitter_ms / 3e3  # mean deviation of the sum of two uniform jitters
        return rtt_s + max(_MIN_VARIANCE_S, 4.0 * deviation_s)

    def one_way_s(self, rng: Random) -> float:
        """Draw the delay of one direction."""
        return (self.rtt_ms / 2 + rng.uniform(0.0, self.jitter_ms)) / 1e3

    def changed(self, /, **fields: Any) -> WanSettings:
        """Return a copy with these fields; ``outages`` may be any iterable of :class:`Outage` or of their fields.

        :class:`ConfigError` names an unknown field or a bad value.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in fields:
            if name not in known:
                raise ConfigError(f"{name}: no such setting; there are {', '.join(known)}")
        if "outages" in fields:
            fields["outages"] = _to_outages(fields["outages"])
        return dataclasses.replace(self, **fields)

    def outage_end_s(self, now_s: float) -> float | None:
        """Return when the present outage ends, or None if there is none; both in seconds since the start."""
        ends_s = [o.start_s + o.duration_s for o in self.outages if o.start_s <= now_s < o.start_s + o.duration_s]
        return max(ends_s, default=None)


def _to_outages(value: Any) -> tuple[Outage, ...]:
    form = 'a list of {"start_s": ..., "duration_s": ...}'
    if isinstance(value, str | dict) or not isinstance(value, Iterable):
        raise ConfigError(f"outages: {value!r} is not {form}")
    outages = []
    for entry in value:
        if isinstance(entry, Outage):
            outages.append(entry)
        elif isinstance(entry, dict) and entry.keys() == {"start_s", "duration_s"}:
            outages.append(Outage(**entry))
        else:
            raise ConfigError(f"outages: {entry!r} is not an entry of {form}")
    return tuple(outages)
