"""Everything that a run found, and what all reports say of it alike: sources, conditions, why it may mean nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_wanspec.lab.compare.measure import best_gamma
from vllm_wanspec.lab.compare.plan import Options, cells
from vllm_wanspec.lab.compare.references import is_usable
from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE, Paced
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.records import Batch, Cell, Journal, Reference, Trial
from vllm_wanspec.lab.report.document import Table
from vllm_wanspec.lab.stats import rounded

#: So many wrong outputs are named; the result file has all.
SHOWN_DIFFERENCES = 10


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that a run found.

    Attributes:
        options: The run's settings.
        taken: All prompts whose texts were taken, in order, those that are too short included.
        trials: The pre-pass.
        gamma: Draft tokens per step of the co-located draft model; None if that was not measured.
        batches: What was measured.
        paced: Forwards that each server paced, by its name; the draft model's own forwards in the co-located target
            are ``draft_model drafts``.
        provenance: Where the figures come from.
        ended_by: What ended the run before its end; None if nothing did.
    """

    options: Options
    taken: Sequence[Reference]
    trials: Sequence[Trial]
    gamma: int | None
    batches: Sequence[Batch]
    paced: Mapping[str, Paced]
    provenance: Provenance
    ended_by: str | None = None

    @classmethod
    def of(cls, options: Options, journal: Journal, program: str, ended_by: str | None) -> Result:
        """Return everything that a journal has, and ask this machine where that comes from."""
        paced: dict[str, Paced] = {}
        for part in journal.parts:
            for name, (steps, overruns) in part.paced.items():
                before = paced.get(name, Paced(0, 0))
                paced[name] = Paced(before.steps + steps, before.overruns + overruns)
        return cls(
            options=options,
            taken=[reference for _, reference in sorted(journal.references.items())],
            trials=tuple(journal.trials),
            gamma=best_gamma(options, journal.trials),
            batches=tuple(journal.batches),
            paced=paced,
            provenance=Provenance.of_this_run(program, sum(part.seconds for part in journal.parts)),
            ended_by=ended_by,
        )

    @property
    def by_cell(self) -> dict[Cell, list[Batch]]:
        """What was measured of each cell, in the order of concurrency, arms and round trips."""
        found = {cell: [batch for batch in self.batches if batch.cell == cell] for cell in cells(self.options)}
        return {cell: own for cell, own in found.items() if own}

    @property
    def references(self) -> list[Reference]:
        """The measured prompts, in order."""
        return [one for one in self.taken if is_usable(one, self.options)][: self.options.count]

    @property
    def wrong(self) -> tuple[str, ...]:
        """Outputs that differ from the target's own without a floating-point tie, one line each."""
        return tuple(f"{label(batch.cell)}: {line}" for batch in self.batches for line in batch.wrong)

    @property
    def ties(self) -> tuple[str, ...]:
        """Those that part from it at a floating-point tie, likewise."""
        return tuple(f"{label(batch.cell)}: {line}" for batch in self.batches for line in batch.ties)

    def kept_pace(self, servers: Sequence[str] | None = None) -> bool:
        """Whether servers (None: all) kept their pace; not where nothing is known of one. True if none was paced."""
        if self.options.target_pace is None:
            return True
        counts = [self.paced.get(name) for name in (self.paced if servers is None else servers)]
        return bool(counts) and all(one is not None and one.share <= MAX_OVERRUN_SHARE for one in counts)

    @property
    def pacing(self) -> str:
        """What every table's title says."""
        named = ((self.options.target_pace, "target"), (self.options.draft_pace, "draft"))
        paces = [f"{pace.base_ms:g} + {pace.per_token_ms:g} ms ({name})" for pace, name in named if pace is not None]
        if not paces:
            return "not paced"
        scale = self.options.time_scale
        return f"paced to {', '.join(paces)}" + (f", these and R × {scale:g}" if scale != 1.0 else "")

    def conditions(self, what: str) -> str:
        """Return how it was measured, in a paragraph.

        Args:
            what: Which prompts went through what, up to where the texts were cut.
        """
        options = self.options
        times = "once" if options.repeats == 1 else f"{options.repeats} times"
        paced = "nothing is paced"
        if options.target_pace is not None:
            paced = f"{self.pacing}, ms + ms per token, by sleeping in the model forward; everything else is real"
        if options.time_scale != 1.0:
            paced += f". Times are as measured: R = 30 ms took {options.emulated_ms(30.0):g} ms"
        return (
            f"{what}, up to {options.max_tokens} tokens each, cut where the text begins to repeat 16 tokens; {times} "
            "through each arm, arms in changing order; round trips emulated by a proxy; up to "
            f"{options.speculative_tokens} drafts verified per step; greedy decoding through the OpenAI endpoint; "
            f"{paced}. Outputs are compared with the target's own: {len(self.wrong)} differ, {len(self.ties)} "
            "floating-point ties."
        )

    def warnings(self, valid: bool) -> list[str]:
        """Sentences on why the figures may mean nothing."""
        texts = [] if self.ended_by is None else [f"INCOMPLETE: {self.ended_by}."]
        if not valid:
            slow = [f"{one.share:.1%} of {name}" for name, one in self.paced.items() if one.share > MAX_OVERRUN_SHARE]
            known = ", ".join(slow) or "it is unknown how many"
            texts.append(
                f"INVALID: more forwards than {MAX_OVERRUN_SHARE:.0%} took longer than their pace ({known}): this "
                "machine is too slow or too busy for these figures."
            )
        texts += [f"DIFFERENT OUTPUT in {line}" for line in self.wrong[:SHOWN_DIFFERENCES]]
        if len(self.wrong) > SHOWN_DIFFERENCES:
            texts.append(f"… and {len(self.wrong) - SHOWN_DIFFERENCES} more.")
        return texts

    def pace_tables(self) -> list[Table]:
        """The table of forwards slower than their pace; none where none was paced."""
        servers = [[name, f"{one.steps:,}", f"{one.share:.2%}"] for name, one in self.paced.items()]
        table = Table("Forwards slower than their pace", ["server", "forwards", "overruns"], servers)
        return [table] if servers else []

    def state_json(self, valid: bool) -> dict[str, Any]:
        """Return how result files begin."""
        return {"complete": self.ended_by is None, "ended_by": self.ended_by, "valid": valid}

    def pacing_json(self) -> dict[str, Any] | None:
        """Return the paces at time scale 1; None where nothing was paced."""
        target, draft = self.options.target_pace, self.options.draft_pace
        return None if target is None else {"target": target.setting, "draft": draft and draft.setting}

    def overruns_json(self) -> dict[str, Any]:
        """Return per server the share of forwards that took longer than their pace, and how many there were."""
        return {
            "overruns": {name: rounded(paced.share) for name, paced in self.paced.items()},
            "paced_forwards": {name: paced.steps for name, paced in self.paced.items()},
        }


def label(cell: Cell) -> str:
    """Name a cell in a sentence."""
    trip = "" if cell.rtt_ms is None else f", R = {cell.rtt_ms:g} ms"
    return f"{cell.arm}{trip}" + (f", {cell.concurrency} streams" if cell.concurrency > 1 else "")
