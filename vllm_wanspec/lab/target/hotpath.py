"""``make bench-hotpath``: what the serving path itself costs.

A full batch of requests with full trees is stepped through the real proposer, pool and link, while a drafter in another
process sends what it drafts: how long `propose` and the taking of the drafts hold the model runner. Apart from that:
how long it takes to decode a frame of 64 nodes and to hang it into its tree. No model, no network, no vLLM.

Settings are the defaults but for the lookahead. What the late rule waits on purpose is taken off and shown apart; to
decide on it is part of the cost. As in vLLM's engine, the garbage collector runs, on a heap that was frozen before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vllm_wanspec.controller.v1.proposer import RemoteProposer
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.servers import Server, ServerGroup, ServerSpec, free_ports
from vllm_wanspec.lab.target.hotpath_frames import SPREAD_SESSIONS, measure_frames
from vllm_wanspec.lab.target.hotpath_report import Options, Report, Run, print_report, write_json
from vllm_wanspec.lab.target.played import make_pool, make_settings
from vllm_wanspec.sim.models import Language
from vllm_wanspec.sim.service import STATS_PATH
from vllm_wanspec.sim.target import PlayedTarget, StepTimes, Workload

__all__ = ["measure"]

START_DEADLINE_S = 30.0
LINK_DEADLINE_S = 10.0
STATS_TIMEOUT_S = 30.0
WARM_UP_WINDOW = 20
"""Steps; the trees are full when their mean size in one window is hardly larger than in the window before."""
FULL_GROWTH = 1.02
MAX_WARM_UP_WINDOWS = 12
REFRESH_STEPS = 10


def measure(options: Options, console: Console) -> Report:
    """Measure frames first, on a quiet process, then the serving path.

    Raises:
        ConfigError: The options ask for a tree that cannot be.
        WanspecError: The drafter did not start or serve, or the proposer gave up.
    """
    began_s = time.monotonic()
    target_core, drafter_core = machine.pin_cores(gpu=False)
    with _settings_of_process(target_core, options.switch_interval_ms), _Bar(console) as bar:
        bar.begin("frames", 2 * options.frames)
        frames = [measure_frames(options.frames, sessions, bar.advance) for sessions in (1, SPREAD_SESSIONS)]
        runs = []
        with _drafter(drafter_core, options.running_branches) as server:
            for number in range(1, options.runs + 1):
                bar.begin(f"run {number} of {options.runs}", options.steps)
                with _LiveRun(options, server, _Cores(target_core, drafter_core), bar) as live:
                    live.warm_up()
                    runs.append(live.measure())
        interval_ms = sys.getswitchinterval() * 1e3
    return Report(asdict(options), runs, frames, interval_ms, time.monotonic() - began_s)


class _LiveRun:
    """One pool with its link, a proposer over it, and a played target that steps them."""

    def __init__(self, options: Options, server: Server, cores: _Cores, bar: _Bar) -> None:
        self._steps = options.steps
        self._server, self._cores, self._bar = server, cores, bar
        language, workload = Language(), options.workload
        settings = make_settings(server.url, options.tree, options.late)
        self._pool = make_pool(settings, language, workload.limit)
        self._proposer = RemoteProposer.over(self._pool, settings.tree, workload.limit)
        counters = self._pool.counters
        self._target = PlayedTarget(self._proposer, language, workload, waited_s=lambda: counters.wait_seconds)

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

    def measure(self) -> Run:
        """Step and take the times.

        Raises:
            WanspecError: The proposer gave up, or no drafts came, so that there was nothing to measure.
        """
        counters = self._pool.counters
        times: list[StepTimes] = []
        sizes: list[float] = []
        before, nodes = self._stats(), counters.received_nodes
        began_s, busy_s = time.monotonic(), self._cores.busy_s()
        with _collections() as pauses:
            for _ in range(self._steps):
                times.append(self._target.step())
                sizes.append(self._tree_nodes())
                self._bar.advance()
        elapsed_s, busy_s = time.monotonic() - began_s, self._cores.busy_s() - busy_s
        nodes, after = counters.received_nodes - nodes, self._stats()
        if self._proposer._failed:
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
        )

    def _tree_nodes(self) -> float:
        """Nodes per session, those included that the commits of this step have ruled out: as `propose` found them."""
        trees = [live.core.tree for live in self._pool._sessions.values()]
        return _mean([0 if tree is None else tree.size for tree in trees])

    def _stats(self) -> dict[str, float]:
        with urllib.request.urlopen(self._server.url + STATS_PATH, timeout=STATS_TIMEOUT_S) as answer:
            found: dict[str, float] = json.load(answer)
        return found


class _Cores:
    """The processors that the measurement runs on, to see whether others used them too."""

    def __init__(self, *cores: int | None) -> None:
        self._names = {f"cpu{core}" for core in cores if core is not None}

    def busy_s(self) -> float:
        """Seconds for which they were busy so far, without this process's own; 0 where the system does not say."""
        try:
            lines = [line.split() for line in Path("/proc/stat").read_text("ascii").splitlines()]
        except OSError:
            return 0.0
        # user nice system idle iowait irq softirq steal
        ticks = sum(int(n) for name, *n8 in lines if name in self._names for n in (*n8[:3], *n8[5:8]))
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time() if ticks else 0.0


