"""What the drafter's route is compared with: a program that calls the same AsyncLLM itself.

It runs in a process of its own, its engine core in another, as `vllm serve` has it:
``python -m vllm_wanspec.lab.drafter.direct --port 8200 --model DIR --prompts FILE -- FLAGS``, with vLLM's
engine flags. ``GET /round?width=8&tokens=48`` starts so many requests at once and answers with the arrival times of
their tokens, which are found to the same phases as those of a session's branches.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from vllm_wanspec.drafter.engines import TOP_K
from vllm_wanspec.lab.drafter.loads import STEADY_LOOKAHEAD, SteadyLoad, contexts
from vllm_wanspec.lab.drafter.steady import measured_rounds
from vllm_wanspec.lab.drafter.width_figures import SteadyRow
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.cpu import CpuClock
from vllm_wanspec.lab.harness.servers import HOST, ServerSpec
from vllm_wanspec.sim.controller import DraftTokenizer

ROUND_PATH = "/round"
ROUND_TIMEOUT_S = 60.0
WARM_UP = (8, 16)

#: Continues a context by some tokens: yields how many have just come.
Generate = Callable[[list[int], int], AsyncIterator[int]]


class DirectLoad:
    """Requests that are started together, as the branches of a session are.

    They share a context but for its last token, so that all but the first find the rest in the prefix cache.
    """

    def __init__(self, generate: Generate, texts: Sequence[list[int]], clock: Callable[[], float] = time.monotonic):
        """Generate from ``texts`` in turn, contexts in token ids."""
        self._generate = generate
        self._texts = itertools.cycle(texts)
        self._clock = clock

    async def round(self, width: int, tokens: int) -> list[list[float]]:
        """Run ``width`` requests of ``tokens`` tokens to their ends; when their tokens arrived, request by request."""
        text = next(self._texts)[:-1]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._stream([*text, last], tokens)) for last in range(width)]
        return [task.result() for task in tasks]

    async def _stream(self, context: list[int], tokens: int) -> list[float]:
        arrivals: list[float] = []
        async for count in self._generate(context, tokens):
            arrivals += [self._clock()] * count
        return arrivals


def make_app(load: DirectLoad) -> web.Application:
    """The program's pages: ``/health`` and ``/round``."""

    async def health(request: web.Request) -> web.Response:
        return web.Response(text="ready")

    async def round_(request: web.Request) -> web.Response:
        return web.json_response(await load.round(int(request.query["width"]), int(request.query["tokens"])))

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get(ROUND_PATH, round_)
    return app


def direct_spec(draft: Path, prompts: Path, port: int, core: int | None) -> ServerSpec:
    """Describe the program on the drafter's core, with the engine flags and environment that the drafter has."""
    argv = [sys.executable, "-m", __name__, "--port", str(port), "--model", str(draft), "--prompts", str(prompts)]
    return ServerSpec("direct", [*argv, "--", *machine.server_flags()], port, machine.server_env(core), core)


class DirectWorkload:
    """Rounds of the program, measured as `SteadyWorkload` measures those of a session."""

    def __init__(self, http: aiohttp.ClientSession, url: str, cpu: CpuClock, load: SteadyLoad) -> None:
        """Use the program at a base URL; ``load`` says how long its requests are, as long as a session's branches."""
        self._http, self._url, self._cpu, self._load = http, url, cpu, load

    async def window(self, width: int, seconds: float) -> SteadyRow:
        """Have rounds played for some seconds and measure them.

        Raises:
            ClientError: The program cannot be reached or has failed.
        """
        query = {"width": str(width), "tokens": str(self._load.branch_depth if width > 1 else STEADY_LOOKAHEAD)}
        timeout = aiohttp.ClientTimeout(total=ROUND_TIMEOUT_S)

        async def play() -> list[list[float]]:
            async with self._http.get(self._url + ROUND_PATH, params=query, timeout=timeout) as response:
                response.raise_for_status()
                arrivals: list[list[float]] = await response.json()
                return arrivals

        try:
            return await measured_rounds(play, self._cpu, width, seconds)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ClientError(f"{self._url}: the direct client failed: {error or type(error).__name__}") from error


def vllm_generate(engine: Any) -> Generate:
    """Greedy requests to an AsyncLLM, asked for as `VllmEngine` does."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    ids = itertools.count(1)

    async def generate(context: list[int], tokens: int) -> AsyncIterator[int]:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            logprobs=TOP_K,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"type": "token", "prompt_token_ids": context}
        async for output in engine.generate(prompt, params, f"direct-{next(ids)}"):
            yield len(output.outputs[0].token_ids)

    return generate


async def _serve(port: int, model: Path, prompts: Path, flags: Sequence[str]) -> None:
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    texts = contexts(prompts, DraftTokenizer.load(model))
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(model), *flags]))
    # The context decides on default sizes of batches.
    engine = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)
    runner = web.AppRunner(make_app(load := DirectLoad(vllm_generate(engine), texts)), shutdown_timeout=0.2)
    try:
        await load.round(*WARM_UP)
        await runner.setup()
        await web.TCPSite(runner, HOST, port, reuse_address=True).start()
        await asyncio.sleep(math.inf)
    finally:
        await runner.cleanup()
        engine.shutdown()


def main() -> None:
    """Serve until a signal ends the process."""
    import uvloop  # vLLM's server has it; this module must be importable without

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument("--model", type=Path, required=True, help="the draft model's folder")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with texts")
    parser.add_argument("flags", nargs="*", help="vLLM's engine flags, after --")
    given = parser.parse_args()
    uvloop.run(_serve(given.port, given.model, given.prompts, given.flags))


if __name__ == "__main__":
    main()
