"""The requests: every prompt through every arm, and what each request added to the counters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vllm_wanspec.lab.compare.loads import serve
from vllm_wanspec.lab.compare.plan import Block, Options, blocks, orders
from vllm_wanspec.lab.compare.references import as_request, usable
from vllm_wanspec.lab.harness.client import Completion, CompletionClient, first_difference
from vllm_wanspec.lab.harness.models import WARM_UP, WARM_UP_TOKENS, Prompt
from vllm_wanspec.lab.harness.probes import Probe
from vllm_wanspec.lab.harness.view import NOBODY, Onlooker, progress_bar
from vllm_wanspec.lab.harness.wan_control import Wan
from vllm_wanspec.lab.records import Batch, Cell, Journal, Load, Records, Reference, Setting
from vllm_wanspec.lab.stats import Timed, total
from vllm_wanspec.lab.target.colocated import set_gamma


@dataclass(frozen=True, slots=True)
class Station:
    """Where an arm's requests go: its target, asked as the arm asks, and what is read around each request.

    Attributes:
        client: Asks as the arm does.
        probe: Reads counters.
        control: File that tells the target how many tokens to draft; None where it was started with that.
        setting: What the pre-pass chose; None where nothing is tuned.
    """

    client: CompletionClient
    probe: Probe
    control: Path | None = None
    setting: Setting | None = None

    def prepare(self) -> None:
        """Let the target run as this station asks."""
        if self.control is not None and self.setting is not None:
            set_gamma(self.control, self.setting.draft_tokens)


def remaining(options: Options, records: Records) -> int:
    """Return how many requests are still to be sent to the arms, as far as is known; never 0 without any prompt."""
    measured = {reference.index for reference in usable(records, options)}
    count = options.count or max(1, len(measured))
    pairs = {(cell, block.repeat) for block in blocks(options) for cell in block.cells}
    return sum(count - len(measured & records.done(cell, repeat)) for cell, repeat in pairs)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Sends every request that the journal lacks, and adds it there.

    Args:
        options: The run's settings.
        journal: What has been done.
        plain: The target alone, which settles what a floating-point tie is.
        stations: By arm and load.
        wan: Sets the round trip; None without arms that need it.
        console: Where to show progress.
    """

    options: Options
    journal: Journal
    plain: CompletionClient
    stations: Mapping[tuple[str, Load], Station]
    wan: Wan | None
    console: Console

    async def warm_up(self) -> None:
        """Send each station a request that does not count.

        Raises:
            ClientError: It failed.
        """
        for station in self.stations.values():
            await station.client.complete(WARM_UP.text, WARM_UP_TOKENS)

    async def run(self) -> None:
        """Take all measurements that are missing.

        Raises:
            ClientError: A request failed, or a link did not come up.
        """
        references = usable(self.journal, self.options)
        with progress_bar(self.console) as progress:
            task = progress.add_task("", total=remaining(self.options, self.journal))

            def advance(count: int) -> None:
                progress.advance(task, count)

            for block in blocks(self.options):
                if self._has_taken(block, references):
                    continue
                progress.update(task, description=_title(block))
                await self.set_round_trip(block.rtt_ms)
                take = self._take_singles if block.load == Load() else self._take_together
                await take(block, references, advance)
                self._say(f"{_title(block)}, ms per token: {self._paces(block)}")

    async def set_round_trip(self, rtt_ms: float | None) -> None:
        """Set the round trip, and give estimates on both sides of the fresh links something to go by."""
        if rtt_ms is None or self.wan is None:
            return
        options = self.options
        if not await self.wan.set(options.emulated_ms(rtt_ms), options.emulated_ms(options.jitter_ms), options.loss):
            self.console.print(f"warning: the links do not measure R = {rtt_ms:g} ms", style="yellow")
        asked = {name: station for (name, _), station in self.stations.items() if options.arm(name).uses_wan}
        for station in asked.values():
            await station.client.complete(WARM_UP.text, WARM_UP_TOKENS)

    async def _take_singles(
        self, block: Block, references: Sequence[Reference], advance: Callable[[int], None]
    ) -> None:
        # Blocks are few and long where there is one round trip.
        says_more = len(self.options.rtt_ms) == 1
        for reference, cells in zip(references, orders(block, len(references)), strict=True):
            missing = [cell for cell in cells if reference.index not in self.journal.done(cell, block.repeat)]
            for cell in missing:
                self.journal.add(await self.take(cell, block.repeat, [reference]))
                advance(1)
            if missing and says_more:
                text = f"{reference.name}, {len(reference.expected)} tokens"
                self._say(f"{text}, ms per token: {self._paces(block, reference)}")

    async def _take_together(
        self, block: Block, references: Sequence[Reference], advance: Callable[[int], None]
    ) -> None:
        for cell in block.cells:
            if not self._is_done(cell, block.repeat, references):
                self.journal.add(await self.take(cell, block.repeat, references))
                advance(len(references))

    async def take(
        self, cell: Cell, repeat: int, references: Sequence[Reference], onlooker: Onlooker = NOBODY
    ) -> Batch:
        """Send the references as the cell's load says, and compare their outputs where these are greedy.

        Raises:
            ClientError: A request failed.
        """
        station, sampled = self.stations[cell.arm, cell.load], self.options.temperature > 0.0
        answers: dict[int, Completion] = {}
        # Not one of the target's cached prompts, which would be here in one arm and not in another.
        extra = {"cache_salt": " ".join(map(str, (*cell, repeat)))}

        async def ask(one: Reference) -> None:
            onlooker.begin(Prompt(one.name, one.text, one.kind))
            answers[one.index] = done = await station.client.complete(
                one.prompt_ids,
                len(one.expected),
                temperature=self.options.temperature,
                ignore_eos=sampled,
                extra=extra,
                on_text=onlooker.stream,
            )
            onlooker.end(done)

        station.prepare()
        before, cpu_before = await station.probe.read(), station.probe.cpu_s()
        began_s = time.monotonic()
        await serve(cell.load, references, ask)
        seconds = time.monotonic() - began_s
        cpu_s = {side: value - cpu_before.get(side, 0.0) for side, value in station.probe.cpu_s().items()}
        trip_ms = None if cell.rtt_ms is None else self.options.emulated_ms(cell.rtt_ms)
        counters = (await station.probe.settled(trip_ms)).since(before)
        compared = () if sampled else references
        lines = [await self._difference(cell, one, answers[one.index]) for one in compared]
        return Batch(
            cell=cell,
            repeat=repeat,
            seconds=seconds,
            requests=tuple(as_request(one, answers[one.index]) for one in references),
            counters=counters,
            cpu_s=cpu_s,
            ties=tuple(line for line, tie in lines if tie),
            wrong=tuple(line for line, tie in lines if line and not tie),
            rtt_ms=station.probe.rtt_ms,
        )

    async def _difference(self, cell: Cell, reference: Reference, done: Completion) -> tuple[str, bool]:
        """Return where an output parts from the target's own, and whether at a tie; nothing where it does not."""
        position = first_difference(reference.expected, done.token_ids)
        if position is None:
            return "", False
        tokens = [ids[position] if position < len(ids) else None for ids in (reference.expected, done.token_ids)]
        line = f"{reference.name}: at generated position {position}: plain token {tokens[0]}, here {tokens[1]}"
        tie = await self.plain.is_tie(reference.prompt_ids, reference.expected, done.token_ids, position)
        if tie:
            self._say(f"{cell.arm}: floating-point tie in {line}")
        else:
            self.console.print(f"error: {cell.arm}: different output in {line}", style="bold red", highlight=False)
            text = f"  the prompt ends with {reference.text[-100:]!r}"
            self.console.print(text, highlight=False, markup=False)
        return line, tie

    def _has_taken(self, block: Block, references: Sequence[Reference]) -> bool:
        done = {cell: self.journal.done(cell, block.repeat) for cell in block.cells}
        turns = zip(references, orders(block, len(references)), strict=True)
        return all(reference.index in done[cell] for reference, mine in turns for cell in mine)

    def _is_done(self, cell: Cell, repeat: int, references: Sequence[Reference]) -> bool:
        return {reference.index for reference in references} <= self.journal.done(cell, repeat)

    def _paces(self, block: Block, reference: Reference | None = None) -> str:
        """The block's mean times per token, arm by arm; of one prompt, beside that of the target alone."""
        found: dict[str, list[Timed]] = {arm.name: [] for arm in self.options.started}
        if reference is not None:
            found = {"alone": [Timed(reference.time_ms, len(reference.expected) - 1)]} | found
        for batch in self.journal.batches:
            if batch.cell in block.cells and batch.repeat == block.repeat:
                wanted = [one for one in batch.requests if reference is None or one.prompt == reference.index]
                found[batch.cell.arm] += [Timed(one.time_ms, one.tokens) for one in wanted]
        return ", ".join(f"{name} {total(times).per_token_ms or 0.0:.1f}" for name, times in found.items() if times)

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False)


def _title(block: Block) -> str:
    trip = "" if block.rtt_ms is None else f", R = {block.rtt_ms:g} ms"
    return f"repeat {block.repeat + 1}{trip}, {block.load}"
