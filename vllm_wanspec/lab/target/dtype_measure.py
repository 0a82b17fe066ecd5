"""The dtype bench's measurement: the same greedy requests through targets of one dtype, compared token by token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
from rich.console import Console

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import CompletionClient, first_difference
from vllm_wanspec.lab.harness.launch import (
    MODEL_NAME,
    NAMED,
    drafter_spec,
    lean,
    plain_command,
    vllm_spec,
    wait_for_link,
    write_config,
)
from vllm_wanspec.lab.harness.models import WARM_UP, WARM_UP_TOKENS, DemoModels, Prompt
from vllm_wanspec.lab.harness.servers import HOST, Server, ServerSpec, free_ports
from vllm_wanspec.lab.harness.view import progress_bar
from vllm_wanspec.lab.target.clients import Text, serve_clients
from vllm_wanspec.lab.target.dtype_report import FLOAT32, OTHER_DTYPE, Divergence, DtypeOptions, DtypeRow
from vllm_wanspec.lab.target.kinds import COLOCATED, PLAIN, REMOTE, colocated_command, remote_command

KINDS = (PLAIN, COLOCATED, REMOTE)
DRAFTER_PLACES = 64


def server_name(kind: str, dtype: str) -> str:
    """Return what a target is called."""
    return f"{kind}-{dtype}"


def plan_targets(options: DtypeOptions, models: DemoModels, folder: Path) -> tuple[list[ServerSpec], dict[str, str]]:
    """Lay out a drafter, and targets of three kinds per dtype; writes YAML files to ``folder``.

    Returns:
        The servers, and where controllers serve their counters by the name of their target.
    """
    core = machine.pin_cores()[0]
    drafter = drafter_spec(models.draft, DRAFTER_PLACES, None)
    ports, metrics, specs = free_ports(4 * len(options.dtypes)), {}, [lean(drafter)]
    for dtype in options.dtypes:
        for kind in KINDS:
            name = server_name(kind, dtype)
            if kind == REMOTE:
                metrics_port = ports.pop()
                metrics[name] = f"http://{HOST}:{metrics_port}/metrics"
                config = write_config(folder / f"{name}.yaml", drafter.port, metrics_port)
                argv = remote_command(models.target, config, options.gamma)
            elif kind == COLOCATED:
                argv = colocated_command(models.target, models.draft, options.gamma)
            else:
                argv = plain_command(str(models.target))
            spec = lean(vllm_spec(name, [*argv, *NAMED], ports.pop(), core, None, None))
            # The last one prevails over that of small machines.
            specs.append(dataclasses.replace(spec, argv=[*spec.argv, "--dtype", dtype]))
    return specs, metrics


async def measure_dtypes(
    options: DtypeOptions,
    servers: Mapping[str, Server],
    metrics: Mapping[str, str],
    prompts: Sequence[Prompt],
    console: Console,
) -> list[DtypeRow]:
    """Take plain vLLM's texts at each dtype, and then those of every kind of target.

    Raises:
        ClientError: A request failed.
        ServerError: A link did not come up.
    """
    rows: list[DtypeRow] = []
    own: dict[str, list[Text]] = {}
    async with aiohttp.ClientSession() as http:
        for name, url in metrics.items():
            await wait_for_link(http, url, servers[name], console)
        with progress_bar(console) as progress:
            sides = 1 + len(KINDS) * len(options.at_a_time)
            task = progress.add_task("", total=len(options.dtypes) * sides * len(prompts))

            def client(kind: str, dtype: str, at_a_time: int = 0) -> CompletionClient:
                # Every kind computes every prompt, as plain vLLM did for the texts that count.
                salt = {"cache_salt": f"{kind} {at_a_time}"}
                return CompletionClient(http, servers[server_name(kind, dtype)].url, MODEL_NAME, fields=salt)

            for dtype in options.dtypes:
                plain = client(PLAIN, dtype)
                for kind in KINDS:
                    await client(kind, dtype).complete(WARM_UP.text, WARM_UP_TOKENS)
                texts = own[dtype] = []
                progress.update(task, description=f"{dtype}: plain vLLM's own texts")
                for prompt in prompts:
                    done = await plain.complete(prompt.text, options.max_tokens)
                    texts.append(Text(prompt.module, done.prompt_ids, done.token_ids))
                    progress.advance(task)
                for at_a_time in options.at_a_time:
                    for kind in KINDS:
                        progress.update(task, description=f"{dtype}: {kind}, {at_a_time} at a time")
                        requests = [texts[first::at_a_time] for first in range(min(at_a_time, len(texts)))]
                        served = await serve_clients(
                            client(kind, dtype, at_a_time), requests, lambda: progress.advance(task)
                        )
                        pairs = [(text, done.token_ids) for one in served for text, done in one.answers]
                        rows.append(await _compared(plain, DtypeRow(dtype, kind, at_a_time, len(pairs)), pairs))
                        console.print(str(rows[-1]), style="dim", highlight=False)
                if dtype != FLOAT32 and FLOAT32 in own:
                    pairs = [(text, other.expected) for text, other in zip(texts, own[FLOAT32], strict=True)]
                    rows.append(await _compared(plain, DtypeRow(dtype, OTHER_DTYPE, 1, len(pairs)), pairs))
    return rows


async def _compared(plain: CompletionClient, row: DtypeRow, pairs: Sequence[tuple[Text, tuple[int, ...]]]) -> DtypeRow:
    found = [await divergence(plain, text, ids) for text, ids in pairs]
    differing = sorted((one for one in found if one is not None), key=lambda one: (one.name, one.position))
    return dataclasses.replace(row, divergences=tuple(differing))


async def divergence(plain: CompletionClient, text: Text, answer: Sequence[int]) -> Divergence | None:
    """Return where an answer parts from plain vLLM's, and how close the two tokens were; None where it does not.

    Raises:
        ClientError: Plain vLLM could not be asked.
    """
    place = first_difference(text.expected, answer)
    if place is None:
        return None
    if place >= min(len(text.expected), len(answer)):
        return Divergence(text.name, place, None)
    logprobs = await plain.next_logprobs([*text.prompt_ids, *text.expected[:place]])
    first, second = (logprobs.get(ids[place], -math.inf) for ids in (text.expected, answer))
    known = math.isfinite(first) and math.isfinite(second)
    return Divergence(text.name, place, abs(first - second) if known else None)