class _Bar:
    """A progress bar that is drawn between steps alone: a thread that draws would take the interpreter in them."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self._task = TaskID(0)
        self._count = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, description: str, total: int) -> None:
        """Go on to the next piece of work."""
        self._task = self._progress.add_task(description, total=total)
        self._progress.refresh()

    def advance(self) -> None:
        """One more is done."""
        self._count += 1
        self._progress.advance(self._task)
        if self._count % REFRESH_STEPS == 0:
            self._progress.refresh()


@contextmanager
def _drafter(core: int | None, running_branches: int) -> Iterator[Server]:
    """The drafter without a model, running in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="wanspec-hotpath-") as folder, ServerGroup(Path(folder)) as group:
        (port,) = free_ports(1)
        argv = [sys.executable, "-m", "vllm_wanspec.sim.service", "--port", str(port)]
        argv += ["--running-branches", str(running_branches)]
        server = group.start(ServerSpec("drafter", argv, port, core=core))
        group.wait_ready([server], START_DEADLINE_S)
        yield server


@contextmanager
def _settings_of_process(core: int | None, switch_interval_ms: float | None) -> Iterator[None]:
    """Pin this process, set the interpreter's switch interval, and freeze what is there as vLLM's engine does."""
    interval_s, allowed = sys.getswitchinterval(), machine.cores()
    gc.collect()
    gc.freeze()
    if switch_interval_ms is not None:
        sys.setswitchinterval(switch_interval_ms / 1e3)
    if core is not None:
        os.sched_setaffinity(0, {core})  # the link's thread, which starts later, inherits it
    try:
        yield
    finally:
        if core is not None:
            os.sched_setaffinity(0, allowed)
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


def main() -> None:
    """Measure, show, write; exit status 1 where ``--check`` is given and a bar is missed."""
    arguments = _parser().parse_args()
    options = Options(
        workload=Workload(rows=arguments.sessions),
        steps=arguments.steps,
        runs=arguments.runs,
        frames=arguments.frames,
        switch_interval_ms=arguments.switch_interval_ms,
        tree=arguments.tree,
        late=arguments.late,
        running_branches=arguments.running_branches,
    )
    console = Console()
    try:
        figures = measure(options, console).figures()
        write_json(figures, arguments.json)
    except (WanspecError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise SystemExit(2) from None
    print_report(figures, console)
    console.print(f"figures: {arguments.json}", style="dim")
    if arguments.check and not figures["held"]:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    standard = Options()
    parser = argparse.ArgumentParser(prog="python -m vllm_wanspec.lab.target.hotpath", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, default=Path("build/hotpath.json"), help="where to write the figures")
    add("--check", action="store_true", help="fail where a bar is missed")
    add("--sessions", type=_count, default=standard.workload.rows, help="requests in the batch")
    add("--steps", type=_count, default=standard.steps, help="measured steps in a run")
    add("--runs", type=_count, default=standard.runs)
    add("--frames", type=_count, default=standard.frames, help="single frames to decode and apply")
    add("--switch-interval-ms", type=float, help="the interpreter's; as it is, if not given")
    add("--tree", default="", help="tree settings other than the defaults, such as max_branches=8,max_nodes=256")
    add("--late", choices=("none", "adaptive", "fixed"), help="policy for late drafts; the default one, if not given")
    add("--running-branches", type=_count, default=standard.running_branches, help="the drafter's places for branches")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    main()
