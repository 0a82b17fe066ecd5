"""The overhead bench: its ratios, its direct client, its servers, and a whole run with stand-ins."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from rich.console import Console
from toys import FINGERPRINT, VOCAB_SIZE
from typer import Typer
from typer.testing import CliRunner

from vllm_wanspec.errors import ConfigError, UnsupportedError, WanspecError
from vllm_wanspec.lab.drafter.overhead_direct import DirectLoad, direct_spec, direct_window, make_app
from vllm_wanspec.lab.drafter.streams import DraftTokenizer
from vllm_wanspec.lab.drafter.width_measure import SteadyRow
from vllm_wanspec.lab.drafter.width_steady import LOOKAHEAD, SteadyLoad
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.cpu import CpuClock
from vllm_wanspec.lab.harness.launch import drafter_spec
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.servers import ServerSpec
from vllm_wanspec.lab.target import overhead, overhead_measure
from vllm_wanspec.lab.target.overhead_measure import SILENT_DRAFTER, OverheadOptions, plan_targets
from vllm_wanspec.lab.target.overhead_report import (
    DRAFTER,
    TARGET,
    Comparison,
    OverheadResult,
    markdown,
    print_report,
    write_json,
)

HERE = Path(__file__).parents[1]
TOKENIZER = DraftTokenizer(VOCAB_SIZE, FINGERPRINT, lambda text: [ord(letter) % VOCAB_SIZE for letter in text])
FAKE_DIRECT = """
import asyncio, sys
from aiohttp import web
from vllm_wanspec.lab.drafter.overhead_direct import DirectLoad, make_app

async def generate(context, tokens):
    for _ in range(tokens):
        await asyncio.sleep(0.001)
        yield 1

