"""The width bench: its figures, its load on a toy drafter, its profile's groups, and a whole run with stand-ins."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from rich.console import Console
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, draft_model, drafter_argv, toy
from typer import Typer
from typer.testing import CliRunner

from vllm_wanspec.config import WIDTH_ENV
from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.errors import ConfigError, UnsupportedError, WanspecError
from vllm_wanspec.lab.drafter import width, width_profile
from vllm_wanspec.lab.drafter.streams import DraftTokenizer
from vllm_wanspec.lab.drafter.width import WidthOptions, drafter_spec, parse_loads, parse_paces, parse_widths, run_width
from vllm_wanspec.lab.drafter.width_measure import (
    ChurnRow,
    CpuClock,
    Load,
    Meter,
    Reading,
    Row,
    SteadyRow,
    Window,
    Workload,
    contexts,
    group_processes,
    medians,
)
from vllm_wanspec.lab.drafter.width_profile import find_py_spy, fold, record
from vllm_wanspec.lab.drafter.width_report import Arm, WidthResult, markdown, print_report, write_json, write_markdown
from vllm_wanspec.lab.drafter.width_steady import SteadyLoad
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.servers import ServerSpec

TOKENIZER = DraftTokenizer(VOCAB_SIZE, FINGERPRINT, lambda text: [ord(letter) % VOCAB_SIZE for letter in text])
COMMON = {"width": 1, "running": 1.0, "step_ms": 4.0, "events_per_s": 250.0, "starts_per_s": 1.5}
CPU = {"api_cpu": 0.2, "engine_cpu": 0.7}
STEADY = SteadyRow(**COMMON, **CPU, rounds=9, measured_s=4.5)
CHURN = ChurnRow(**COMMON, **CPU, gap_ms=3.9, first_ms=7.0, bytes_per_s=40_000.0, committed_per_s=25.0)


def row(width: int, step_ms: float, running: float | None = None, like: Row = STEADY, **more: float) -> Row:
    return replace(like, width=width, step_ms=step_ms, running=width if running is None else running, **more)


def result(*arms: Arm, churning: tuple[Arm, ...] = ()) -> WidthResult:
    return WidthResult(arms, churning, SteadyLoad(), Load(), repeats=3, window_s=8.0, seconds=99.0)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_contexts_are_of_equal_length(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc"}\n\n{"prompt": "de"}\n')
    a, b, c, d, e = TOKENIZER.encode("abcde")
    assert contexts(path, TOKENIZER, 6) == [[a, b, c, d, e, a], [d, e, a, b, c, d]]
    for text in ("", "{}", "nonsense", '{"prompt": ""}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="prompts: "):
            contexts(path, TOKENIZER)


def test_a_window_s_figures() -> None:
    before = Reading(10.0, {"drafted_tokens": 100.0, "branch_seconds": 5.0}, {"api": 1.0, "engine": 2.0, "core": 9.0})
    after = Reading(
        12.0,
        {
            "drafted_tokens": 500.0,
            "branch_seconds": 9.0,
            "starts": 8.0,
            "gap_seconds": 1.5,
            "first_seconds": 0.2,
            "firsts": 100.0,
        },
        {"api": 1.5, "engine": 3.0, "core": 10.9},
    )
    found = Window(before, after, received_bytes=4000, committed=50).row(2)
    assert found.running == pytest.approx(2.0)
    assert found.is_near
    assert found.step_ms == pytest.approx(10.0)
    assert found.gap_ms == pytest.approx(5.0)
    assert found.first_ms == pytest.approx(2.0)
    assert (found.events_per_s, found.starts_per_s) == (200.0, 4.0)
    assert (found.bytes_per_s, found.committed_per_s) == (2000.0, 25.0)
    assert (found.api_cpu, found.engine_cpu) == (0.25, 0.5)
    assert found.others_cpu == pytest.approx(0.2)


def test_a_window_without_anything_is_all_zero() -> None:
    found = Window(Reading(1.0), Reading(2.0), 0, 0).row(8)
    assert found.step_ms == found.gap_ms == found.events_per_s == found.api_cpu == found.others_cpu == 0.0
    assert not found.is_near


def test_medians_are_taken_figure_by_figure() -> None:
    found = medians([row(8, 3.0, events_per_s=5.0), row(8, 1.0, events_per_s=6.0), row(8, 2.0, events_per_s=1.0)])
    assert isinstance(found, SteadyRow)
    assert (found.width, found.step_ms, found.events_per_s) == (8, 2.0, 5.0)


METRICS = """\
# HELP wanspec_drafted_tokens_total Tokens.
wanspec_drafted_tokens_total 42.0
wanspec_running_branches 3.0
wanspec_gap_seconds_total{engine="0",model_name="a b"} 1.5
wanspec_gap_seconds_total{engine="1",model_name="a b"} 0.5
wanspec_gap_seconds_bucket{le="0.1"} 7.0
"""


def test_only_the_wanted_samples_are_read() -> None:
    async def metrics(request: web.Request) -> web.StreamResponse:
        return web.Response(text=METRICS)

    async def run() -> Reading:
        async with serving(metrics) as url, aiohttp.ClientSession() as http:
            with pytest.raises(ClientError, match="cannot read metrics"):
                await Meter(http, url + "/nothing", CpuClock()).read()
            return await Meter(http, url, CpuClock(os.getpid(), core=0)).read()

    reading = asyncio.run(run())
    assert reading.counters == {"drafted_tokens": 42.0, "gap_seconds": 2.0}
    if sys.platform == "linux":
        assert reading.cpu_s["api"] > 0.0
        assert reading.cpu_s["core"] > 0.0


class serving:
    """A web server with one page, ``/metrics``."""

    def __init__(self, handler: Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]) -> None:
        app = web.Application()
        app.router.add_get("/metrics", handler)
        self._runner = web.AppRunner(app)

    async def __aenter__(self) -> str:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def test_no_processes_of_no_group() -> None:
    assert group_processes(2**22 + 1) == {}


def test_the_workload_opens_one_session_after_another() -> None:
    async def run(url: str) -> None:
        async with asyncio.timeout(20.0), aiohttp.ClientSession() as http:
            workload = Workload(http, url, TOKENIZER, [[1] * 50, [2] * 50], seed=0)
            async with workload.running(Load(), 8):
                await until(lambda: server.attempts > 2)
        assert workload.tally.received_bytes > 0

    with DrafterServer(toy(), model=draft_model(max_context=150)) as server:
        asyncio.run(run(server.url))


def test_a_failing_workload_is_told() -> None:
    async def run() -> None:
        async with asyncio.timeout(20.0), aiohttp.ClientSession() as http:
            async with Workload(http, "http://127.0.0.1:9", TOKENIZER, [[1]], seed=0).running(Load(), 8):
                await asyncio.sleep(0.2)

    with pytest.raises(ClientError, match="no drafter there"):
        asyncio.run(run())


def test_the_bar() -> None:
    assert Arm(None, (row(1, 4.0), row(32, 9.9))).held is True
    assert Arm(None, (row(1, 4.0), row(32, 10.1))).held is False
    assert Arm(None, (row(1, 4.0), row(32, 9.9, running=20.0))).held is None  # too few ran
    assert Arm(None, (row(1, 4.0), row(8, 9.9))).held is None
    assert not result().held
    assert result(Arm(None, (row(1, 4.0), row(32, 8.0)))).held


def test_the_report(tmp_path: Path) -> None:
    pace = Pacing(5.0, 0.02)
    windows = (row(32, 8.0), row(1, 4.0), row(32, 9.0), row(1, 5.0), row(64, 40.0, running=30.0))
    churn = Arm(None, (row(1, 4.0, like=CHURN), row(32, 30.0, like=CHURN)))
    found = result(
        Arm(None, windows, {"api": {"our service": 0.75, "other": 0.25}}),
        Arm(pace, (row(1, 6.0), row(32, 30.0, others_cpu=0.4))),
        churning=(churn,),
    )
    assert [one.width for one in found.steady[0].rows] == [1, 32, 64]
    page = markdown(found)
    steady, commits = page.split("## Commits")
    assert "32 branches take 1.89 × the step of one; at most 2.5 is asked for: held." in steady
    assert "32 branches take 5.00 × the step of one; at most 2.5 is asked for: missed." in steady
    assert "step of 32 branches: engine 5.95 ms, 1.89 × its time for one; API server 1.70 ms." in steady
    assert "is asked for" not in commits
    assert "measured s" in steady
    assert "first ms" in commits
    assert "| 32 | 32.0 | 30.00 | 7.50 | 250 |" in commits
    assert "(!) Width 64: fewer than 90% of the branches asked for ran" in steady
    assert "| our service | 75% |" in steady
    assert "DISTURBED: other programs took up to 40% of the drafter's core" in steady
    assert "No profile" not in page
    assert "No profile" in markdown(result(churning=(churn,)))
    output = io.StringIO()
    print_report(found, Console(file=output, width=200))
    assert "paced to 5 ms + 0.02 ms per token" in output.getvalue()
    write_json(found, tmp_path / "width.json")
    write_markdown(found, tmp_path / "width.md")
    data = json.loads((tmp_path / "width.json").read_text())
    assert data["held"] is False
    assert [(arm["pace"], arm["held"]) for arm in data["steady"]] == [(None, True), ("5.0+0.02", False)]
    assert data["steady"][0]["widths"][1]["ratio"] == pytest.approx(8.5 / 4.5, abs=1e-4)
    assert len(data["steady"][0]["windows"]) == 5
    assert data["churning"][0]["widths"][1]["first_ms"] == 7.0
    assert {"machine", "versions", "commit", "command", "loads"} <= data.keys()
    with pytest.raises(WanspecError, match="--json: cannot write"):
        write_json(found, tmp_path)


SAMPLES = """\
main (a.py:1);run (asyncio/runners.py:5);Connection._run (vllm_wanspec/drafter/host.py:7) 30
main (a.py:1);Connection._run (vllm_wanspec/drafter/host.py:7);append (vllm_wanspec/core/tree.py:9) 10
main (a.py:1);output_handler (vllm/v1/engine/async_llm.py:3);f (vllm/v1/engine/output_processor.py:4);g (x.py:2) 50
bootstrap (threading.py:1);Condition.wait (threading.py:300) 500
main (a.py:1);Runner.run (asyncio/runners.py:118) 400
main (a.py:1) 10
broken
"""


def test_samples_are_folded_by_the_innermost_known_frame() -> None:
    shares = fold(SAMPLES.splitlines(), "api")
    assert shares == {"output processor": 0.5, "our service": 0.3, "session: decide": 0.1, "other": 0.1}
    assert next(iter(shares)) == "output processor"
    assert fold([], "engine") == {}


def test_a_profile_is_recorded_side_by_side(tmp_path: Path) -> None:
    program = tmp_path / "py-spy"
    program.write_text(
        "#!/bin/sh\nwhile [ $# -gt 1 ]; do case $1 in --output) out=$2;; --pid) pid=$2;; esac; shift; done\n"
        '[ "$pid" = 2 ] && exit 1\n'
        'echo "_read (vllm_wanspec/drafter/routes.py:5) 3" > "$out"\n'
    )
    program.chmod(0o755)
    found = asyncio.run(record(str(program), {"api": 1, "engine": 2}, 1, tmp_path))
    assert found == {"api": {"our service": 1.0}}


def test_py_spy_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(width_profile.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_py_spy() is None
    (tmp_path / "py-spy").touch()
    assert find_py_spy() == str(tmp_path / "py-spy")


def test_settings_are_read() -> None:
    assert parse_widths("32, 1,8") == (1, 8, 32)
    assert parse_paces("none, 5+0.02") == (None, Pacing(5.0, 0.02))
    assert parse_loads("churning, steady") == ("churning", "steady")
    for text in ("", "idle"):
        with pytest.raises(ConfigError, match="--loads"):
            parse_loads(text)
    for text in ("", "a", "1,1", "0", "2000"):
        with pytest.raises(ConfigError, match="--widths"):
            parse_widths(text)
    with pytest.raises(ConfigError, match="--pace"):
        parse_paces("fast")
    with pytest.raises(ConfigError, match="1 is missing"):
        WidthOptions(widths=(8, 16))


def test_what_is_started() -> None:
    paced, free = (drafter_spec(Path("draft"), 64, pace) for pace in (Pacing(5.0, 0.02), None))
    assert paced.env is not None
    assert free.env is not None
    assert paced.env["WANSPEC_PACING"] == "5.0+0.02"
    assert "WANSPEC_PACING" not in free.env
    assert free.env[WIDTH_ENV] == "64"
    assert free.argv[1:5] == ["-m", "vllm_wanspec.cli.main", "drafter", "draft"]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of models without weights, and a toy drafter that is started in place of vLLM."""
    for folder in ("target", "draft"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def f(x):"}\n')

    def spec(draft: Path, places: int, pace: Pacing | None) -> ServerSpec:
        real = drafter_spec(draft, places, pace)
        return replace(real, argv=drafter_argv(real.port, places))

    monkeypatch.setattr(width, "drafter_spec", spec)
    monkeypatch.setattr(width.DraftTokenizer, "load", lambda model: TOKENIZER)
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    monkeypatch.setattr(width, "find_py_spy", lambda: None)
    return tmp_path


def test_a_whole_run(stand_ins: Path) -> None:
    arguments = ["--models", str(stand_ins), "--widths", "1,4", "--repeat", "2", "--seconds", "0.3", "--warm-up", "0.1"]
    arguments += ["--json", str(stand_ins / "w.json"), "--markdown", str(stand_ins / "w.md")]
    app = Typer()
    app.command()(width.main)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    data = json.loads((stand_ins / "w.json").read_text())
    for load, figure in (("steady", "measured_s"), ("churning", "bytes_per_s")):
        assert [arm["pace"] for arm in data[load]] == [None, "5.0+0.02"]
        for arm in data[load]:
            assert [found["width"] for found in arm["widths"]] == [1, 4]
            assert len(arm["windows"]) == 4
            assert all(found["events_per_s"] > 0.0 and found[figure] > 0.0 for found in arm["windows"])
    assert "No profile" in (stand_ins / "w.md").read_text()
    done = CliRunner().invoke(app, [*arguments, "--pace", "none", "--loads", "steady", "--check"])
    assert done.exit_code == 1  # width 32 was not measured


def test_a_run_that_cannot_be(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Typer()
    app.command()(width.main)
    for arguments, problem in (
        (["--json", str(stand_ins)], "--json: cannot write"),
        (["--models", str(stand_ins / "draft")], "demo models"),
        (["--widths", "8"], "1 is missing"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2
        assert problem in done.output
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed")
    with pytest.raises(UnsupportedError):
        run_width(WidthOptions(models=stand_ins), Console(file=io.StringIO()))
