"""How requests come: so many at a time, or at random times."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from vllm_wanspec.lab.records import Load, Reference


async def serve(load: Load, references: Sequence[Reference], ask: Callable[[Reference], Awaitable[None]]) -> None:
    """Ask for each of some texts under a load; where one fails the others are dropped.

    With a rate they are sent at the times of a Poisson process, the same ones whoever is asked.
    """
    if load.rate is None:
        queue = list(reversed(references))

        async def work() -> None:
            while queue:
                await ask(queue.pop())

        tasks = [asyncio.create_task(work()) for _ in range(min(load.concurrency, len(queue)))]
    else:
        rng, at_s = Random(f"arrivals {load.rate}"), 0.0

        async def later(reference: Reference, delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            await ask(reference)

        tasks = []
        for reference in references:
            at_s += rng.expovariate(load.rate)
            tasks.append(asyncio.create_task(later(reference, at_s)))
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