web.run_app(make_app(DirectLoad(generate, [[1, 2]])), host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""


def compared(part: str, ratios: Sequence[float], **details: float) -> Comparison:
    base = [4.0 + index for index in range(len(ratios))]
    ours = tuple(ratio * value for ratio, value in zip(ratios, base, strict=True))
    return Comparison(part, f"{part} case", ours, tuple(base), details)


def result(*rows: Comparison, differences: Sequence[str] = (), prompts: int = 12, rounds: int = 5) -> OverheadResult:
    return OverheadResult(rows, SteadyLoad(), prompts, 96, 3.0, rounds, 3, differences, 99.0)


def test_a_ratio_is_the_median_of_the_rounds_with_its_spread() -> None:
    found = compared(TARGET, (1.02, 1.00, 1.04, 1.03, 1.50))
    assert found.ratio.value == pytest.approx(1.03)  # the ratio of the sums would be 1.14
    assert found.ratio.low == pytest.approx(1.00)
    assert found.ratio.high == pytest.approx(1.50)
    steady = compared(TARGET, (1.03,) * 7).ratio
    assert steady == pytest.approx((1.03, 1.03, 1.03))


@pytest.mark.parametrize(
    ("part", "ratios", "held"),
    [
        (TARGET, (1.04,) * 5, True),
        (TARGET, (1.06,) * 5, False),
        (TARGET, (1.04, 1.04, 1.04, 1.2, 1.2), False),  # its median would do
        (TARGET, (1.04,) * 4, None),
        (DRAFTER, (0.91,) * 5, True),
        (DRAFTER, (0.89,) * 5, False),
        (DRAFTER, (0.92, 0.92, 0.92, 0.7, 0.7), False),
        (DRAFTER, (0.91,) * 4, None),
    ],
)
def test_the_bars(part: str, ratios: tuple[float, ...], held: bool | None) -> None:
    row = compared(part, ratios)
    assert row.held is held
    assert result(row).all_held is (held is True)


def test_what_a_run_cannot_tell() -> None:
    row = compared(TARGET, (1.0,) * 5)
    assert result(row).held(row) is True
    assert result(row, prompts=11).held(row) is None
    assert result(row, differences=["silent drafter, x, token 3"]).held(row) is None
    assert not result().all_held


def test_the_report(tmp_path: Path) -> None:
    found = result(
        compared(TARGET, (1.02,) * 5, opened_sessions=60.0),
        compared(DRAFTER, (0.8, 0.8, 0.85, 0.8, 0.8), others_cpu=0.3),
        differences=["dead drafter, x, token 3"],
        prompts=3,
    )
    page = markdown(found)
    assert "| target case | 6.12 | 6.00 | 1.020 | 1.020–1.020 | 1.020–1.020 | ≤ 1.05 – |" in page
    assert "| drafter case | 5.10 | 6.00 | 0.800 | 0.800–0.850 | 0.800–0.850 | ≥ 0.9 ✗ |" in page
    assert page.count("(not paced)") == 2
    assert "Different output: dead drafter, x, token 3" in page
    assert "DISTURBED: other programs took up to 30% of the drafter's core" in page
    assert "Not judged" in page
    output = io.StringIO()
    print_report(found, Console(file=output, width=160))
    assert "0.800–0.850" in output.getvalue()
    write_json(found, tmp_path / "o.json")
    data = json.loads((tmp_path / "o.json").read_text())
    assert [row["held"] for row in data["rows"]] == [None, False]
    assert data["rows"][1]["ratio_range"] == [0.8, 0.85]
    assert data["rows"][0]["details"] == {"opened_sessions": 60.0}
    assert {"bars", "held", "versions", "machine", "commit", "command"} <= data.keys()
    with pytest.raises(WanspecError, match="--json: cannot write"):
        write_json(found, tmp_path)
    calm = markdown(result(compared(DRAFTER, (1.0,) * 5)))
    assert "DISTURBED" not in calm
    assert "Not judged" not in calm
    assert "empty lists" not in calm  # the target's part was not asked for


class Playing:
    """The direct client's pages over requests whose tokens come at a steady pace."""

    def __init__(self, step_s: float = 0.002) -> None:
        self.asked: list[tuple[tuple[int, ...], int]] = []
        self._step_s = step_s
        self._runner = web.AppRunner(make_app(DirectLoad(self._generate, [[1, 2, 3], [4, 5, 6]])))

    async def _generate(self, context: list[int], tokens: int) -> AsyncIterator[int]:
        self.asked.append((tuple(context), tokens))
        for _ in range(tokens // 2):
            await asyncio.sleep(self._step_s)
            yield 2

    async def __aenter__(self) -> str:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def test_the_direct_client_is_measured_like_a_session() -> None:
    playing = Playing()

    async def run(width: int) -> SteadyRow:
        async with asyncio.timeout(20.0), playing as url, aiohttp.ClientSession() as http:
            return await direct_window(http, url, SteadyLoad(branch_depth=40), width, 0.3, CpuClock())

    found = asyncio.run(run(3))
    rounds = int(found.rounds)
    assert rounds > 1
    assert playing.asked[:3] == [((1, 2, 0), 40), ((1, 2, 1), 40), ((1, 2, 2), 40)]  # a context, and a token of its own
    assert playing.asked[3][0] == (4, 5, 0)
    assert found.is_near
    assert found.events_per_s * found.step_ms == pytest.approx(3000.0, rel=0.2)
    assert found.measured_s > 0.0
    playing = Playing()
    asyncio.run(run(1))
    assert playing.asked[0] == ((1, 2, 0), LOOKAHEAD)  # as long as a main line


def test_arrivals_are_kept_request_by_request() -> None:
    times = iter([1.0, 2.0, 3.0, 4.0])

    async def generate(context: list[int], tokens: int) -> AsyncIterator[int]:
        for _ in range(2):
            await asyncio.sleep(0.0)
            yield 1 + context[-1]

    load = DirectLoad(generate, [[7, 7]], clock=lambda: next(times))
    assert asyncio.run(load.round(2, 9)) == [[1.0, 3.0], [2.0, 2.0, 4.0, 4.0]]


def test_a_direct_client_that_fails_is_told() -> None:
    async def window(url: str) -> SteadyRow:
        async with aiohttp.ClientSession() as http:
            return await direct_window(http, url, SteadyLoad(), 1, 0.1, CpuClock())

    async def generate(context: list[int], tokens: int) -> AsyncIterator[int]:
        yield 1
        raise RuntimeError("dead engine")

    async def broken() -> None:
        playing = Playing()
        playing._runner = web.AppRunner(make_app(DirectLoad(generate, [[1]])))
        async with playing as url:
            await window(url)

    with pytest.raises(ClientError, match="the direct client failed: 500"):
        asyncio.run(broken())
    with pytest.raises(ClientError, match="the direct client failed"):
        asyncio.run(window("http://127.0.0.1:9"))


def test_what_is_started(tmp_path: Path) -> None:
    plan = plan_targets(DemoModels(Path("T"), Path("D"), Path("P")), tmp_path)
    assert list(plan.specs) == [SILENT_DRAFTER, "empty-1", "silent-1", "dead-1"]
    silent_port = plan.specs[SILENT_DRAFTER].port
    assert list(plan.specs[SILENT_DRAFTER].argv[-4:]) == ["--model", "T", "--pace", "60000"]
    assert (
        "proposers.EmptyProposer"
        in plan.specs["empty-1"].argv[plan.specs["empty-1"].argv.index("--speculative-config") + 1]
    )
    assert f"ws://127.0.0.1:{silent_port}" in (tmp_path / "silent-1.yaml").read_text().replace("http:", "ws:")
    assert "127.0.0.1:9\n" in (tmp_path / "dead-1.yaml").read_text()
    assert set(plan.metrics) == {"silent-1", "dead-1"}
    for name in ("empty-1", "silent-1", "dead-1"):
        env = plan.specs[name].env
        assert env is not None
        assert not any(key.startswith("WANSPEC_") for key in env)  # nothing is paced
    route, direct = drafter_spec(Path("D"), 32, None), direct_spec(Path("D"), Path("P"), 5, 1)
    assert direct.argv[direct.argv.index("--") + 1 :] == machine.server_flags()
    assert set(machine.server_flags()) <= set(route.argv)
    assert overhead.parse_parts("drafter, target,drafter") == (DRAFTER, TARGET)
    with pytest.raises(ConfigError, match="--parts"):
        overhead.parse_parts("client")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of models without weights, and programs that are started in place of vLLM."""
    for folder in ("target", "draft"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"module": "a", "prompt": "def f(x):"}\n{"prompt": "import os"}\n')

    def targets(models: DemoModels, folder: Path, instances: int) -> Any:
        plan = plan_targets(models, folder, instances)
        specs = {}
        for name, spec in plan.specs.items():
            argv = [sys.executable, str(HERE / "fake_vllm.py"), "--port", str(spec.port), "--stats"]
            argv.append(str(folder / f"{name}.stats"))
            if name in plan.metrics:
                argv += ["--metrics-port", plan.metrics[name].rpartition(":")[2].partition("/")[0]]
            if name == "dead-2" and (tmp_path / "differ").exists():
                argv += ["--differ-at", "5"]
            specs[name] = replace(spec, argv=argv)
        return replace(plan, specs=specs)

    def route(draft: Path, places: int, pace: None) -> ServerSpec:
        real = drafter_spec(draft, places, pace)
        return replace(real, argv=[sys.executable, str(HERE / "fake_drafter.py"), str(real.port), str(places)])

    def direct(draft: Path, prompts: Path, port: int, core: int | None) -> ServerSpec:
        real = direct_spec(draft, prompts, port, core)
        return replace(real, argv=[sys.executable, "-c", FAKE_DIRECT, str(port)])

    monkeypatch.setattr(overhead, "plan_targets", targets)
    monkeypatch.setattr(overhead, "drafter_spec", route)
    monkeypatch.setattr(overhead, "direct_spec", direct)
    monkeypatch.setattr(overhead.DraftTokenizer, "load", lambda model: TOKENIZER)
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    return tmp_path


def invoke(folder: Path, *arguments: str) -> Any:
    app = Typer()
    app.command()(overhead.main)
    common = [
        "--models",
        str(folder),
        "--prompts",
        "2",
        "--max-tokens",
        "8",
        "--rounds",
        "2",
        "--seconds",
        "0.3",
        "--instances",
        "2",
    ]
    return CliRunner().invoke(app, [*common, "--widths", "1,4", *arguments])


def test_a_whole_run(stand_ins: Path) -> None:
    done = invoke(stand_ins, "--json", str(stand_ins / "o.json"), "--markdown", str(stand_ins / "o.md"), "--check")
    assert done.exit_code == 1, done.output  # two rounds are too few to judge
    data = json.loads((stand_ins / "o.json").read_text())
    names = [(row["part"], row["case"]) for row in data["rows"]]
    cases = ["silent drafter", "dead drafter", "1 branch", "4 branches"]
    assert names == list(zip((TARGET, TARGET, DRAFTER, DRAFTER), cases, strict=True))
    for row in data["rows"]:
        assert len(row["rounds"]["ours"]) == len(row["rounds"]["base"]) == 2
        assert row["ours"] > 0.0
        assert row["base"] > 0.0
        assert row["held"] is None
    # Two prompts in two rounds through two processes, four steps each.
    assert data["rows"][0]["details"]["steps"] == 32
    assert data["instances"] == 2
    assert data["rows"][3]["details"]["running_base"] == pytest.approx(4.0, abs=0.4)
    assert data["differences"] == []
    assert "| 4 branches |" in (stand_ins / "o.md").read_text()


def test_outputs_that_differ_are_told(stand_ins: Path) -> None:
    (stand_ins / "differ").touch()
    done = invoke(stand_ins, "--parts", "target", "--rounds", "5", "--json", str(stand_ins / "o.json"))
    assert done.exit_code == 0, done.output
    data = json.loads((stand_ins / "o.json").read_text())
    assert len(data["differences"]) == 10
    assert "dead drafter, a, token 6" in data["differences"]
    assert [row["held"] for row in data["rows"]] == [None, None]


def test_a_drafter_that_is_not_silent_is_an_error(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter(range(99))

    async def samples(http: aiohttp.ClientSession, url: str) -> list[tuple[str, dict[str, str], float]]:
        return [("wanspec_offered_tokens_total", {}, float(next(reads)))]

    monkeypatch.setattr(overhead_measure, "read_samples", samples)
    done = invoke(stand_ins, "--parts", "target")
    assert done.exit_code == 1
    assert "the silent drafter has drafted 8 tokens" in done.output


def test_a_run_that_cannot_be(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, problem in (
        (["--json", str(stand_ins)], "--json: cannot write"),
        (["--models", str(stand_ins / "draft")], "demo models"),
        (["--parts", "all"], "--parts"),
        (["--prompts", "3"], "--prompts: 3 is more than the 2 prompts"),
    ):
        done = invoke(stand_ins, *arguments)
        assert done.exit_code == 2
        assert problem in done.output
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed")
    with pytest.raises(UnsupportedError):
        overhead.run_overhead(OverheadOptions(prompts=2, models=stand_ins), Console(file=io.StringIO()))
