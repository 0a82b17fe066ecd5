"""The width bench's figures, and its churning load: one session whose text moves on while the drafter is watched."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TypeVar

import aiohttp

from vllm_wanspec.core.messages import Limits
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.drafter.streams import DrafterClient, DraftTokenizer, Tally, keep_committing
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.cpu import CpuClock

__all__ = ["ChurnRow", "Load", "Meter", "Reading", "Row", "SteadyRow", "Window", "Workload", "contexts", "medians"]

SCRAPE_TIMEOUT_S = 10.0
#: Between a commit and the next: the step of the target that is played.
COMMIT_INTERVAL_S = 0.04
CONTEXT_TOKENS = 400
#: The text's end keeps this far from the model's longest context: a branch near it would be cut short.
MARGIN_TOKENS = 40
LONGEST_LEAD = 128
LOOKAHEAD = LONGEST_LEAD + 64
MAX_NODES = 4096
NEAR = 0.9
CORE = "core"
ENGINE_NAME = "EngineCor"  # the kernel keeps 15 characters
COUNTERS = {
    "wanspec_drafted_tokens_total": "drafted_tokens",
    "wanspec_branches_started_total": "starts",
    "wanspec_branch_seconds_total": "branch_seconds",
    "wanspec_gap_seconds_total": "gap_seconds",
    "wanspec_first_seconds_total": "first_seconds",
    "wanspec_first_tokens_total": "firsts",
}


def branching_everywhere(width: int, lookahead: int, max_branches: int, branch_depth: int) -> Limits:
    """Limits of a session that branches at every position, and runs ``width`` branches if it can."""
    return Limits(
        lookahead=lookahead,
        max_nodes=MAX_NODES,
        max_branches=max_branches,
        running_branches=width,
        branch_depth=branch_depth,
        entropy_threshold_nats=0.0,
        min_probability=0.0,
    )


@dataclass(frozen=True, slots=True)
class Load:
    """What the churning session asks for, and what is committed.

    Args:
        commit_tokens: Tokens of a commit at most.
        branch_depth: Tokens of a side branch.
        max_branches: Tokens followed at each position.
    """

    commit_tokens: int = 1
    branch_depth: int = 16
    max_branches: int = 8

    def limits(self, width: int) -> Limits:
        """The session's, for ``width`` running branches."""
        return branching_everywhere(width, LOOKAHEAD, self.max_branches, self.branch_depth)


@dataclass(frozen=True, slots=True)
class Reading:
    """The drafter's counters at one moment; what it does not serve is 0.

    Attributes:
        at_s: Monotonic seconds.
        counters: By the names in `COUNTERS`.
        cpu_s: Processor time by process name, and that of all programs on the drafter's core.
    """

    at_s: float
    counters: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One window's figures, or their medians.

    Attributes:
        width: Running branches asked for.
        running: Running branches, mean.
        step_ms: Time that a branch takes for a token.
        events_per_s: Tokens drafted.
        starts_per_s: Branches started.
        api_cpu: Seconds per second used by the API server process.
        engine_cpu: The same of the engine process.
        others_cpu: The same of everything else on the drafter's core; 0 where it has none of its own.
    """

    width: int
    running: float
    step_ms: float
    events_per_s: float
    starts_per_s: float
    api_cpu: float
    engine_cpu: float
    others_cpu: float = 0.0

    @property
    def is_near(self) -> bool:
        """Whether about as many branches ran as were asked for."""
        return self.running >= NEAR * self.width

    def as_json(self) -> dict[str, float | bool]:
        """Return the rounded figures."""
        return {name: round(value, 4) for name, value in asdict(self).items()} | {"near_width": self.is_near}


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyRow(Row):
    """A window of the steady load: only the time while about all branches ran; steps without a branch's start.

    Attributes:
        rounds: Sessions, one after another.
        measured_s: Seconds of the window in which about all branches ran.
    """

    rounds: float
    measured_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnRow(Row):
    """A window of the churning load: all of its time; steps with their branches' starts and stops.

    Attributes:
        gap_ms: Time between two tokens of a branch, by vLLM's own count.
        first_ms: Time to a branch's first token, by vLLM's own count.
        bytes_per_s: Received by the controller.
        committed_per_s: Tokens committed.
    """

    gap_ms: float
    first_ms: float
    bytes_per_s: float
    committed_per_s: float


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two readings."""

    before: Reading
    after: Reading
    received_bytes: int
    committed: int

    def row(self, width: int) -> ChurnRow:
        """The window's figures."""
        seconds = self.after.at_s - self.before.at_s
        drafted, started = self._grown("drafted_tokens"), self._grown("starts")
        running_s = self._grown("branch_seconds")
        api, engine, core = (self._cpu(name) / seconds for name in ("api", "engine", CORE))
        return ChurnRow(
            width=width,
            running=running_s / seconds,
            step_ms=_per(1e3 * running_s, drafted),
            gap_ms=_per(1e3 * self._grown("gap_seconds"), self._grown("drafted_tokens") - self._grown("firsts")),
            first_ms=_per(1e3 * self._grown("first_seconds"), self._grown("firsts")),
            events_per_s=drafted / seconds,
            starts_per_s=started / seconds,
            bytes_per_s=self.received_bytes / seconds,
            committed_per_s=self.committed / seconds,
            api_cpu=api,
            engine_cpu=engine,
            others_cpu=max(0.0, core - api - engine),
        )

    def _grown(self, name: str) -> float:
        return self.after.counters.get(name, 0.0) - self.before.counters.get(name, 0.0)

    def _cpu(self, name: str) -> float:
        return self.after.cpu_s.get(name, 0.0) - self.before.cpu_s.get(name, 0.0)


