"""The dtype bench: where texts part, what is made of it, and a whole run with stand-ins."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer import Typer
from typer.testing import CliRunner

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.harness.servers import ServerSpec
from vllm_wanspec.lab.report.markdown import markdown
from vllm_wanspec.lab.target import dtype
from vllm_wanspec.lab.target.clients import Text
from vllm_wanspec.lab.target.dtype_measure import divergence, plan_targets
from vllm_wanspec.lab.target.dtype_report import (
    BFLOAT16,
    FLOAT32,
    OTHER_DTYPE,
    Divergence,
    DtypeOptions,
    DtypeResult,
    DtypeRow,
    dtype_document,
)
from vllm_wanspec.lab.target.kinds import COLOCATED, PLAIN, REMOTE

FAKE = Path(__file__).parents[1] / "fake_vllm.py"
HERE = Provenance("a machine", {"python": "3.11"}, "abc", "python -m dtype", 99.0)


class Plain:
    """Knows three tokens, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    async def next_logprobs(self, context: Sequence[int]) -> dict[int, float]:
        self.asked.append(list(context))
        return {7: -0.5, 8: -0.5005, 9: -0.75}


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ((5, 7, 6), None),
        ((5, 8, 6), Divergence("t", 1, pytest.approx(0.0005))),  # type: ignore[arg-type]
        ((5, 9), Divergence("t", 1, pytest.approx(0.25))),  # type: ignore[arg-type]
        ((5, 4), Divergence("t", 1, None)),  # not among the most probable ones
        ((5, 7), Divergence("t", 2, None)),  # ends earlier
    ],
)
def test_where_texts_part(answer: tuple[int, ...], found: Divergence | None) -> None:
    plain: Any = Plain()
    got = asyncio.run(divergence(plain, Text("t", (1, 2), (5, 7, 6)), answer))
    assert got == found
    assert plain.asked == ([[1, 2, 5]] if got is not None and got.position == 1 else [])
    assert (got is not None and got.is_tie) is (answer == (5, 8, 6))


def row(kind: str, gaps: Sequence[float | None], dtype: str = BFLOAT16, requests: int = 64) -> DtypeRow:
    parted = tuple(Divergence(f"p{place}", place, gap) for place, gap in enumerate(gaps))
    return DtypeRow(dtype, kind, 8, requests, parted)


def result(*rows: DtypeRow) -> DtypeResult:
    return DtypeResult(DtypeOptions(), rows)


def test_ties_are_counted_apart() -> None:
    found = row(REMOTE, [0.0, 0.001, 0.0625, None], requests=10)
    assert found.ties == 2
    assert found.share is not None and found.share_without_ties is not None
    assert (found.share.value, found.share_without_ties.value) == (0.4, 0.2)
    # 2 of 10: (0.2 + z²/20 ± z·√(0.016 + z²/400)) / (1 + z²/10)
    assert found.share_without_ties[1:] == (pytest.approx(0.05668, abs=1e-5), pytest.approx(0.50984, abs=1e-5))
    assert row(REMOTE, [], requests=0).share is None


def test_what_holds() -> None:
    theirs = row(COLOCATED, [0.1] * 8)
    assert result(theirs, row(REMOTE, [0.1] * 10)).held  # two more: one chance in four
    assert not result(theirs, row(REMOTE, [0.1] * 30)).held  # 22 more, and none fewer
    assert result(row(COLOCATED, [0.1] * 30), row(REMOTE, [])).held
    assert not result(theirs).held
    assert not result(row(REMOTE, [])).held  # nothing beside it
    exact = row(COLOCATED, [0.1], FLOAT32)
    assert result(exact, row(REMOTE, [0.0], FLOAT32)).held
    assert not result(exact, row(REMOTE, [0.1], FLOAT32)).held


def test_the_report() -> None:
    rows = (
        row(PLAIN, [0.0625] * 3),
        row(COLOCATED, [0.0, 0.0, 0.0625, 0.125]),
        row(REMOTE, [0.0, 0.0625, None]),
        row(REMOTE, [0.5], FLOAT32),
        row(COLOCATED, [], FLOAT32),
    )
    page = markdown(dtype_document(result(*rows), HERE))
    assert "| bfloat16 | plain vLLM again | 8 | 64 | 3 | 4.7% (1.6%–12.9%) | 0 | 4.7% (1.6%–12.9%) | 0.0625 |" in page
    assert "| bfloat16 | vLLM's co-located speculation | 8 | 64 | 4 | 6.2% (2.5%–15.0%) | 2 | 3.1% (0.9%–10.7%)" in page
    assert "| 0.0312 | 0.1250 |" in page
    assert "| bfloat16 | remote drafting | 8 | 64 | 3 | 4.7% (1.6%–12.9%) | 1 | 3.1% (0.9%–10.7%) | 0.0312 |" in page
    assert "bfloat16, 8 at a time: remote drafting 4.7% (1.6%–12.9%), vLLM's co-located speculation 6.2%" in page
    assert page.count("the intervals overlap") == 2
    document = dtype_document(result(*rows), HERE)
    assert list(document.tables[0].wrong) == [3]  # float32 elsewhere than at a tie
    more = dtype_document(result(row(COLOCATED, []), row(REMOTE, [0.1] * 30)), HERE)
    assert "ours diverges more often than vLLM's own speculation" in more.remarks[0]
    data = result(*rows).as_json()
    assert data["held"] is False
    assert data["rows"][2] == {
        "dtype": BFLOAT16,
        "arm": REMOTE,
        "at_a_time": 8,
        "requests": 64,
        "diverged": 3,
        "ties": 1,
        "share": [0.0469, 0.0161, 0.129],
        "share_without_ties": [0.0312, 0.0086, 0.107],
        "median_gap_nats": 0.0312,
        "max_gap_nats": 0.0625,
        "divergences": [["p0", 0, 0], ["p1", 1, 0.0625], ["p2", 2, None]],
    }
    assert data["rows"][4]["median_gap_nats"] is None


