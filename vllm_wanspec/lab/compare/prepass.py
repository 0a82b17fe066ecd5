"""The pre-pass: which settings let the peers run at their best, under each load that they are measured under."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from rich.console import Console

from vllm_wanspec.lab.compare.arms import Arm
from vllm_wanspec.lab.compare.lineup import TargetPlan, tuned_target
from vllm_wanspec.lab.compare.loads import serve
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.references import usable
from vllm_wanspec.lab.harness.client import CompletionClient
from vllm_wanspec.lab.harness.launch import MODEL_NAME, start
from vllm_wanspec.lab.harness.models import WARM_UP, WARM_UP_TOKENS
from vllm_wanspec.lab.harness.servers import Server, ServerGroup
from vllm_wanspec.lab.harness.view import progress_bar
from vllm_wanspec.lab.records import Journal, Load, Reference, Setting, Trial
from vllm_wanspec.lab.stats import Timed, total
from vllm_wanspec.lab.target.colocated import set_gamma

Wanted = tuple[Setting, Load]


def best_setting(options: Options, trials: Sequence[Trial], arm: Arm, load: Load) -> Setting | None:
    """Return how an arm runs under a load: as was fastest in the pre-pass.

    None where nothing is tuned, and before the pre-pass of this arm and load is complete.
    """
    candidates = options.candidates(arm)
    if len(candidates) == 1:
        return candidates[0]
    tried = {trial.setting: trial.tpot_ms for trial in trials if (trial.arm, trial.load) == (arm.name, load)}
    if any(setting not in tried for setting in candidates):
        return None
    return min(candidates, key=lambda setting: (tried[setting], setting), default=None)


def pre_pass(options: Options, journal: Journal, folder: Path, console: Console) -> None:
    """Try the settings of tuned arms that the journal lacks, one server at a time.

    Raises:
        ServerError: A server did not start.
        ClientError: A request failed.
    """
    for arm in options.started:
        known = {(trial.setting, trial.load) for trial in journal.trials if trial.arm == arm.name}
        settings = options.candidates(arm)
        wanted = [(setting, load) for setting in settings for load in options.loads(arm)] if len(settings) > 1 else []
        wanted = [one for one in wanted if one not in known]
        while wanted:
            plan = tuned_target(options, arm, wanted[0][0], folder)
            # Settings that are told by a file share a server.
            mine = [one for one in wanted if plan.control is not None or one[0] == wanted[0][0]]
            wanted = [one for one in wanted if one not in mine]
            with ServerGroup(folder) as group:
                server = start(group, [plan.spec], console)[plan.spec.name]
                asyncio.run(_try_all(options, journal, console, arm, server, plan, mine))


async def _try_all(
    options: Options,
    journal: Journal,
    console: Console,
    arm: Arm,
    server: Server,
    plan: TargetPlan,
    wanted: Sequence[Wanted],
) -> None:
    """Try what one server can be tried with."""
    async with aiohttp.ClientSession() as http:
        client = CompletionClient(http, server.url, MODEL_NAME)
        await client.complete(WARM_UP.text, WARM_UP_TOKENS)
        for setting, load in wanted:
            if plan.control is not None:
                set_gamma(plan.control, setting.draft_tokens)
            trial = Trial(arm.name, load, setting, await tried_ms(options, journal, console, client, (setting, load)))
            journal.add(trial)
            text = f"{arm.name}, {setting}, {load}: {trial.tpot_ms:.1f} ms per token"
            console.print(text, style="dim", highlight=False)


def trial_count(options: Options, load: Load) -> int:
    """Return how many prompts a setting is tried with; with fewer a load of so many at a time would not be reached."""
    return max(options.trial_prompts, 2 * load.concurrency)


async def tried_ms(
    options: Options, journal: Journal, console: Console, client: CompletionClient, tried: Wanted
) -> float:
    """Return the milliseconds per token of the first prompts with a setting under a load."""
    setting, load = tried
    references = usable(journal, options)[: trial_count(options, load)]
    # As what is measured: no prompt is cached from the trial before.
    extra = {"cache_salt": f"pre-pass {setting} {load}"}
    times: list[Timed] = []
    with progress_bar(console) as progress:
        task = progress.add_task("pre-pass", total=len(references))

        async def ask(one: Reference) -> None:
            done = await client.complete(
                one.prompt_ids,
                len(one.expected),
                temperature=options.temperature,
                ignore_eos=options.temperature > 0.0,
                extra=extra,
            )
            times.append(Timed(done.last_ms - done.ttft_ms, len(done.token_ids) - 1))
            progress.advance(task)

        await serve(load, references, ask)
    return total(times).per_token_ms or 0.0