def _per(total: float, count: float) -> float:
    return total / count if count else 0.0


AnyRow = TypeVar("AnyRow", bound=Row)


def medians(rows: Sequence[AnyRow]) -> AnyRow:
    """The medians of one width's windows, figure by figure."""
    columns = {name: statistics.median(asdict(row)[name] for row in rows) for name in asdict(rows[0])}
    return replace(rows[0], **{**columns, "width": rows[0].width})


class Meter:
    """Reads one drafter's counters and its processes' processor time."""

    def __init__(self, http: aiohttp.ClientSession, url: str, cpu: CpuClock) -> None:
        """Read from the server at a base URL."""
        self._http = http
        self._url = url
        self._cpu = cpu

    async def read(self) -> Reading:
        """Read all.

        Raises:
            ClientError: The metrics cannot be read.
        """
        timeout = aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_S)
        try:
            async with self._http.get(f"{self._url}/metrics", timeout=timeout) as response:
                response.raise_for_status()
                text = await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ClientError(f"{self._url}: cannot read metrics: {error or type(error).__name__}") from error
        return Reading(time.monotonic(), _pick(text.splitlines()), self._cpu.read())


def _pick(lines: Iterable[str]) -> dict[str, float]:
    """Sums of the wanted samples; parsing all of a vLLM server's hundreds would disturb what is measured."""
    found: dict[str, float] = {}
    for line in lines:
        name = COUNTERS.get(line.partition("{")[0].partition(" ")[0])
        if name is not None:
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


class Workload:
    """One session after another at one drafter, as wide as its text has candidates for.

    Attributes:
        tally: What they received and committed.
    """

    def __init__(
        self, http: aiohttp.ClientSession, url: str, tokenizer: DraftTokenizer, texts: Sequence[list[int]], seed: int
    ) -> None:
        """Use the drafter at a base URL; ``texts`` are contexts in token ids, ``seed`` draws what is committed."""
        self.tally = Tally()
        self._http, self._url, self._tokenizer = http, url, tokenizer
        self._texts = itertools.cycle(texts)
        self._rng = Random(seed)

    @contextlib.asynccontextmanager
    async def running(self, load: Load, width: int) -> AsyncIterator[None]:
        """Keep a session going while the block runs.

        Raises:
            ClientError: The drafter has ended a session.
        """
        task = asyncio.create_task(self._drive(load, width))
        try:
            yield
            if task.done():
                await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _drive(self, load: Load, width: int) -> None:
        while True:
            # The drafter learns per connection which alternatives are worth a branch: a fresh one for each session
            # keeps what is asked of the engine the same in all windows.
            async with DrafterClient.connect(self._http, self._url, self._tokenizer, tally=self.tally) as client:
                stream = await client.open(next(self._texts), load.limits(width), self._rng)
                longest = client.welcome.max_context - MARGIN_TOKENS
                await keep_committing(stream, COMMIT_INTERVAL_S, load.commit_tokens, LONGEST_LEAD, longest)
                await stream.close()

    async def window(self, meter: Meter, seconds: float) -> Window:
        """Watch for some seconds.

        Raises:
            ClientError: The metrics cannot be read.
        """
        before, received, committed = await meter.read(), self.tally.received_bytes, self.tally.committed
        await asyncio.sleep(seconds)
        received, committed = self.tally.received_bytes - received, self.tally.committed - committed
        return Window(before, await meter.read(), received, committed)


def contexts(prompts: Path, tokenizer: DraftTokenizer, tokens: int = CONTEXT_TOKENS) -> list[list[int]]:
    """Contexts of equal length, each beginning with another held-out prompt.

    Raises:
        ConfigError: The file cannot be read, is malformed, or empty.
    """
    try:
        lines = prompts.read_text("utf-8").splitlines()
        ids = [tokenizer.encode(str(json.loads(line)["prompt"])) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"prompts: cannot use {prompts}: {error or type(error).__name__}") from error
    if not sum(map(len, ids)):
        raise ConfigError(f"prompts: {prompts} has no text")
    found = []
    for first in range(len(ids)):
        text: list[int] = []
        place = first
        while len(text) < tokens:
            text += ids[place % len(ids)]
            place += 1
        found.append(text[:tokens])
    return found
