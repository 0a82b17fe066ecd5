"""``make bench-hotpath``: what the serving path itself costs.

A large batch is stepped through the real pool and link, with what each of the two model runners calls before them,
while a drafter in another process sends trees for as many of the requests as it has room for: how long our calls of a
step hold the model runner. Apart from that: how long it takes to decode a frame of 64 nodes and to hang it into its
tree. No model, no network, no vLLM.

On V1 those calls are the beginning of the step, `propose`, and the taking of the drafts. On Model Runner V2 with async
scheduling they are the laying out of a step without the walk itself, which is the device's, and the taking of its
output, publishing included.

Settings are the defaults but for the lookahead. What the late rule waits on purpose is taken off and shown apart; to
decide on it is part of the cost. As in vLLM's engine, the garbage collector runs, on a heap that was frozen before.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import typer
from rich.console import Console
from rich.progress import Progress

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.v1.proposer import RemoteProposer
from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.cpu import core_seconds
from vllm_wanspec.lab.harness.launch import serving
from vllm_wanspec.lab.harness.running import Outputs, log_folder
from vllm_wanspec.lab.harness.servers import HOST, Server, ServerSpec, free_ports, service_command
from vllm_wanspec.lab.harness.view import progress_bar
from vllm_wanspec.lab.report.writing import measured
from vllm_wanspec.lab.stats import percentile
from vllm_wanspec.lab.target.frames import FRAME_NODES, SPREAD_SESSIONS, measure_frames
from vllm_wanspec.lab.target.hotpath_report import RUNNERS, V1, HotpathOptions, HotpathResult, Run, hotpath_document
from vllm_wanspec.lab.target.played import make_pool, make_settings
from vllm_wanspec.sim.models import Language
from vllm_wanspec.sim.service import STATS_PATH
from vllm_wanspec.sim.target import PlayedTarget, StepTimes, Workload

if TYPE_CHECKING:
    from vllm_wanspec.lab.target.played_async import AsyncProposer

STANDARD = HotpathOptions()
LINK_DEADLINE_S = 10.0
STATS_TIMEOUT_S = 30.0
WARM_UP_WINDOW = 20
"""Steps; the trees are full when their mean size in one window is hardly larger than in the window before."""
FULL_GROWTH = 1.02
MAX_WARM_UP_WINDOWS = 12
CALIBRATIONS = 201
REFRESH_STEPS = 10


def measure(options: HotpathOptions, console: Console) -> HotpathResult:
    """Measure frames first, on a quiet process, then the serving path.

    Raises:
        ConfigError: The options ask for a tree that cannot be.
        WanspecError: The drafter did not start or serve, or the proposer gave up.
    """
    began_s = time.monotonic()
    target_core, drafter_core = machine.pin_cores(gpu=False)
    cores = [core for core in (target_core, drafter_core) if core is not None]
    drafter = _drafter_spec(drafter_core, options)
    settings = make_settings(f"http://{HOST}:{drafter.port}", options.tree, options.late)
    with (
        log_folder(None, "", console) as folder,
        _settings_of_process(options.switch_interval_ms),
        machine.on_core(target_core),  # the link's threads, which start later, inherit it
    ):
        with progress_bar(console, auto_refresh=False) as progress:
            advance = _drawn_by_hand(progress, "frames", 2 * options.frames)
            frames = {
                f"{FRAME_NODES} nodes of {name}": measure_frames(options.frames, sessions, advance)
                for name, sessions in (("1 session", 1), (f"{SPREAD_SESSIONS} sessions", SPREAD_SESSIONS))
            }
        runs: dict[str, list[Run]] = {runner: [] for runner in RUNNERS}
        with serving([drafter], folder, console) as servers:
            for number, runner in product(range(1, options.runs + 1), RUNNERS):
                with (
                    _LiveRun(runner, options, settings, servers["drafter"], cores) as live,
                    progress_bar(console, auto_refresh=False) as progress,
                ):
                    advance = _drawn_by_hand(progress, f"{runner}, run {number} of {options.runs}", options.steps)
                    live.warm_up()
                    runs[runner].append(live.measure(advance))
        interval_ms = sys.getswitchinterval() * 1e3
    return HotpathResult(options, runs, frames, interval_ms, time.monotonic() - began_s)


def _drawn_by_hand(progress: Progress, description: str, total: int) -> Callable[[], None]:
    """Begin a task; what is returned says that one more step is done, and draws the bar between some of them."""
    task = progress.add_task(description, total=total)
    return lambda: progress.update(task, advance=1, refresh=progress.tasks[task].completed % REFRESH_STEPS == 0)


class _LiveRun:
    """One pool with its link, what a model runner calls before it, and a played target that steps them."""

    def __init__(
        self, runner: str, options: HotpathOptions, settings: Settings, server: Server, cores: Sequence[int]
    ) -> None:
        self._steps = options.steps
        self._server, self._cores = server, cores
        language, workload = Language(), options.workload
        self._proposer: RemoteProposer | AsyncProposer
        if runner == V1:
            self._pool = make_pool(settings, language, workload.limit)
            self._proposer = RemoteProposer.over(self._pool, settings.tree, workload.limit)
            counters = self._pool.counters
            self._target = PlayedTarget(self._proposer, language, workload, waited_s=lambda: counters.wait_seconds)
        else:
            from vllm_wanspec.lab.target.played_async import make_async  # needs torch

            self._pool, self._proposer, self._target = make_async(settings, language, workload)

    def __enter__(self) -> Self:
        self._pool.start()
        deadline_s = time.monotonic() + LINK_DEADLINE_S
        while self._pool.links[0].welcome is None:
            if time.monotonic() > deadline_s:
                self._pool.stop()
                raise WanspecError(f"the drafter did not welcome us; its last words:\n{self._server.log_tail()}")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()

    def warm_up(self) -> None:
        """Step until the trees do not grow any more."""
        before = 0.0
        for _ in range(MAX_WARM_UP_WINDOWS):
            sizes = []
            for _ in range(WARM_UP_WINDOW):
                self._target.step()
                sizes.append(self._tree_nodes())
            now = _mean(sizes)
            if now <= before * FULL_GROWTH:
                return
            before = now

    def measure(self, advance: Callable[[], None]) -> Run:
        """Step and take the times; ``advance`` is called after each.

        Raises:
            WanspecError: The proposer gave up, or no drafts came, so that there was nothing to measure.
        """
        counters = self._pool.counters
        loop_us = calibration_us()
        times: list[StepTimes] = []
        sizes: list[float] = []
        before, nodes = self._stats(), counters.received_nodes
        began_s, busy_s = time.monotonic(), self._others_s()
        with _collections() as pauses:
            for _ in range(self._steps):
                times.append(self._target.step())
                sizes.append(self._tree_nodes())
                advance()
        elapsed_s, busy_s = time.monotonic() - began_s, self._others_s() - busy_s
        nodes, after = counters.received_nodes - nodes, self._stats()
        if self._proposer.failed:
            raise WanspecError("the proposer gave up; its error is above")
        if not any(step.offered for step in times):
            raise WanspecError(f"no drafts; the drafter's last words:\n{self._server.log_tail()}")
        engine = {name: after[name] - before[name] for name in after}
        return Run(
            tuple(times),
            mean_tree_nodes=_mean(sizes),
            nodes_per_s=nodes / elapsed_s,
            elapsed_s=elapsed_s,
            engine=engine,
            gc_pauses_ms=tuple(pauses),
            others_share=max(0.0, busy_s - engine["cpu_s"]) / elapsed_s,
            loop_us=loop_us,
        )

    def _tree_nodes(self) -> float:
        """Nodes per session that has a tree, those included that the step's commits have ruled out."""
        trees = [live.core.tree for live in self._pool._sessions.values()]
        return _mean([tree.size for tree in trees if tree is not None])

    def _others_s(self) -> float:
        """Seconds for which our cores were busy so far, without this process's own; 0 where the system does not say."""
        busy_s = sum(map(core_seconds, self._cores))
        return busy_s - time.process_time() if busy_s else 0.0

    def _stats(self) -> dict[str, float]:
        with urllib.request.urlopen(self._server.url + STATS_PATH, timeout=STATS_TIMEOUT_S) as answer:
            found: dict[str, float] = json.load(answer)
        return found


