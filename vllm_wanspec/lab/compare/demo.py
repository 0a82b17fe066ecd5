"""``wanspec demo``: a real target with remote drafts beside a plain one, on one machine, one pass each.

The plain target's pass gives the texts that the other one has to repeat.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_wanspec.lab.compare.arms import ARMS, Arm, Target
from vllm_wanspec.lab.compare.demo_report import DemoFigures, as_json, demo_figures, document
from vllm_wanspec.lab.compare.lineup import Lineup
from vllm_wanspec.lab.compare.plan import Options, cells, of_demo_models
from vllm_wanspec.lab.compare.references import take_reference, usable
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.run import Run
from vllm_wanspec.lab.harness.answer_view import ArmView
from vllm_wanspec.lab.harness.models import read_prompts
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.harness.running import Outputs, check_needs, check_outputs, log_folder
from vllm_wanspec.lab.harness.servers import ServerGroup
from vllm_wanspec.lab.records import Batch, Journal
from vllm_wanspec.lab.report.writing import Publication

PLAIN = Arm("none", "plain vLLM", Target("plain", "plain"))


def demo_options(rtt_ms: float, models: Path | None, **changes: Any) -> Options:
    """Return the demo's settings: `of_demo_models` with ``count``, ``max_tokens``, ``speculative_tokens`` and paces."""
    return of_demo_models(models, (PLAIN, ARMS["wanspec"]), rtt_ms, repeats=1, whole_texts=True, **changes)


def run_demo(options: Options, outputs: Outputs, console: Console) -> DemoFigures:
    """Run the demo, print its report, and write its file.

    Args:
        options: The demo's settings.
        outputs: Where result and logs go.
        console: Where to show progress and report.

    Raises:
        ConfigError: Prompts or a path are missing or wrong.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed.
    """
    prompts = read_prompts(options.prompts, options.count or 1)
    check_outputs(outputs)
    check_needs()
    begun = Provenance.of_this_run("wanspec")
    with log_folder(outputs.log_dir, "--logs", console) as folder:
        path = folder / "demo.journal"
        path.unlink(missing_ok=True)  # a demo begins anew
        journal = Journal(path, {})
        try:
            DemoRun(options, journal, prompts, folder, console).measure()
        finally:
            journal.close()
    found = demo_figures(Result.of(options, journal, begun, None))
    Publication(document(found), as_json(found)).publish(outputs, console)
    return found


class DemoRun(Run):
    """A pass of the prompts through the plain target, then one through the other, for people to look on."""

    def measure_with(self, group: ServerGroup, lineup: Lineup) -> None:
        """Measure with servers of a group."""
        self.start(group, *lineup.sources, *(plan.spec for plan in lineup.targets.values()))
        self._plans |= lineup.targets
        asyncio.run(self._passes(lineup))

    async def _passes(self, lineup: Lineup) -> None:
        options, journal = self.options, self.journal
        plain, remote = cells(options)
        async with self.measuring(lineup) as measurement:
            probe = measurement.stations[plain.arm, plain.load].probe
            with ArmView(self.console, "plain vLLM", len(self.prompts), options.max_tokens) as view:
                for index, prompt in enumerate(self.prompts):
                    before = await probe.read()
                    reference, request = await take_reference(measurement.plain, index, prompt, options, view)
                    seconds, gained = request.arrivals[-1][0] / 1000.0, (await probe.settled(None)).since(before)
                    journal.add(reference)
                    journal.add(Batch(plain, 0, seconds, (request,), gained))
            await measurement.set_round_trip(remote.rtt_ms)
            references = usable(journal, options)
            with ArmView(self.console, "WANSpec", len(references), options.max_tokens, references) as view:
                for reference in references:
                    journal.add(await measurement.take(remote, 0, [reference], view))
