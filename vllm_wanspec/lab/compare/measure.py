"""The side-by-side bench's requests: every prompt through every arm, and what each request added to the counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from vllm_wanspec.lab.compare.plan import ARMS, BenchOptions, Block, blocks, orders, uses_wan
from vllm_wanspec.lab.compare.probes import Probe, Wan
from vllm_wanspec.lab.compare.references import as_completion, usable
from vllm_wanspec.lab.harness.client import Completion, CompletionClient, first_difference
from vllm_wanspec.lab.harness.models import WARM_UP, WARM_UP_TOKENS
from vllm_wanspec.lab.harness.pacing_counts import Paced
from vllm_wanspec.lab.harness.view import progress_bar
from vllm_wanspec.lab.records import Batch, Cell, Journal, Reference, Request, Trial

__all__ = ["BenchRun", "Measurement", "Station", "best_gamma", "remaining"]


@dataclass(frozen=True, slots=True)
class BenchRun:
    """Everything that a run found.

    Args:
        options: The bench's settings.
        references: The measured prompts, in order.
        trials: The pre-pass.
        gamma: Draft tokens per step of the co-located draft model; None if that was not measured.
        batches: What was measured.
        paced: Forwards that each server paced, by its name, which is the arm's, or ``drafter``; the draft model's own
            forwards in the target of the arm ``draft_model`` are ``draft_model drafts``.
        seconds: Duration of the whole run, of all its parts where it was resumed.
        ended_by: What ended it before its end; None if nothing did.
    """

    options: BenchOptions
    references: Sequence[Reference]
    trials: Sequence[Trial]
    gamma: int | None
    batches: Sequence[Batch]
    paced: Mapping[str, Paced]
    seconds: float
    ended_by: str | None = None


@dataclass(frozen=True, slots=True)
class Station:
    """One arm's running target."""

    client: CompletionClient
    probe: Probe


def best_gamma(options: BenchOptions, trials: Sequence[Trial]) -> int | None:
    """Return the co-located draft model's γ: the fastest in the pre-pass; None before that is complete."""
    if "draft_model" not in options.started:
        return None
    if len(options.gammas) == 1:
        return options.gammas[0]
    tried = {trial.gamma: trial.tpot_ms for trial in trials}
    if any(gamma not in tried for gamma in options.gammas):
        return None
    return min(options.gammas, key=lambda gamma: (tried[gamma], gamma))


def remaining(options: BenchOptions, journal: Journal) -> int:
    """Return how many requests are still to be sent to the arms."""
    measured = {reference.index for reference in usable(journal, options)}
    left = 0
    for block in blocks(options):
        left += sum(options.prompt_count - len(measured & journal.done(cell, block.repeat)) for cell in block.cells)
    return left