def calibration_us() -> float:
    """What a fixed loop of interpreted code takes, in microseconds, the median of some: this processor, right now."""
    times_us = []
    for _ in range(CALIBRATIONS):
        found: dict[int, list[int]] = {}
        began_ns = time.perf_counter_ns()
        for number in range(1000):
            found[number & 63] = [number, len(found)]
        times_us.append((time.perf_counter_ns() - began_ns) / 1e3)
    return percentile(times_us, 0.5)


def _drafter_spec(core: int | None, options: HotpathOptions) -> ServerSpec:
    """The invented drafter, a process of its own."""
    (port,) = free_ports(1)
    argv = service_command(
        port,
        *("--running-branches", str(options.running_branches)),
        *("--max-sessions", str(options.drafted)),
        *("--pace", options.pace),
    )
    return ServerSpec("drafter", argv, port, core=core)


@contextmanager
def _settings_of_process(switch_interval_ms: float | None) -> Iterator[None]:
    """Set the interpreter's switch interval, and freeze what is there as vLLM's engine does."""
    interval_s = sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    if switch_interval_ms is not None:
        sys.setswitchinterval(switch_interval_ms / 1e3)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
        gc.unfreeze()


@contextmanager
def _collections() -> Iterator[list[float]]:
    """The garbage collector's pauses in milliseconds, in whatever thread they happen."""
    pauses_ms: list[float] = []
    began_s = 0.0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal began_s
        if phase == "start":
            began_s = time.perf_counter()
        else:
            pauses_ms.append((time.perf_counter() - began_s) * 1e3)

    gc.callbacks.append(note)
    try:
        yield pauses_ms
    finally:
        gc.callbacks.remove(note)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def main(
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = Path(
        "build/hotpath.json"
    ),
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write a report here.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Fail where a bar is missed.")] = False,
    sessions: Annotated[int, typer.Option(min=1, help="Requests in the batch.")] = STANDARD.workload.rows,
    drafted: Annotated[int, typer.Option(min=1, help="Of them the drafter has room for.")] = STANDARD.drafted,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps in a run.")] = STANDARD.steps,
    runs: Annotated[int, typer.Option(min=1, help="Runs, each with sessions of its own.")] = STANDARD.runs,
    frames: Annotated[int, typer.Option(min=1, help="Single frames to decode and apply.")] = STANDARD.frames,
    switch_interval_ms: Annotated[
        float | None, typer.Option(help="The interpreter's.", show_default="as it is")
    ] = STANDARD.switch_interval_ms,
    tree: Annotated[
        str, typer.Option(help="Tree settings other than the defaults, such as max_branches=8,max_nodes=256.")
    ] = STANDARD.tree,
    late: Annotated[
        Literal["none", "adaptive", "fixed"] | None,
        typer.Option(help="Policy for late drafts.", show_default="the default one"),
    ] = None,
    running_branches: Annotated[
        int, typer.Option(min=1, help="The drafter's places for branches.")
    ] = STANDARD.running_branches,
    pace: Annotated[str, typer.Option(help="The drafter's step: ms + ms per branch.")] = STANDARD.pace,
) -> None:
    """Measure what the serving path itself costs: no model, no network, no vLLM.

    Exit status: 0, or 1 when something failed or --check found a bar missed, 2 when an option is wrong, 130 after
    Ctrl-C.
    """

    def read_and_measure(console: Console) -> HotpathResult:
        Pacing.parse(pace, "--pace")
        wanted = (drafted, steps, runs, frames, switch_interval_ms, tree, late, running_branches, pace)
        return measure(HotpathOptions(Workload(rows=sessions), *wanted), console)

    with suppress(OSError):  # what is wrong with the folder is told in a moment
        json_file.parent.mkdir(parents=True, exist_ok=True)
    outputs = Outputs(json_file, markdown_file)
    measured("python -m vllm_wanspec.lab.target.hotpath", read_and_measure, hotpath_document, outputs, check)


if __name__ == "__main__":
    typer.run(main)
