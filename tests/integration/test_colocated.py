"""The co-located draft model with prompt lookup behind it: exact at every γ, and its counts are those of vLLM."""

import asyncio
import signal
from pathlib import Path

import aiohttp
import pytest

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.servers import ServerSpec, free_ports
from vllm_wanspec.lab.target.colocated import COLOCATED_ENV, colocated_flags, read_counts, set_gamma

from .fleet import MODEL_NAME, Fleet, Target, flags, vllm_command
from .scrape import vllm_page
from .workload import PlainTruth, Request, client_of, run_staggered, vary

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]

K = 8
GAMMAS = (3, 1, 8, 5)
REQUESTS_PER_GAMMA = 4
AT_ONCE = 3
LONGEST_PROMPT = 600
CHANGE_S = 0.05


def start(fleet: Fleet, control: Path) -> Target:
    (port,) = free_ports(1)
    core = machine.pin_cores()[0]
    argv = vllm_command("serve", str(fleet.models.target), "--served-model-name", MODEL_NAME, "--port", str(port))
    argv += [*flags(), *colocated_flags(str(fleet.models.draft), K)]
    env = machine.server_env(core) | {COLOCATED_ENV: str(control)}
    return Target(fleet.group.start(ServerSpec("colocated", argv, port, env, core)))


async def verified(http: aiohttp.ClientSession, target: Target) -> tuple[int, int]:
    """Accepted and verified draft tokens as vLLM counts them."""
    page = await vllm_page(http, target)
    names = ("accepted", "draft")
    accepted, drafted = (int(page.get(f"vllm:spec_decode_num_{name}_tokens_total")) for name in names)
    return accepted, drafted


async def check_counts(http: aiohttp.ClientSession, target: Target, control: Path) -> dict[str, int]:
    counts, (accepted, drafted) = read_counts(control), await verified(http, target)
    print(counts, f"vLLM: {accepted} of {drafted}")
    assert counts["accepted_draft"] + counts["accepted_lookup"] == accepted
    # vLLM also counts placeholders in the first step of a prompt that it has in its cache.
    assert (drafted - counts["offered_draft"] - counts["offered_lookup"]) % K == 0
    return counts


async def change(control: Path) -> None:
    """Change γ again and again while requests are served."""
    while True:
        for gamma in GAMMAS:
            set_gamma(control, gamma)
            await asyncio.sleep(CHANGE_S)


def test_it_is_exact_at_every_gamma_and_its_counts_add_up(
    fleet: Fleet, plain: PlainTruth, prompts: list[tuple[int, ...]], tmp_path: Path
) -> None:
    control = tmp_path / "control.json"
    set_gamma(control, GAMMAS[0])
    target = start(fleet, control)
    fleet.wait_ready(target.server)
    chosen = [prompt for prompt in prompts if len(prompt) < LONGEST_PROMPT][: REQUESTS_PER_GAMMA * (len(GAMMAS) + 1)]
    requests = vary(chosen, shortest=64)
    kinds = [requests[at::5] for at in range(5)]

    async def serve(http: aiohttp.ClientSession, part: list[Request]) -> None:
        run = await run_staggered(client_of(http, target), part, AT_ONCE)
        await plain.check(http, part, run.done())

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            before = await check_counts(http, target, control)
            for gamma, part in zip(GAMMAS, kinds[: len(GAMMAS)], strict=True):
                set_gamma(control, gamma)
                await serve(http, part)
                after = await check_counts(http, target, control)
                rise = {name: after[name] - before[name] for name in after}
                assert 0 < rise["accepted_draft"] <= rise["offered_draft"], gamma
                assert (rise["accepted_lookup"] > 0) == (rise["offered_lookup"] > 0) == (gamma < K), gamma
                before = after
            changing = asyncio.create_task(change(control))
            await serve(http, kinds[-1])
            changing.cancel()
            await check_counts(http, target, control)

    try:
        asyncio.run(main())
        target.server.check_alive()
    finally:
        target.server.signal(signal.SIGTERM)
