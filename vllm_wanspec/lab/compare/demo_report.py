"""What the demo found: the figures, their JSON form, and the table."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.compare.demo_setup import DemoOptions
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import Completion
from vllm_wanspec.lab.harness.models import Prompt
from vllm_wanspec.lab.harness.pacing_counts import MAX_OVERRUN_SHARE, Paced

__all__ = ["Arm", "DemoResult", "Divergence", "print_report", "write_json"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One target's completions, in the order of the prompts."""

    completions: tuple[Completion, ...]

    @property
    def tpot_ms(self) -> float | None:
        """Median over prompts of the time per token, milliseconds; None if none had two tokens."""
        times = [done.tpot_ms for done in self.completions if done.tpot_ms is not None]
        return statistics.median(times) if times else None

    @property
    def mean_tpot_ms(self) -> float | None:
        """Mean over prompts of the time per token, milliseconds; None if none had two tokens."""
        times = [done.tpot_ms for done in self.completions if done.tpot_ms is not None]
        return statistics.fmean(times) if times else None

    @property
    def ttft_ms(self) -> float:
        """Median over prompts of the time to the first token, milliseconds."""
        return statistics.median(done.ttft_ms for done in self.completions)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two completions of one prompt part.

    Args:
        prompt: The prompt.
        position: Index of the first different generated token.
        tie: Whether plain vLLM finds both tokens equally probable.
        plain_id: Plain vLLM's token there; None if it had ended.
        wanspec_id: WANSpec's token there; None if it had ended.
    """

    prompt: Prompt
    position: int
    tie: bool
    plain_id: int | None
    wanspec_id: int | None

    def __str__(self) -> str:
        tokens = f"plain token {self.plain_id}, WANSpec token {self.wanspec_id}"
        return f"{self.prompt.module}: at generated position {self.position}: {tokens}"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Everything a demo run measured.

    Args:
        options: The demo's settings.
        plain: Plain vLLM's completions.
        wanspec: WANSpec's completions.
        counters: Controller counters (``wanspec_hits_total`` …): increase during the WANSpec arm.
        divergences: Prompts whose outputs differ.
        paced: Forwards that each server paced during the two arms.
        seconds: Duration of the whole run.
    """

    options: DemoOptions
    plain: Arm
    wanspec: Arm
    counters: Mapping[str, float]
    divergences: Sequence[Divergence]
    paced: Mapping[str, Paced]
    seconds: float

    @property
    def ties(self) -> int:
        """How many outputs part at a floating-point tie."""
        return sum(found.tie for found in self.divergences)

    @property
    def identical(self) -> bool:
        """Whether all outputs are the same, up to ties."""
        return self.ties == len(self.divergences)

    @property
    def ratio(self) -> float | None:
        """WANSpec's time per token divided by plain vLLM's (of the medians)."""
        plain, wanspec = self.plain.tpot_ms, self.wanspec.tpot_ms
        return wanspec / plain if plain and wanspec is not None else None

    @property
    def plain_overhead_ms(self) -> float | None:
        """Milliseconds that a plain step takes on top of its pace: vLLM's own work, and a busy machine's delays."""
        plain = self.plain.tpot_ms
        return None if plain is None else plain - self.options.target_pace.step_ms(1)

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens that a verification step of the WANSpec target committed on average."""
        steps = self.counters["wanspec_steps_total"]
        return self.counters["wanspec_committed_tokens_total"] / steps if steps else None

    def count(self, name: str) -> int:
        """Return the increase of ``wanspec_<name>_total``."""
        return int(self.counters[f"wanspec_{name}_total"])

    def as_json(self) -> dict[str, Any]:
        """Return the result file's content."""
        options = self.options
        return {
            "rtt_ms": options.rtt_ms,
            "pacing": {
                "target_ms": options.target_pace.base_ms,
                "draft_ms": options.draft_pace.base_ms,
                "target_ms_per_token": options.target_pace.per_token_ms,
                "draft_ms_per_token": options.draft_pace.per_token_ms,
            },
            "arms": self._arms_json(),
            "identical": self.identical,
            "ratio": _rounded(self.ratio),
            "plain_overhead_ms": _rounded(self.plain_overhead_ms),
            "ties": self.ties,
            "divergences": [str(found) for found in self.divergences],
            "overruns": {name: _rounded(paced.share) for name, paced in self.paced.items()},
            "per_prompt": [
                {"none_tpot_ms": _rounded(plain.tpot_ms), "wanspec_tpot_ms": _rounded(wanspec.tpot_ms)}
                for plain, wanspec in zip(self.plain.completions, self.wanspec.completions, strict=True)
            ],
            "prompts": options.prompts,
            "max_tokens": options.max_tokens,
            "speculative_tokens": options.speculative_tokens,
            "seconds": round(self.seconds, 1),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "command": shlex.join(["wanspec", *sys.argv[1:]]),
        }

    def _arms_json(self) -> dict[str, Any]:
        return {
            "none": {"tpot_ms": _rounded(self.plain.tpot_ms), "ttft_ms": _rounded(self.plain.ttft_ms)},
            "wanspec": {
                "tpot_ms": _rounded(self.wanspec.tpot_ms),
                "ttft_ms": _rounded(self.wanspec.ttft_ms),
                "tokens_per_step": _rounded(self.tokens_per_step),
                "hits": self.count("hits"),
                "misses": self.count("misses"),
                "late": self.count("late_drafts"),
                "local_draft_passes": self.count("local_draft_passes"),
            },
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def write_json(result: DemoResult, path: Path) -> None:
    """Write the result file.

    Raises:
        WanspecError: The file cannot be written.
    """
    try:
        path.write_text(json.dumps(result.as_json(), indent=2) + "\n", "utf-8")
    except OSError as error:
        raise WanspecError(f"--json: cannot write {path}: {error.strerror}") from error


def print_report(result: DemoResult, console: Console) -> None:
    """Print the table, what is paced, and the warnings."""
    console.print(_table(result))
    options = result.options
    console.print(
        f"Emulated round trip between target and drafter: {options.rtt_ms:g} ms. Paced by sleeping in the model "
        f"forward: target {options.target_pace}, draft {options.draft_pace}. Everything else is real."
    )
    packages = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    console.print(f"{machine.describe()}; {packages}. The run took {result.seconds:.0f} s.", style="dim")
    shares = ", ".join(f"{name} {paced.share:.2%} of {paced.steps}" for name, paced in result.paced.items())
    overhead = f"A plain step takes {_ms(result.plain_overhead_ms)} on top of its pace"
    console.print(f"{overhead}; forwards slower than their pace: {shares}.", style="dim")
    _print_warnings(result, console)


def _print_warnings(result: DemoResult, console: Console) -> None:
    for name, paced in result.paced.items():
        if paced.share > MAX_OVERRUN_SHARE:
            problem = f"{paced.share:.1%} of the {name} server's forwards took longer than their pace"
            advice = "this machine is too slow or too busy for these figures"
            console.print(f"warning: {problem}: {advice}.", style="yellow")
    if not result.count("hits"):
        console.print("warning: no draft was ever used; see the servers' logs (--logs DIR).", style="yellow")
    for found in result.divergences:
        if found.tie:
            console.print(f"floating-point tie in {found}", style="dim", highlight=False)
        else:
            console.print(f"error: different output in {found}", style="bold red", highlight=False)
            console.print(f"  the prompt ends with {found.prompt.text[-100:]!r}", highlight=False, markup=False)


def _table(result: DemoResult) -> Table:
    table = Table(title=f"{result.options.prompts} prompts, up to {result.options.max_tokens} tokens each")
    table.add_column("")
    table.add_column("plain vLLM", justify="right")
    table.add_column("WANSpec", justify="right")
    ratio = "" if result.ratio is None else f" ({result.ratio:.2f} of plain)"
    table.add_row("time per token, median", _ms(result.plain.tpot_ms), f"[bold]{_ms(result.wanspec.tpot_ms)}[/]{ratio}")
    table.add_row("time per token, mean", _ms(result.plain.mean_tpot_ms), _ms(result.wanspec.mean_tpot_ms))
    table.add_row("time to first token, median", _ms(result.plain.ttft_ms), _ms(result.wanspec.ttft_ms))
    per_step = result.tokens_per_step
    table.add_row("tokens per step", "1", "?" if per_step is None else f"{per_step:.2f}")
    table.add_row("hits (commits that stay in the draft)", "", str(result.count("hits")))
    table.add_row("misses", "", str(result.count("misses")))
    table.add_row("late draft tokens", "", str(result.count("late_drafts")))
    table.add_row("draft passes on the target's side", "", str(result.count("local_draft_passes")))
    ties = f", {result.ties} floating-point ties" if result.ties else ""
    verdict = "[green]yes[/]" if result.identical else "[bold red]NO[/]"
    table.add_row("identical output", "", f"{verdict}{ties}")
    return table


def _ms(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} ms"