def test_what_is_started(tmp_path: Path) -> None:
    models = DemoModels(Path("T"), Path("D"), Path("P"), Path("bench_P"))
    specs, metrics = plan_targets(DtypeOptions(gamma=3), models, tmp_path)
    kinds = (PLAIN, COLOCATED, REMOTE)
    names = [f"{kind}-{one}" for one in (FLOAT32, BFLOAT16) for kind in kinds]
    assert [spec.name for spec in specs] == ["drafter", *names]
    assert list(metrics) == ["remote-float32", "remote-bfloat16"]
    for spec in specs[1:]:
        assert spec.argv[-2:] == ["--dtype", spec.name.partition("-")[2]]
        assert spec.env is not None and not any(name.startswith("WANSPEC_") for name in spec.env)  # nothing is paced
    remote = specs[-1].argv
    assert remote[remote.index("--speculative-tokens") + 1] == "3"
    config = yaml.safe_load((tmp_path / "remote-bfloat16.yaml").read_text())
    assert config["draft_endpoints"][0]["url"] == f"http://127.0.0.1:{specs[0].port}"  # no WAN between them
    assert "fallback" not in config  # as it is by default


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of models without weights, and programs in place of vLLM, of which one differs from the others."""
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("prompts.jsonl", "bench_prompts.jsonl"):
        (tmp_path / name).write_text('{"module": "a", "prompt": "def f(x):"}\n{"prompt": "import os"}\n')

    def targets(options: DtypeOptions, models: DemoModels, folder: Path) -> tuple[list[ServerSpec], dict[str, str]]:
        real, metrics = plan_targets(options, models, folder)
        specs = []
        for spec in real:
            argv = [sys.executable, str(FAKE), "--port", str(spec.port), "--stats", str(folder / spec.name)]
            if spec.name in metrics:
                argv += ["--metrics-port", metrics[spec.name].rpartition(":")[2].partition("/")[0]]
            argv += ["--differ-at", "3"] if spec.name.endswith(BFLOAT16) and spec.name.startswith(REMOTE) else []
            argv += ["--gap", "0.25"] if spec.name == f"{PLAIN}-{BFLOAT16}" else []
            specs.append(replace(spec, argv=argv))
        return specs, metrics

    monkeypatch.setattr(dtype, "plan_targets", targets)
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    return tmp_path


def invoke(folder: Path, *arguments: str) -> Any:
    app = Typer()
    app.command()(dtype.main)
    common = ["--models", str(folder), "--prompts", "2", "--max-tokens", "8", "--at-a-time", "1,3"]
    return CliRunner().invoke(app, [*common, *arguments])


def test_a_whole_run(stand_ins: Path) -> None:
    page = stand_ins / "d.md"
    done = invoke(stand_ins, "--json", str(stand_ins / "d.json"), "--markdown", str(page), "--check")
    assert done.exit_code == 0, done.output  # two texts are too few to tell
    rows = json.loads((stand_ins / "d.json").read_text())["rows"]
    kinds = (PLAIN, COLOCATED, REMOTE)
    wanted = [(one, kind, count) for one in (FLOAT32, BFLOAT16) for count in (1, 3) for kind in kinds]
    assert [(row["dtype"], row["arm"], row["at_a_time"]) for row in rows] == [*wanted, (BFLOAT16, OTHER_DTYPE, 1)]
    for row in rows:
        differs = row["dtype"] == BFLOAT16 and row["arm"] == REMOTE
        assert (row["requests"], row["diverged"], row["ties"]) == (2, 2 if differs else 0, 0)
        assert row["divergences"] == ([["a", 3, 0.25], ["line 2", 3, 0.25]] if differs else [])
    assert "| bfloat16 | remote drafting | 3 | 2 | 2 |" in page.read_text()
    assert "bfloat16, remote drafting, 3 at a time: 2 of 2 differ" in done.output


def test_a_run_that_cannot_be(stand_ins: Path) -> None:
    for arguments, problem in (
        (["--dtypes", "int8"], "bench-dtype: --dtypes: 'int8' is not a list of float32 and bfloat16"),
        (["--at-a-time", "0"], "--at-a-time: '0' is not a list of numbers from 1"),
        (["--prompts", "3"], "--prompts: 3 is more than the 2 prompts"),
    ):
        done = invoke(stand_ins, *arguments)
        assert done.exit_code == 2
        assert problem in done.output
