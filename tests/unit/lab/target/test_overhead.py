"""The overhead bench: its ratios, its direct client, its servers, and a whole run with stand-ins."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from result_files import committed, key_paths
from rich.console import Console
from toys import FINGERPRINT, VOCAB_SIZE, drafter_argv
from typer import Typer
from typer.testing import CliRunner

from vllm_wanspec.errors import UnsupportedError
from vllm_wanspec.lab.drafter.direct import direct_spec
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.launch import drafter_spec
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.harness.servers import ServerSpec
from vllm_wanspec.lab.report.console import print_document
from vllm_wanspec.lab.report.markdown import markdown
from vllm_wanspec.lab.target import overhead, overhead_measure
from vllm_wanspec.lab.target.overhead_measure import SILENT_DRAFTER, plan_targets
from vllm_wanspec.lab.target.overhead_report import (
    DRAFTER,
    TARGET,
    Comparison,
    OverheadOptions,
    OverheadResult,
    overhead_document,
)
from vllm_wanspec.sim.controller import DraftTokenizer

FAKES = Path(__file__).parents[1]
TOKENIZER = DraftTokenizer(FINGERPRINT, lambda text: [ord(letter) % VOCAB_SIZE for letter in text])
HERE = Provenance("a machine", {"python": "3.11"}, "abc", "python -m overhead", 99.0)
FAKE_DIRECT = """
import asyncio, sys
from aiohttp import web
from vllm_wanspec.lab.drafter.direct import DirectLoad, make_app

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
    return OverheadResult(OverheadOptions(prompts=prompts, rounds=rounds), rows, differences)


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
    assert result(row).held is (held is True)


def test_what_a_run_cannot_tell() -> None:
    row = compared(TARGET, (1.0,) * 5)
    assert result(row).holds(row) is True
    assert result(row, prompts=11).holds(row) is None
    assert result(row, differences=["silent drafter, x, token 3"]).holds(row) is None
    assert not result().held


def test_the_report() -> None:
    found = result(
        compared(TARGET, (1.02,) * 5, opened_sessions=60.0),
        compared(DRAFTER, (0.8, 0.8, 0.85, 0.8, 0.8), others_cpu=0.3),
        differences=["dead drafter, x, token 3"],
        prompts=3,
    )
    page = markdown(overhead_document(found, HERE))
    assert "| target case | 6.12 | 6.00 | 1.020 | 1.020–1.020 | 1.020–1.020 | ≤ 1.05 – |" in page
    assert "| drafter case | 5.10 | 6.00 | 0.800 | 0.800–0.850 | 0.800–0.850 | ≥ 0.9 ✗ |" in page
    assert page.count("Prompt lookup: none in any arm.") == page.count("Not paced.") == 2
    assert "Different output: dead drafter, x, token 3" in page
    assert "DISTURBED: other programs took up to 30% of the drafter's core" in page
    assert "Not judged" in page
    output = io.StringIO()
    print_document(overhead_document(found, HERE), Console(file=output, width=160))
    assert "0.800–0.850" in output.getvalue()
    assert output.getvalue().count("Not paced.") == 2
    assert "Not judged" in output.getvalue().splitlines()[-1]
    data = found.as_json()
    assert [row["held"] for row in data["rows"]] == [None, False]
    assert data["rows"][1]["ratio_range"] == [0.8, 0.85]
    assert data["rows"][0]["details"] == {"opened_sessions": 60.0}
    calm = markdown(overhead_document(result(compared(DRAFTER, (1.0,) * 5)), HERE))
    assert "DISTURBED" not in calm
    assert "Not judged" not in calm
    assert "empty lists" not in calm  # the target's part was not asked for


def test_what_is_started(tmp_path: Path) -> None:
    specs, metrics = plan_targets(DemoModels(Path("T"), Path("D"), Path("P"), Path("B")), tmp_path)
    assert list(specs) == [SILENT_DRAFTER, "empty-1", "silent-1", "dead-1"]
    silent_port = specs[SILENT_DRAFTER].port
    assert list(specs[SILENT_DRAFTER].argv[-4:]) == ["--model", "T", "--pace", "60000"]
    assert "proposers.EmptyProposer" in specs["empty-1"].argv[specs["empty-1"].argv.index("--speculative-config") + 1]
    assert f"ws://127.0.0.1:{silent_port}" in (tmp_path / "silent-1.yaml").read_text().replace("http:", "ws:")
    assert "127.0.0.1:9\n" in (tmp_path / "dead-1.yaml").read_text()
    assert set(metrics) == {"silent-1", "dead-1"}
    for name in ("empty-1", "silent-1", "dead-1"):
        env = specs[name].env
        assert env is not None
        assert not any(key.startswith("WANSPEC_") for key in env)  # nothing is paced
    route, direct = drafter_spec(Path("D"), 32, None), direct_spec(Path("D"), Path("P"), 5, 1)
    assert direct.argv[direct.argv.index("--") + 1 :] == machine.server_flags()
    assert set(machine.server_flags()) <= set(route.argv)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of models without weights, and programs that are started in place of vLLM."""
    for folder in ("target", "draft"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    for name in ("prompts.jsonl", "bench_prompts.jsonl"):
        (tmp_path / name).write_text('{"module": "a", "prompt": "def f(x):"}\n{"prompt": "import os"}\n')

    def targets(models: DemoModels, folder: Path, instances: int) -> Any:
        real, metrics = plan_targets(models, folder, instances)
        specs = {}
        for name, spec in real.items():
            argv = [sys.executable, str(FAKES / "fake_vllm.py"), "--port", str(spec.port), "--stats"]
            argv.append(str(folder / f"{name}.stats"))
            if name in metrics:
                argv += ["--metrics-port", metrics[name].rpartition(":")[2].partition("/")[0]]
            if name == "dead-2" and (tmp_path / "differ").exists():
                argv += ["--differ-at", "5"]
            specs[name] = replace(spec, argv=argv)
        return specs, metrics

    def route(draft: Path, places: int, pace: None) -> ServerSpec:
        real = drafter_spec(draft, places, pace)
        return replace(real, argv=drafter_argv(real.port, places))

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
    unserved = {f"/rows/details/{name}" for name in overhead_measure.WATCHED}  # by the stand-ins
    assert key_paths(committed("overhead")) - unserved == key_paths(data) - unserved
    assert data["command"].startswith("python -m vllm_wanspec.lab.target.overhead")
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
        (["--parts", "all"], "bench-overhead: --parts: 'all' is not a list of target and drafter"),
        (["--prompts", "3"], "--prompts: 3 is more than the 2 prompts"),
    ):
        done = invoke(stand_ins, *arguments)
        assert done.exit_code == 2
        assert problem in done.output
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed")
    with pytest.raises(UnsupportedError):
        overhead.run_overhead(OverheadOptions(prompts=2, models=stand_ins), Console(file=io.StringIO()))
