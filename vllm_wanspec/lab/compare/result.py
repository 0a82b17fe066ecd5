"""Everything that a run found, and what all reports say of it alike: sources, conditions, why it may mean nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_wanspec.core.analysis.ideal import TextLookup
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.arms import Arm
from vllm_wanspec.lab.compare.plan import Options, cells
from vllm_wanspec.lab.compare.prepass import best_setting
from vllm_wanspec.lab.compare.references import is_usable
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE, Paced
from vllm_wanspec.lab.harness.probes import paced_of
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.harness.wan_control import expected_ms, is_off
from vllm_wanspec.lab.records import Batch, Cell, Load, Records, Reference, Setting
from vllm_wanspec.lab.report.document import Table
from vllm_wanspec.lab.stats import median, rounded

#: So many wrong outputs are named; the result file has all.
SHOWN_DIFFERENCES = 10
#: vLLM's count of accepted drafts and ours by source may differ by this share: requests end while counters are read.
SOURCES_SHARE = 0.01
#: Co-located draft forwards are paced if they were stretched to this share of the least pace: sums are rounded.
PACED_SHARE = 0.999
CPU_SCHEDULING = ", plain vLLM's included (its CPU build has none; on a GPU plain and co-located arms would have it)"
SOURCES = ("accepted_main_line", "accepted_branch", "accepted_lookup")


@dataclass(frozen=True)
class Result:
    """Everything that a run found.

    Attributes:
        options: The run's settings.
        records: What was written down of it.
        provenance: Where the figures come from.
        ended_by: What ended the run before its end; None if nothing did.
    """

    options: Options
    records: Records
    provenance: Provenance
    ended_by: str | None = None

    @classmethod
    def of(cls, options: Options, records: Records, begun: Provenance, ended_by: str | None) -> Result:
        """Return everything that records have; ``begun`` is where the run began."""
        return cls(options, records, begun.after(sum(part.seconds for part in records.parts)), ended_by)

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Result:
        """Read a result file's content.

        Raises:
            ConfigError: It holds no run of this bench.
        """
        try:
            options, records = Options.of_json(data["options"]), Records(data["records"])
            return cls(options, records, Provenance.of_json(data), data["ended_by"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"this is not a result of wanspec bench ({type(error).__name__}: {error})") from error

    @property
    def taken(self) -> list[Reference]:
        """All prompts whose texts were taken, in order, those that are too short included."""
        return [reference for _, reference in sorted(self.records.references.items())]

    @property
    def on_gpu(self) -> bool:
        """Whether the run's machine had a GPU."""
        return "GPU" in self.provenance.machine

    @property
    def batches(self) -> Sequence[Batch]:
        """What was measured."""
        return self.records.batches

    def setting(self, arm: Arm, load: Load) -> Setting | None:
        """What the pre-pass chose for an arm under a load; None where nothing is tuned."""
        return best_setting(self.options, self.records.trials, arm, load)

    def lookup(self, reference: Reference) -> TextLookup:
        """What prompt lookup gives in a text."""
        if reference.index not in self._lookups:
            self._lookups[reference.index] = TextLookup(reference.prompt_ids, reference.expected)
        return self._lookups[reference.index]

    @cached_property
    def _lookups(self) -> dict[int, TextLookup]:
        return {}

    def observed(self, arm: Arm, name: str) -> Any:
        """What was observed of an arm's target; None if nothing was."""
        known = [one.facts["observed"] for one in self.records.servings.values() if arm.name in one.arms]
        return next((facts.get(name) for facts in known if facts is not None), None)

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

    @cached_property
    def paced(self) -> dict[str, Paced]:
        """Forwards by server, and those slower than their pace; `DRAFTS` marks those of co-located draft models."""
        found: dict[str, Paced] = {}
        for batch in self.batches:
            target = self.options.arm(batch.cell.arm).target
            for name, paced in paced_of(batch.counters, target.name, target.drafter).items():
                found[name] = found.get(name, Paced(0, 0)).plus(paced)
        return found

    def faults(self, servers: Sequence[str] | None = None) -> list[str]:
        """Why the figures mean nothing, one sentence each; none where they are valid.

        Args:
            servers: Whose pace counts; None takes all.
        """
        return [*self._pace_faults(servers), *self._trip_faults(), *self._count_faults()]

    def _pace_faults(self, servers: Sequence[str] | None) -> Iterator[str]:
        if self.options.target_pace is None:
            return
        paced = {name: one for name, one in self.paced.items() if servers is None or name in servers}
        slow = [f"{one.share:.1%} of {name}'s" for name, one in paced.items() if one.share > MAX_OVERRUN_SHARE]
        if not paced or set(servers or ()) - paced.keys():
            yield "it is unknown how many forwards took longer than their pace"
        elif slow:
            yield (
                f"more forwards than {MAX_OVERRUN_SHARE:.0%} took longer than their pace ({', '.join(slow)}): this "
                "machine is too slow or too busy for these figures"
            )

    def _trip_faults(self) -> Iterator[str]:
        options, any_measured = self.options, any(batch.rtt_ms is not None for batch in self.batches)
        for cell, batches in self.by_cell.items():
            if cell.rtt_ms is None or not any_measured:
                continue
            measured_ms = median(batch.rtt_ms for batch in batches)
            wanted_ms = expected_ms(options.emulated_ms(cell.rtt_ms), options.emulated_ms(options.jitter_ms))
            if measured_ms is None:
                yield f"{label(cell)}: no link measured the round trip"
            elif options.loss and measured_ms >= wanted_ms:
                continue  # losses make round trips longer, as they should, and none shorter
            elif is_off(measured_ms, wanted_ms, options.time_scale):
                yield f"{label(cell)}: the link measured {measured_ms:.1f} ms where {wanted_ms:.1f} ms were emulated"

    def _count_faults(self) -> Iterator[str]:
        for cell, batches in self.by_cell.items():
            arm, gained = self.options.arm(cell.arm), Counters.total(batch.counters for batch in batches)
            pace, passes = self.options.draft_forward, gained.get("local_draft_passes")
            if pace is not None and arm.is_colocated and gained.get("num_drafts") and passes is not None:
                each_ms = (gained.get("local_draft_paced_ms") or 0.0) / passes if passes else 0.0
                if each_ms < pace.step_ms(1) * PACED_SHARE:
                    yield f"{label(cell)}: {passes:g} draft forwards paced to {each_ms:.2f} ms each, not to {pace}"
            accepted, parts = gained.get("num_accepted_tokens"), [gained.get(name) for name in SOURCES]
            known = [part for part in parts if part is not None]
            if accepted and known and abs(sum(known) - accepted) > max(2.0, SOURCES_SHARE * accepted):
                yield f"{label(cell)}: {sum(known):,.0f} accepted tokens by source, {accepted:,.0f} by vLLM's count"

    @property
    def pacing(self) -> str:
        """What every table's title says."""
        named = ((self.options.target_pace, "target"), (self.options.draft_pace, "draft"))
        paces = [f"{pace.base_ms:g} + {pace.per_token_ms:g} ms ({name})" for pace, name in named if pace is not None]
        if not paces:
            return "not paced"
        scale = self.options.time_scale
        return f"paced to {', '.join(paces)}" + (f", these and R × {scale:g}" if scale != 1.0 else "")

    @property
    def haves(self) -> str:
        """What stands above every table: which arms have lookup and async scheduling, and at which pace all run."""
        arms = self.options.started
        by_lookup = {whose: [f"`{arm.name}`" for arm in arms if arm.lookup == whose] for whose in ("ours", "vLLM's")}
        lookups = [f"{whose} in {', '.join(names)}" for whose, names in by_lookup.items() if names]
        lookup = f"{'; '.join(lookups)}; none in the others" if lookups else "none in any arm"
        ahead = {arm.name: self.observed(arm, "async_scheduling") for arm in arms}
        scheduled = [f"`{name}`" for name, value in ahead.items() if value]
        if None in ahead.values():
            scheduling = "not observed in all arms"
        elif scheduled:
            scheduling = f"in {', '.join(scheduled)} alone"
        else:
            scheduling = "in no arm" + ("" if self.on_gpu else CPU_SCHEDULING)
        return f"Prompt lookup: {lookup}. Async scheduling: {scheduling}. Pace: {self.pacing}."

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
            f"{what}, up to {options.max_tokens} tokens each, cut where the text begins to repeat "
            f"{options.repeat_span} tokens; {times} through each arm, arms in changing order; round trips emulated by "
            f"a proxy{self._weather}; up to {options.speculative_tokens} drafts verified per step; {self._decoding}; "
            f"{paced}."
        )

    @property
    def _weather(self) -> str:
        """What the emulated WAN does besides."""
        options = self.options
        parts = [f"jitter {options.jitter_ms:g} ms"] if options.jitter_ms else []
        parts += [f"{options.loss:.1%} of the segments lost"] if options.loss else []
        return f" ({', '.join(parts)})" if parts else ""

    @property
    def _decoding(self) -> str:
        temperature = self.options.temperature
        if temperature:
            return f"sampling at T = {temperature:g} through the OpenAI endpoint, where outputs cannot be compared"
        compared = (
            f"outputs compared with the target's own: {len(self.wrong)} differ, {len(self.ties)} floating-point ties"
        )
        return f"greedy decoding through the OpenAI endpoint, {compared}"

    def warnings(self, faults: Sequence[str]) -> list[str]:
        """Sentences on why the figures may mean nothing."""
        texts = [] if self.ended_by is None else [f"INCOMPLETE: {self.ended_by}."]
        texts += [f"INVALID: {fault}." for fault in faults]
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
    return f"{cell.arm}{trip}" + ("" if cell.single else f", {cell.load}")
