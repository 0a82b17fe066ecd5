"""What the side-by-side bench writes down: prompts with the target's own text, and the batches that each arm served.

A journal takes every record as it is made, so that an interrupted run goes on where it stopped. Plain values alone: no
servers, no clock.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.pacing_counts import Paced


class Cell(NamedTuple):
    """One thing that is compared: an arm, the round trip to its drafter (None: it has none), and the concurrency."""

    arm: str
    rtt_ms: float | None
    concurrency: int


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
    """

    index: int
    name: str
    text: str
    prompt_ids: tuple[int, ...]
    expected: tuple[int, ...]
    ranks: tuple[int | None, ...]
    generated: int = 0
    time_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the client saw it.

    Attributes:
        prompt: Index of its `Reference`.
        ttft_ms: From sending it to its first token.
        time_ms: From its first token to its last.
        tokens: Tokens after the first.
        steps: Pieces in which they arrived, each from one verification step.
    """

    prompt: int
    ttft_ms: float
    time_ms: float
    tokens: int
    steps: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that one arm served together: a single one at concurrency 1, all prompts above.

    Attributes:
        cell: Arm, round trip and concurrency.
        repeat: Which time round, from 0.
        seconds: From the first request's sending to the last one's end.
        requests: All of them.
        counters: What they added to the counters of target, controller and drafter.
        cpu_s: Processor time by side, ``target`` and ``drafter``; a side without a server is absent.
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


class Trial(NamedTuple):
    """The pre-pass: milliseconds per token of co-located speculation with ``gamma`` draft tokens."""

    gamma: int
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class Part:
    """One start of the command, up to its end or to what interrupted it.

    Attributes:
        seconds: Its duration.
        paced: By server, the forwards that it paced.
    """

    seconds: float
    paced: Mapping[str, Paced] = field(default_factory=dict)


class Journal:
    """The records of one run, on disk as they are made: one JSON object per line, the run's settings first.

    Attributes:
        references: Prompts, by index.
        trials: The pre-pass.
        batches: What was measured.
        parts: The starts of the command that have ended.
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
        self.path = path
        self.references: dict[int, Reference] = {}
        self.trials: list[Trial] = []
        self.batches: list[Batch] = []
        self.parts: list[Part] = []
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

    def add(self, record: Reference | Trial | Batch | Part) -> None:
        """Keep a record."""
        kind = type(record).__name__.lower()
        content = record._asdict() if isinstance(record, Trial) else asdict(record)
        if isinstance(record, Batch):  # JSON has no keys of two parts
            content["counters"]["positions"] = [[*key, count] for key, count in record.counters.positions.items()]
        self._write({kind: content})
        self._take({kind: json.loads(json.dumps(content))})

    def done(self, cell: Cell, repeat: int) -> set[int]:
        """Prompts that a cell has been through."""
        batches = [batch for batch in self.batches if batch.cell == cell and batch.repeat == repeat]
        return {request.prompt for batch in batches for request in batch.requests}

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

    def _take(self, record: dict[str, Any]) -> None:
        match record:
            case {"reference": dict(fields)}:
                lists = {name: tuple(fields[name]) for name in ("prompt_ids", "expected", "ranks")}
                reference = Reference(**(fields | lists))
                self.references[reference.index] = reference
            case {"trial": dict(fields)}:
                self.trials.append(Trial(**fields))
            case {"part": dict(fields)}:
                paced = {name: Paced(*counts) for name, counts in fields["paced"].items()}
                self.parts.append(Part(fields["seconds"], paced))
            case {"batch": dict(fields)}:
                requests = tuple(Request(**request) for request in fields["requests"])
                gained = fields["counters"]
                positions = {(entropy, outcome): count for entropy, outcome, count in gained["positions"]}
                made: dict[str, Any] = {"cell": Cell(*fields["cell"]), "requests": requests}
                made |= {name: tuple(fields[name]) for name in ("ties", "wrong")}
                made["counters"] = Counters(gained["values"], positions)
                self.batches.append(Batch(**(fields | made)))


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
