"""The capacity bench's figures: rates per client, how many clients a rate allows, and what theory says of both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE, Paced
from vllm_wanspec.lab.harness.wan_control import is_off
from vllm_wanspec.lab.report.cells import UNKNOWN
from vllm_wanspec.lab.stats import divided, rounded
from vllm_wanspec.lab.target.capacity_plan import ADAPTIVE, Arm, CapacityOptions, Load
from vllm_wanspec.lab.target.kinds import COLOCATED, PLAIN, REMOTE

Curve = Sequence[tuple[int, float]]
"""Numbers of clients, rising, and the rate that each gets."""


class Capacity(NamedTuple):
    """So many clients get a rate; ``at_least``: more than that were not tried."""

    clients: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'≥ ' * self.at_least}{self.clients:.1f}"

    def as_json(self) -> dict[str, Any]:
        """Return both."""
        return {"clients": rounded(self.clients), "at_least": self.at_least}


def capacity(curve: Curve, rate: float) -> Capacity | None:
    """Return the largest number of clients of which each gets a rate.

    Between measured numbers the time per token, of which a step's part is affine in the clients, is interpolated.

    Args:
        curve: What was measured.
        rate: Tokens per second and client.

    Returns:
        The number; None if not even the fewest clients that were tried get the rate.
    """
    enough = [place for place, (_, found) in enumerate(curve) if found >= rate]
    if not enough:
        return None
    clients, found = curve[enough[-1]]
    if enough[-1] == len(curve) - 1:
        return Capacity(float(clients), at_least=True)
    more, slower = curve[enough[-1] + 1]
    if slower <= 0.0:
        return Capacity(float(clients))
    return Capacity(clients + (more - clients) * (1.0 / rate - 1.0 / found) / (1.0 / slower - 1.0 / found))


@dataclass(frozen=True, slots=True)
class Row:
    """An arm as it serves a number of clients under a load.

    Attributes:
        load: Its name.
        arm: What drafts.
        rtt_ms: Round trip to the drafter, before scaling; None without one.
        clients: How many send one request after the other.
        rates: Tokens per second of each client, while all of them are served.
        window_s: Seconds in which all of them were.
        tokens: Of all requests, each one's first left out.
        steps: Verifications in which those came.
        drafted: Draft tokens that were verified.
        paced: By server, the forwards that it paced.
        emulated_rtt_ms: The round trip as emulated, scaled; None without one.
        measured_rtt_ms: As the link measured it; None without a link.
        ties: Outputs that part from the target's own at a floating-point tie, one line each.
        wrong: Those that differ without one, likewise.
    """

    load: str
    arm: Arm
    rtt_ms: float | None
    clients: int
    rates: tuple[float, ...]
    window_s: float
    tokens: int
    steps: int
    drafted: float = 0.0
    paced: Mapping[str, Paced] = field(default_factory=dict)
    emulated_rtt_ms: float | None = None
    measured_rtt_ms: float | None = None
    ties: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """The median client's rate."""
        return statistics.median(self.rates)

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens that one verification brings one client."""
        return divided(self.tokens, self.steps)

    @property
    def overruns(self) -> dict[str, float]:
        """The share of forwards that took longer than their pace, by server, where that is too many.

        A single one is not, though a row may have fewer than a hundred forwards: the whole run is judged as well.
        """
        return {
            name: paced.share
            for name, paced in self.paced.items()
            if paced.overruns > 1 and paced.share > MAX_OVERRUN_SHARE
        }

    @property
    def trip_is_off(self) -> bool:
        """Whether the link measured another round trip than was emulated."""
        emulated, measured = self.emulated_rtt_ms, self.measured_rtt_ms
        if emulated is None or measured is None:
            return False
        return is_off(measured, emulated, time_scale=emulated / self.rtt_ms if self.rtt_ms else 1.0)

    @property
    def is_valid(self) -> bool:
        """Whether pace and round trip were kept, the outputs were right and all clients were served at once."""
        return not (self.overruns or self.trip_is_off or self.wrong) and self.window_s > 0.0

    def as_json(self) -> dict[str, Any]:
        """Return what was measured."""
        return {
            "load": self.load,
            "arm": self.arm.kind,
            "gamma": self.arm.gamma or None,
            "rtt_ms": self.rtt_ms,
            "clients": self.clients,
            "rate": rounded(self.rate),
            "rates": [rounded(rate) for rate in self.rates],
            "window_s": rounded(self.window_s),
            "tokens": self.tokens,
            "steps": self.steps,
            "tokens_per_step": rounded(self.tokens_per_step),
            "drafted_per_step": rounded(divided(self.drafted, self.steps)),
            "measured_rtt_ms": rounded(self.measured_rtt_ms),
            "paced": {name: paced._asdict() for name, paced in self.paced.items()},
            "ties": list(self.ties),
            "wrong": list(self.wrong),
            "valid": self.is_valid,
        }


class Against(NamedTuple):
    """Remote against co-located drafting at one number of drafts per step.

    Attributes:
        load: The load's name.
        gamma: Draft tokens per step.
        rtt_ms: Round trip of the remote ones.
        rate: Tokens per second that each client is to get.
        colocated: Clients of co-located drafting at that rate.
        remote: Those of remote drafting; None where a single one does not get it.
        identity: 1 + γ·t_d/t_v at the co-located number of clients.
        batched: What `Load.capacity_ratio` says at the co-located tokens per step.
    """

    load: str
    gamma: int
    rtt_ms: float
    rate: float
    colocated: Capacity
    remote: Capacity | None
    identity: float
    batched: float | None

    @property
    def ratio(self) -> float | None:
        """Remote ÷ co-located clients; a lower bound where more clients were not tried."""
        return None if self.remote is None else self.remote.clients / self.colocated.clients

    @property
    def ratio_text(self) -> str:
        """The ratio, marked where it is a bound."""
        if self.remote is None or self.ratio is None:
            return UNKNOWN
        return f"{'≥ ' * self.remote.at_least}{self.ratio:.2f}"

    def as_json(self) -> dict[str, Any]:
        """Return clients, ratio and theory."""
        return {
            "load": self.load,
            "gamma": self.gamma,
            "rtt_ms": self.rtt_ms,
            "rate": rounded(self.rate),
            "colocated": self.colocated.as_json(),
            "remote": None if self.remote is None else self.remote.as_json(),
            "ratio": rounded(self.ratio),
            "identity": rounded(self.identity),
            "batched": rounded(self.batched),
        }


class Factors(NamedTuple):
    """Why remote drafting's rate is another than co-located drafting's at the same number of clients.

    Attributes:
        clients: So many.
        rate: Remote ÷ co-located rate per client.
        tokens: The same of tokens per step; the rest is time per step.
        drafted: Drafts that a step of remote drafting verifies, per client: where they come late, fewer than γ.
        paces: Co-located ÷ remote time per step as the paces say, for so many drafts.
        identity: 1 + γ·t_d/t_v: the same if all γ were there.
    """

    clients: int
    rate: float
    tokens: float
    drafted: float
    paces: float
    identity: float

    @property
    def time(self) -> float:
        """Co-located ÷ remote time per step as it was measured."""
        return self.rate / self.tokens

    def as_json(self) -> dict[str, Any]:
        """Return all of them."""
        return {name: rounded(value) for name, value in self._asdict().items()} | {"time": rounded(self.time)}


@dataclass(frozen=True, slots=True)
class CapacityResult:
    """All rows of a run."""

    options: CapacityOptions
    rows: Sequence[Row]

    @property
    def held(self) -> bool:
        """Whether every row means something and the run kept its paces: no bar is set on what the rows say."""
        return bool(self.rows) and all(row.is_valid for row in self.rows) and not self.overruns

    @property
    def paced(self) -> dict[str, Paced]:
        """The forwards of all rows, by load and server."""
        sums: dict[str, Paced] = {}
        for row in self.rows:
            for name, paced in row.paced.items():
                key = f"{row.load}, {name}"
                sums[key] = sums.get(key, Paced(0, 0)).plus(paced)
        return sums

    @property
    def overruns(self) -> dict[str, float]:
        """The share of forwards that took longer than their pace, by load and server, where that is too many."""
        return {name: paced.share for name, paced in self.paced.items() if paced.share > MAX_OVERRUN_SHARE}

    def row(self, load: Load, arm: Arm, rtt_ms: float | None, clients: int) -> Row | None:
        """Return a row that means something."""
        wanted = (load.name, arm, rtt_ms, clients)
        return next((one for one in self.rows if one.is_valid and _key(one) == wanted), None)

    def curve(self, load: Load, arm: Arm, rtt_ms: float | None = None) -> list[tuple[int, float]]:
        """Return an arm's rates against clients, as far as the rows mean something."""
        found = [(count, self.row(load, arm, rtt_ms, count)) for count in load.clients]
        return [(count, row.rate) for count, row in found if row is not None]

    def best_gamma(self, load: Load, clients: int) -> int | None:
        """Return the γ at which co-located drafting is fastest for a number of clients."""
        rows = [self.row(load, Arm(COLOCATED, gamma), None, clients) for gamma in self.options.gammas]
        found = [row for row in rows if row is not None]
        return max(found, key=lambda row: row.rate).arm.gamma if found else None

    def against(self, load: Load, gamma: int, rtt_ms: float) -> list[Against]:
        """Compare capacities at the rates that co-located drafting gives all but its largest number of clients."""
        ours = self.curve(load, Arm(REMOTE, gamma), rtt_ms)
        theirs = self.curve(load, Arm(COLOCATED, gamma))
        if not theirs:
            return []
        per_step = self._per_step(load, gamma)
        found = []
        for _, rate in theirs[:-1]:
            below = capacity(theirs, rate)
            if below is None or below.at_least:
                continue
            step_ms = 1000.0 * per_step / rate / self.options.time_scale
            theory = (load.identity(below.clients, gamma), load.capacity_ratio(step_ms, gamma))
            found.append(Against(load.name, gamma, rtt_ms, rate, below, capacity(ours, rate), *theory))
        return found

    def factors(self, load: Load, gamma: int, rtt_ms: float) -> list[Factors]:
        """Say what makes the difference, for each number of clients at which both sides' rows mean something."""
        found = []
        for clients in load.clients:
            ours = self.row(load, Arm(REMOTE, gamma), rtt_ms, clients)
            theirs = self.row(load, Arm(COLOCATED, gamma), None, clients)
            if ours is None or theirs is None:
                continue
            rate, tokens = divided(ours.rate, theirs.rate), divided(ours.tokens_per_step, theirs.tokens_per_step)
            drafted = divided(ours.drafted, ours.steps)
            if rate is None or not tokens or drafted is None:
                continue
            colocated_ms = load.verifying_ms(clients, gamma) + load.drafting_ms(clients, gamma)
            paces = colocated_ms / load.verifying_ms(clients, drafted)
            found.append(Factors(clients, rate, tokens, drafted, paces, load.identity(clients, gamma)))
        return found

    def compared(self) -> list[Against]:
        """Return all comparisons of capacities."""
        options = self.options
        return [
            one
            for load in options.loads
            for gamma in options.gammas
            for rtt_ms in options.rtt_ms
            for one in self.against(load, gamma, rtt_ms)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return what the result file has beside where it comes from."""
        return {
            "held": self.held,
            "paced": {name: paced._asdict() for name, paced in self.paced.items()},
            **self.options.as_json(),
            "capacities": [one.as_json() for one in self.compared()],
            "factors": [
                {"load": load.name, "gamma": gamma, "rtt_ms": rtt_ms} | one.as_json()
                for load in self.options.loads
                for gamma in self.options.gammas
                for rtt_ms in self.options.rtt_ms
                for one in self.factors(load, gamma, rtt_ms)
            ],
            "rows": [row.as_json() for row in self.rows],
        }

    def _per_step(self, load: Load, gamma: int) -> float:
        """Tokens per step of co-located drafting, the mean over its numbers of clients."""
        rows = [self.row(load, Arm(COLOCATED, gamma), None, clients) for clients in load.clients]
        return statistics.fmean(row.tokens_per_step or 0.0 for row in rows if row is not None)


def _key(row: Row) -> tuple[str, Arm, float | None, int]:
    return row.load, row.arm, row.rtt_ms, row.clients


TITLES = {
    PLAIN: "plain",
    COLOCATED: "co-located",
    REMOTE: "remote",
    ADAPTIVE: "adaptive",
}


def title(arm: Arm, rtt_ms: float | None) -> str:
    """What tables and plots call an arm; without γ."""
    return TITLES[arm.kind] if rtt_ms is None else f"{TITLES[arm.kind]}, R = {rtt_ms:g} ms"
