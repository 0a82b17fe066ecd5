"""What the side-by-side bench writes down: prompts with the target's own text, and the batches that each arm served.

A journal takes every record as it is made, so that an interrupted run goes on where it stopped; a result file holds the
same records, so that its tables can be made again. Plain values alone: no servers, no clock.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.stats import rounded


class Load(NamedTuple):
    """How requests come: so many at a time; or, with a rate, that many per second at random, however many then run."""

    concurrency: int = 1
    rate: float | None = None

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}" if self.rate is None else f"{self.rate:g} requests per second"


class Cell(NamedTuple):
    """One thing that is compared: an arm, the round trip to its drafter in ms (None: it has none), and the load."""

    arm: str
    rtt_ms: float | None
    concurrency: int = 1
    rate: float | None = None

    @property
    def load(self) -> Load:
        """How its requests come."""
        return Load(self.concurrency, self.rate)

    @property
    def single(self) -> bool:
        """Whether one request runs at a time."""
        return self.load == Load()


class Setting(NamedTuple):
    """What the pre-pass tries for an arm: draft tokens per step, for vLLM's prompt lookup the n-grams sought, and where
    tokens are sampled how a co-located draft model samples its own (vLLM's ``draft_sample_method``; empty: greedily).
    """

    draft_tokens: int
    ngram_min: int = 0
    ngram_max: int = 0
    sampling: str = ""

    def __str__(self) -> str:
        ngrams = f", n-grams of {self.ngram_min} to {self.ngram_max}" if self.ngram_max else ""
        return f"γ = {self.draft_tokens}{ngrams}" + (f", {self.sampling} drafts" if self.sampling else "")


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt and what the target makes of it alone.

    Attributes:
        index: Number of the prompt.
        name: Where it was taken from.
        text: The prompt.
        prompt_ids: Its token ids.
        expected: The target's own greedy token ids, up to where they begin to repeat.
        ranks: For each of them its place among the draft model's eight most probable tokens there, 0 for the most
            probable one; None for a token outside.
        generated: Tokens of the whole text.
        time_ms: From the first expected token to the last, decoded by the target alone.
        kind: Of text, such as ``code``.
    """

    index: int
    name: str
    text: str
    prompt_ids: tuple[int, ...]
    expected: tuple[int, ...]
    ranks: tuple[int | None, ...]
    generated: int = 0
    time_ms: float = 0.0
    kind: str = "code"


@dataclass(frozen=True)
class Request:
    """One request as the client saw it.

    Attributes:
        prompt: Index of its `Reference`.
        arrivals: Of each piece that came, which is what one step yielded, milliseconds since the request was sent, and
            number of tokens; at least one.
    """

    prompt: int
    arrivals: tuple[tuple[float, int], ...]

    @property
    def ttft_ms(self) -> float:
        """From sending it to its first token."""
        return self.arrivals[0][0]

    @property
    def time_ms(self) -> float:
        """From its first token to its last."""
        return self.arrivals[-1][0] - self.arrivals[0][0]

    @cached_property
    def tokens(self) -> int:
        """Tokens after the first."""
        return sum(count for _, count in self.arrivals) - 1

    @property
    def steps(self) -> int:
        """Pieces after the first, each from one verification step."""
        return len(self.arrivals) - 1

    @cached_property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between each token and the next; 0 between two that came together."""
        at_ms = [arrived_ms for arrived_ms, count in self.arrivals for _ in range(count)]
        return [after_ms - before_ms for before_ms, after_ms in pairwise(at_ms)]


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that one arm served together: a single one at concurrency 1, all prompts above.

    Attributes:
        cell: Arm, round trip and load.
        repeat: Which time round, from 0.
        seconds: From the first request's sending to the last one's end.
        requests: All of them.
        counters: What they added to the counters of target, controller and drafter, and to those of their pacers.
        cpu_s: Processor time by side, ``target`` and ``drafter``; a side without a server is absent.
        rtt_ms: The round trip as the controller's link measured it, as emulated (not divided by a time scale); None
            without a link.
        ties: Outputs that part from the target's own at a floating-point tie, one line each.
        wrong: Those that differ without one, likewise.
    """

    cell: Cell
    repeat: int
    seconds: float
    requests: tuple[Request, ...]
    counters: Counters = field(default_factory=Counters)
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    ties: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    rtt_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """The pre-pass: milliseconds per token of an arm with one of its settings, under one load."""

    arm: str
    load: Load
    setting: Setting
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class Serving:
    """What a target really runs with.

    Attributes:
        server: Its name.
        arms: The arms that it serves.
        facts: JSON values: command and environment, our settings in effect, what was observed in the process.
    """

    server: str
    arms: tuple[str, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One start of the command, up to its end or to what interrupted it: its duration in seconds."""

    seconds: float


Record: TypeAlias = Reference | Trial | Batch | Serving | Part


class Records:
    """What was written down of one run.

    Attributes:
        references: Prompts, by index.
        trials: The pre-pass.
        batches: What was measured.
        servings: What targets ran with, by name.
        parts: The starts of the command that have ended.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        """Read records as `as_json` gives them."""
        self.references: dict[int, Reference] = {}
        self.trials: list[Trial] = []
        self.batches: list[Batch] = []
        self.servings: dict[str, Serving] = {}
        self.parts: list[Part] = []
        self._counter_names: list[str] = []
        for record in records:
            self._take(record)

    def as_json(self) -> list[dict[str, Any]]:
        """Return all of them as JSON objects, each with its kind as its one key.

        Without the prompts' texts; counters go by place, and are named once, before all batches.
        """
        found: list[Record] = [replace(one, text="") for _, one in sorted(self.references.items())]
        found += [*self.trials, *self.servings.values(), *self.batches, *self.parts]
        names = sorted({name for batch in self.batches for name in batch.counters.values})
        told = [_as_json(record) for record in found]
        for counters in (record["batch"]["counters"] for record in told if "batch" in record):
            counters["values"] = list(map(counters["values"].get, names))
        return [{"counters": names}, *told]

    def done(self, cell: Cell, repeat: int) -> set[int]:
        """Prompts that a cell has been through."""
        batches = [batch for batch in self.batches if batch.cell == cell and batch.repeat == repeat]
        return {request.prompt for batch in batches for request in batch.requests}

    def _take(self, record: Mapping[str, Any]) -> None:
        match record:
            case {"reference": dict(fields)}:
                lists = {name: tuple(fields[name]) for name in ("prompt_ids", "expected", "ranks")}
                reference = Reference(**(fields | lists))
                self.references[reference.index] = reference
            case {"trial": dict(fields)}:
                made = {"load": Load(*fields["load"]), "setting": Setting(*fields["setting"])}
                self.trials.append(Trial(**(fields | made)))
            case {"serving": dict(fields)}:
                self.servings[fields["server"]] = Serving(fields["server"], tuple(fields["arms"]), fields["facts"])
            case {"part": dict(fields)}:
                self.parts.append(Part(**fields))
            case {"counters": list(names)}:
                self._counter_names = names
            case {"batch": dict(fields)}:
                self.batches.append(_batch_of(fields, self._counter_names))


def _as_json(record: Record) -> dict[str, Any]:
    """A record as a JSON object; of a batch, figures to four decimals, and only positions that were counted."""
    content = asdict(record)
    if isinstance(record, Batch):
        gained = record.counters
        positions = [[*key, rounded(count)] for key, count in gained.positions.items() if count]
        content["counters"] = {"values": _rounded(gained.values), "positions": positions}
        content["cpu_s"] = _rounded(record.cpu_s)
        content |= {name: rounded(content[name]) for name in ("seconds", "rtt_ms")}
    return {type(record).__name__.lower(): content}


def _rounded(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: rounded(figure) for name, figure in figures.items()}


def _batch_of(fields: dict[str, Any], names: Sequence[str]) -> Batch:
    """Read a batch whose counters go by name, as in a journal, or by the place of ``names``."""
    gained = fields["counters"]
    values = gained["values"]
    if isinstance(values, list):
        values = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    positions = {(entropy, outcome): count for entropy, outcome, count in gained["positions"]}
    made: dict[str, Any] = {"cell": Cell(*fields["cell"]), "counters": Counters(values, positions)}
    made["requests"] = tuple(
        Request(one["prompt"], tuple((at_ms, count) for at_ms, count in one["arrivals"])) for one in fields["requests"]
    )
    made |= {name: tuple(fields[name]) for name in ("ties", "wrong")}
    return Batch(**(fields | made))


class Journal(Records):
    """The records of one run, on disk as they are made: one JSON object per line, the run's settings first.

    Attributes:
        resumed: Whether there were records already.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Take up the journal at ``path``, or begin it.

        Args:
            path: Its file.
            run: All that must be the same for records to belong together; JSON values.

        Raises:
            ConfigError: The file is of another run, or cannot be read or written.
        """
        super().__init__()
        self.path = path
        settings: dict[str, Any] = json.loads(json.dumps(run))
        try:
            lines = path.read_text("utf-8").splitlines() if path.exists() else []
            # A line that was cut off in the middle is the last one, and its record is made again.
            records = [record for line in lines if (record := _parsed(line)) is not None]
            if records and records[0] != {"run": settings}:
                raise ConfigError(_other_run(path, records[0].get("run"), settings))
            for record in records[1:]:
                self._take(record)
            self._file = path.open("a", encoding="utf-8")
            if not records:
                self._file.truncate(0)
                self._write({"run": settings})
            elif len(records) < len(lines):
                self._file.write("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot keep the journal {path}: {error}") from error
        self.resumed = len(records) > 1

    def add(self, record: Record) -> None:
        """Keep a record."""
        content = _as_json(record)
        self._write(content)
        self._take(json.loads(json.dumps(content)))

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete the file: the result says it all."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _other_run(path: Path, found: Any, wanted: Mapping[str, Any]) -> str:
    old = found if isinstance(found, dict) else {}
    names = [name for name in (*wanted, *old) if old.get(name, math.nan) != wanted.get(name, math.nan)]
    what = ", ".join(dict.fromkeys(names))
    return f"{path} is the journal of a run with another {what}: delete it, or write this run's result elsewhere"