class Measurement:
    """Sends every request that the journal lacks, and adds it there.

    Args:
        options: The bench's settings.
        journal: What has been done; it has all references.
        plain: The target that settles what a floating-point tie is.
        stations: The arms' targets.
        wan: Sets the round trip; None without arms that need it.
        console: Where to show progress.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        options: BenchOptions,
        journal: Journal,
        plain: CompletionClient,
        stations: Mapping[str, Station],
        wan: Wan | None,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._journal = journal
        self._plain = plain
        self._stations = stations
        self._wan = wan
        self._console = console
        self._clock = clock
        self._references = usable(journal, options)

    @property
    def journal(self) -> Journal:
        """What has been done."""
        return self._journal

    async def warm_up(self) -> None:
        """Send each target a request that does not count.

        Raises:
            ClientError: It failed.
        """
        for station in self._stations.values():
            await station.client.complete(WARM_UP.text, WARM_UP_TOKENS)

    async def run(self) -> None:
        """Take all measurements that are missing.

        Raises:
            ClientError: A request failed, or a link did not come up.
        """
        with progress_bar(self._console) as progress:
            task = progress.add_task("", total=remaining(self._options, self._journal))

            def advance(count: int) -> None:
                progress.advance(task, count)

            for block in blocks(self._options):
                if all(self._is_done(cell, block.repeat) for cell in block.cells):
                    continue
                progress.update(task, description=_title(block))
                await self._set_wan(block)
                await (self._take_singles if block.concurrency == 1 else self._take_together)(block, advance)
                self._say(f"{_title(block)}, ms per token: {self._paces(block)}")

    async def _set_wan(self, block: Block) -> None:
        """Set the round trip, and give estimates on both sides of the fresh links something to go by."""
        if block.rtt_ms is None or self._wan is None:
            return
        if not await self._wan.set(self._options.emulated_ms(block.rtt_ms)):
            self._console.print(f"warning: the links do not measure R = {block.rtt_ms:g} ms", style="yellow")
        for arm, station in self._stations.items():
            if uses_wan(arm):
                await station.client.complete(WARM_UP.text, WARM_UP_TOKENS)

    async def _take_singles(self, block: Block, advance: Callable[[int], None]) -> None:
        for reference, cells in zip(self._references, orders(block, len(self._references)), strict=True):
            for cell in cells:
                if reference.index not in self._journal.done(cell, block.repeat):
                    self._journal.add(await self._batch(cell, block.repeat, [reference]))
                    advance(1)

    async def _take_together(self, block: Block, advance: Callable[[int], None]) -> None:
        for cell in block.cells:
            if not self._is_done(cell, block.repeat):
                self._journal.add(await self._batch(cell, block.repeat, self._references))
                advance(len(self._references))

    async def _batch(self, cell: Cell, repeat: int, references: Sequence[Reference]) -> Batch:
        """Send the references, so many at a time as the cell says."""
        station = self._stations[cell.arm]
        queue = list(reversed(references))
        answers: dict[int, tuple[Completion, int]] = {}
        # Not one of the target's cached prompts, which would be here in one arm and not in another.
        salt = f"{cell.arm} {cell.rtt_ms} {cell.concurrency} {repeat}"

        async def work() -> None:
            while queue:
                reference = queue.pop()
                answers[reference.index] = await self._ask(station.client, reference, salt)

        before, cpu_before = await station.probe.read(), station.probe.cpu_s()
        began_s = self._clock()
        workers = [asyncio.create_task(work()) for _ in range(min(cell.concurrency, len(queue)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        seconds = self._clock() - began_s
        cpu_s = {side: value - cpu_before.get(side, 0.0) for side, value in station.probe.cpu_s().items()}
        trip_ms = None if cell.rtt_ms is None else self._options.emulated_ms(cell.rtt_ms)
        counters = (await station.probe.settled(trip_ms)).since(before).values
        verdicts = [await self._verdict(cell, reference, answers[reference.index][0]) for reference in references]
        return Batch(
            cell=cell,
            repeat=repeat,
            seconds=seconds,
            requests=tuple(_request(reference, *answers[reference.index]) for reference in references),
            counters=dict(counters),
            cpu_s=cpu_s,
            ties=verdicts.count("tie"),
            wrong=tuple(verdict for verdict in verdicts if verdict not in ("", "tie")),
        )

    async def _ask(self, client: CompletionClient, reference: Reference, salt: str) -> tuple[Completion, int]:
        """Return the answer, and in how many pieces its tokens came."""
        pieces = 0

        def arrived(text: str, tokens: int) -> None:
            nonlocal pieces
            pieces += tokens > 0

        extra = {"cache_salt": salt}
        done = await client.complete(reference.prompt_ids, len(reference.expected), extra=extra, on_text=arrived)
        return done, pieces

    async def _verdict(self, cell: Cell, reference: Reference, done: Completion) -> str:
        """Return nothing for the right output, ``tie``, or what is wrong with it."""
        position = first_difference(reference.expected, done.token_ids)
        if position is None:
            return ""
        if await self._plain.is_tie(as_completion(reference), done, position):
            return "tie"
        tokens = [ids[position] if position < len(ids) else None for ids in (reference.expected, done.token_ids)]
        wrong = f"{reference.name}: at generated position {position}: plain token {tokens[0]}, here {tokens[1]}"
        self._console.print(f"error: {cell.arm}: different output in {wrong}", style="bold red", highlight=False)
        return wrong

    def _is_done(self, cell: Cell, repeat: int) -> bool:
        return {reference.index for reference in self._references} <= self._journal.done(cell, repeat)

    def _paces(self, block: Block) -> str:
        """The block's mean times per token, arm by arm."""
        texts = []
        for cell in sorted(block.cells, key=lambda cell: list(ARMS).index(cell.arm)):
            batches = [b for b in self._journal.batches if b.cell == cell and b.repeat == block.repeat]
            requests = [request for batch in batches for request in batch.requests]
            tokens = sum(request.tokens for request in requests)
            texts.append(f"{cell.arm} {sum(request.time_ms for request in requests) / max(1, tokens):.1f}")
        return ", ".join(texts)

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False)


def _request(reference: Reference, done: Completion, pieces: int) -> Request:
    return Request(
        prompt=reference.index,
        ttft_ms=done.ttft_ms,
        time_ms=done.last_ms - done.ttft_ms,
        tokens=len(done.token_ids) - 1,
        steps=pieces - 1,
    )


def _title(block: Block) -> str:
    trip = "" if block.rtt_ms is None else f", R = {block.rtt_ms:g} ms"
    return f"repeat {block.repeat + 1}{trip}, concurrency {block.concurrency}"
