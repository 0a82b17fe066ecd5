"""The GPU check: what is started, how rows are judged and told, and a whole run with stand-ins."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness import launch, machine
from vllm_wanspec.lab.harness.client import Completion
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.markdown import markdown
from vllm_wanspec.lab.stats import Timed
from vllm_wanspec.lab.target import gpu, gpu_plan
from vllm_wanspec.lab.target.clients import Text
from vllm_wanspec.lab.target.gpu_measure import V2_LINE, _batches, timed
from vllm_wanspec.lab.target.gpu_plan import (
    BACKENDS,
    COLOCATED_GIVEN,
    DEAD,
    DEVICES_ENV,
    REMOTE_GIVEN,
    RUNNER_ENV,
    SHIPPED,
    Backend,
    GpuOptions,
    GpuPlan,
    knows_given_acceptance,
    plan_gpu,
    usable_gpus,
)
from vllm_wanspec.lab.target.gpu_report import GpuResult, GpuRow, gpu_document
from vllm_wanspec.lab.target.kinds import COLOCATED, PLAIN, REMOTE

FAKE = Path(__file__).parents[1] / "fake_vllm.py"
HERE = Provenance("a machine", {"python": "3.11"}, "abc", "python -m gpu", 99.0)
MODELS = DemoModels(Path("T"), Path("D"), Path("P"), Path("B"))
KINDS = (SHIPPED, PLAIN, COLOCATED, DEAD, REMOTE)
GIVEN_KINDS = (PLAIN, COLOCATED_GIVEN, REMOTE_GIVEN)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: ("NVIDIA A", "NVIDIA A"))
    monkeypatch.delenv(DEVICES_ENV, raising=False)


def flag(argv: Sequence[str], name: str) -> str:
    """The last value of a flag, which is the one that counts."""
    return argv[len(argv) - 1 - argv[::-1].index(name) + 1]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_started(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNNER_ENV, "1")  # of this shell: it must not reach what runs as shipped
    backend = BACKENDS[name]
    options = GpuOptions(gamma=3, dtype="bfloat16", acceptance=0.5)
    plan, with_given = (plan_gpu(options, backend, 1, MODELS, tmp_path, given) for given in (False, True))
    assert [spec.name for spec in plan.specs] == ["drafter", *KINDS]
    assert (plan.backend, plan.tensor_parallel, plan.given, plan.kinds) == (backend, 1, False, [*KINDS])
    assert (with_given.given, with_given.kinds) == (True, [*GIVEN_KINDS])
    specs = {spec.name: spec for spec in (*with_given.specs, *plan.specs)}
    for kind in {*KINDS, *GIVEN_KINDS}:
        argv, env = list(specs[kind].argv), specs[kind].env
        assert env is not None and not any(key.startswith("WANSPEC_") for key in env)  # nothing is paced
        assert (flag(argv, "--dtype"), flag(argv, "--tensor-parallel-size")) == ("bfloat16", "1")
        assert specs[kind].core is None and "--enforce-eager" not in argv
        if kind in (SHIPPED, COLOCATED, COLOCATED_GIVEN):
            assert RUNNER_ENV not in env
            assert not {"--no-async-scheduling", "--async-scheduling"} & {*argv}
        else:
            assert env[RUNNER_ENV] == ("0" if name == "v1" else "1")
            assert ("--async-scheduling" in argv) is (name == "v2-async")
            assert ("--no-async-scheduling" in argv) is (name != "v2-async")
    assert not any("--speculative-config" in specs[kind].argv for kind in (SHIPPED, PLAIN))
    assert json.loads(flag(specs[COLOCATED].argv, "--speculative-config")) == {
        "method": "draft_model",
        "model": "D",
        "num_speculative_tokens": 3,
    }
    given = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5, 0.25, 0.125]}
    for kind, method in ((COLOCATED_GIVEN, "draft_model"), (REMOTE_GIVEN, "custom_class")):
        assert (
            json.loads(flag(specs[kind].argv, "--speculative-config")).items() >= (given | {"method": method}).items()
        )
    config = json.loads(flag(specs[REMOTE_GIVEN].argv, "--additional-config"))["wanspec"]
    assert f"127.0.0.1:{with_given.specs[0].port}" in Path(config).read_text()
    assert flag(specs[REMOTE].argv, "--speculative-tokens") == "3"
    assert ({*plan.metrics}, {*with_given.metrics}) == ({DEAD, REMOTE}, {REMOTE_GIVEN})
    assert "127.0.0.1:9\n" in (tmp_path / "dead.yaml").read_text()
    for kind in (DEAD, REMOTE, REMOTE_GIVEN):
        assert "fallback: []" in (tmp_path / f"{kind}.yaml").read_text()


@pytest.mark.parametrize(
    ("visible", "size", "count", "device"),
    [(None, 1, 2, "1"), (None, 2, 2, None), ("3, 5", 1, 2, "5"), ("3", 1, 1, None), ("", 1, 0, None)],
)
def test_the_drafter_has_a_gpu_of_its_own_where_there_is_one(
    two_gpus: None,
    visible: str | None,
    size: int,
    count: int,
    device: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if visible is not None:
        monkeypatch.setenv(DEVICES_ENV, visible)
    assert usable_gpus() == count
    drafter = plan_gpu(GpuOptions(), BACKENDS["v1"], size, MODELS, tmp_path, False).specs[0]
    assert (drafter.env or {}).get(DEVICES_ENV) == (device or visible)


@pytest.mark.parametrize("text", ["", "synthetic_acceptance_rates: list[float]"])
def test_given_acceptance_is_known_by_vllm_s_source(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "speculative.py").write_text(text)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(gpu_plan, "find_spec", lambda name: spec)
    assert knows_given_acceptance() is bool(text)
    monkeypatch.setattr(gpu_plan, "find_spec", lambda name: None)
    assert not knows_given_acceptance()


def test_settings_that_mean_nothing() -> None:
    for wrong in ({"acceptance": 1.5}, {"at_a_time": (0,)}, {"tensor_parallel": (0, 1)}):
        with pytest.raises(ConfigError):
            GpuOptions(**wrong)  # type: ignore[arg-type]


def test_requests_at_a_time() -> None:
    texts = [Text(name, (1,), (2,)) for name in "abcde"]
    assert ["".join(text.name for text in batch) for batch in _batches(texts, 1)] == [*"abcde"]
    assert ["".join(text.name for text in batch) for batch in _batches(texts, 2)] == ["ab", "cd", "ea"]
    assert ["".join(text.name for text in batch) for batch in _batches(texts, 8)] == ["abcde"]


def test_a_request_is_timed_from_its_first_tokens() -> None:
    done = Completion((1,), (2, 3, 4, 5, 6), "", 10.0, 40.0, None, ((10.0, 2), (20.0, 1), (40.0, 2)))
    assert timed(done) == Timed(30.0, 3)


def row(kind: str, per_token_ms: Sequence[float] = (2.0,) * 5, backend: str = "v1", **values: Any) -> GpuRow:
    rounds = tuple(Timed(100.0 * ms, 100) for ms in per_token_ms)
    known = {"steps": 250.0, "drafted": 900.0, "accepted": 400.0, "v2": backend != "v1"} | values
    return GpuRow(backend, 1, False, kind, 1, rounds, **known)


def test_figures_of_a_row() -> None:
    found = row(REMOTE, (1.0, 1.2, 1.1, 1.0, 1.2))
    assert found.per_token_ms == pytest.approx(1.1)
    assert found.step_ms == pytest.approx(2.2)
    assert found.tokens_per_step == pytest.approx(2.0)
    base = row(PLAIN, (2.0, 2.0, 2.0, 2.0, 2.0))
    ratio = found.ratio_to(base)
    assert ratio is not None and ratio == pytest.approx((0.55, 0.5, 0.6))
    assert row(REMOTE, steps=None).step_ms is None
    assert replace(found, rounds=(Timed(1.0, 0),) * 5).ratio_to(base) is None


@pytest.mark.parametrize(
    ("dead", "changes", "held"),
    [
        ((2.03,) * 5, {}, True),
        ((2.05,) * 5, {}, False),
        ((2.03, 2.03, 2.03, 2.2, 2.2), {}, False),  # its median would do
        ((2.03,) * 5, {"wrong": ("a, token 3",)}, False),
        ((2.03,) * 5, {"v2": True}, False),  # it ran on the other runner
    ],
)
def test_promise_3(dead: Sequence[float], changes: dict[str, Any], held: bool) -> None:
    ours = row(DEAD, dead, **changes)
    result = GpuResult(GpuOptions(), [row(PLAIN), ours])
    assert result.holds(ours) is held
    assert result.held is held


def test_what_a_run_cannot_tell() -> None:
    few = row(DEAD, (2.0,) * 4)
    assert GpuResult(GpuOptions(), [row(PLAIN, (2.0,) * 4), few]).holds(few) is None
    alone = row(DEAD)
    assert GpuResult(GpuOptions(), [row(PLAIN, backend="v2-sync"), alone]).holds(alone) is None
    assert not GpuResult(GpuOptions(), [row(PLAIN)]).held
    bad = row(REMOTE, drafted=0.0)
    result = GpuResult(GpuOptions(), [row(PLAIN), row(DEAD), bad])
    assert result.faults(bad) == ["no draft was verified"]
    assert not result.held
    differs = row(REMOTE, wrong=("a, token 3",))
    assert GpuResult(GpuOptions(), [differs]).faults(differs)
    assert not GpuResult(GpuOptions(dtype="bfloat16"), [differs]).faults(differs)  # as close logits do there


def test_the_report() -> None:
    rows = [row(SHIPPED, (1.0,) * 5), row(PLAIN), row(DEAD, (2.02,) * 5), row(REMOTE, (1.0,) * 5, drafted=0.0)]
    rows += [row(PLAIN, backend="v2-async"), row(DEAD, (2.1,) * 5, backend="v2-async", v2=False)]
    result = GpuResult(GpuOptions(), rows, ["Not measured with tensor parallel 2: 1 GPU to use."])
    page = markdown(gpu_document(result, HERE))
    dead = (
        "| v1, 1 at a time | remote drafting, drafter dead | V1 | 2.020 | 4.040 | 2.00 | 1.010 (1.010–1.010) | 2.020 ("
    )
    assert dead in page
    assert "≤ 1.02 ✓ |" in page and "≤ 1.02 ✗ |" in page
    assert "v1, TP 1, 1 at a time, remote drafting: no draft was verified." in page
    assert "drafter dead: it runs Model Runner V1, and v2-async was asked for." in page
    assert "Not measured with tensor parallel 2" in page and "0.70, 0.49, 0.34, 0.24" in page
    data = result.as_json()
    assert [one["held"] for one in data["rows"]] == [None, None, True, None, None, False]
    assert data["rows"][2]["to_shipped"] == [2.02, 2.02, 2.02] and data["rows"][1]["to_plain"] is None
    assert data["acceptance_rates"] == [0.7, 0.49, 0.343, 0.2401]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, two_gpus: None) -> Path:
    """A folder of models without weights, and programs in place of vLLM and a drafter."""
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"num_attention_heads": 2}')
    for name in ("prompts.jsonl", "bench_prompts.jsonl"):
        (tmp_path / name).write_text('{"module": "a", "prompt": "def f(x):"}\n{"prompt": "import os"}\n')

    def plan(
        options: GpuOptions, backend: Backend, size: int, models: DemoModels, folder: Path, given: bool
    ) -> GpuPlan:
        real = plan_gpu(options, backend, size, models, folder, given)
        specs = []
        for spec in real.specs:
            argv = [sys.executable, str(FAKE), "--port", str(spec.port), "--stats", str(folder / f"{spec.name}.stats")]
            if spec.name in real.metrics:
                argv += ["--metrics-port", real.metrics[spec.name].rpartition(":")[2].partition("/")[0]]
            argv += ["--speculates"] if spec.name not in (SHIPPED, PLAIN, DEAD) else []
            argv += ["--say", V2_LINE] if (spec.env or {}).get(RUNNER_ENV) == "1" else []
            argv += ["--differ-at", "5"] if (tmp_path / f"differ-{spec.name}").exists() else []
            argv += ["--fail-after", "9"] if (tmp_path / f"fail-{spec.name}").exists() else []
            argv += ["--gap", "0.5"] if spec.name == PLAIN and not (tmp_path / "ties").exists() else []
            specs.append(replace(spec, argv=argv))
        return replace(real, specs=specs)

    monkeypatch.setattr(gpu, "plan_gpu", plan)
    monkeypatch.setattr(gpu, "knows_given_acceptance", lambda: not (tmp_path / "old").exists())
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    return tmp_path


def invoke(folder: Path, *arguments: str) -> Any:
    app = Typer()
    app.command()(gpu.main)
    common = ["--models", str(folder), "--prompts", "2", "--max-tokens", "8", "--rounds", "2", "--at-a-time", "1,2"]
    return CliRunner().invoke(app, [*common, *arguments])


def test_a_whole_run(stand_ins: Path) -> None:
    page = stand_ins / "g.md"
    arguments = ["--backends", "v1,v2-async", "--tensor-parallel", "1,4", "--json", str(stand_ins / "g.json")]
    done = invoke(stand_ins, *arguments, "--markdown", str(page))
    assert done.exit_code == 0, done.output
    data = json.loads((stand_ins / "g.json").read_text())
    cases = [(one["backend"], one["given"], one["at_a_time"], one["arm"]) for one in data["rows"]]
    assert cases == [
        (name, given, count, kind)
        for name in ("v1", "v2-async")
        for given, kinds in ((False, KINDS), (True, GIVEN_KINDS))
        for count in (1, 2)
        for kind in kinds
    ]
    for one in data["rows"]:
        assert len(one["rounds"]) == 2 and one["per_token_ms"] > 0.0
        assert one["faults"] == one["wrong"] == one["ties"] == []
        assert (one["to_plain"] is None) is (one["arm"] == PLAIN)
        forced = one["arm"] in (PLAIN, DEAD, REMOTE, REMOTE_GIVEN)
        assert one["model_runner"] == ("v2" if forced and one["backend"] == "v2-async" else "v1")
        # Two rounds of two requests, four steps each, the first of which bring the prompts' first tokens.
        assert (one["step_ms"] is None) is (one["at_a_time"] == 2)
        if one["at_a_time"] == 1:
            assert one["tokens_per_step"] == 2.0
        assert one["drafted"] == (0 if one["arm"] in (SHIPPED, PLAIN, DEAD) else 64)
    assert data["left_out"] == ["Not measured with tensor parallel 4: 2 GPUs to use."]
    assert data["command"].startswith("python -m vllm_wanspec.lab.target.gpu")
    assert "| v2-async, 2 at a time | remote drafting, acceptance given | V2 |" in page.read_text()
    assert data["failures"] == []
    assert data["held"] is False  # two rounds are too few to judge


def test_a_comparison_that_fails_leaves_the_others(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "DYING_S", 1.0)
    (stand_ins / f"fail-{REMOTE_GIVEN}").touch()
    arguments = ["--backends", "v1", "--tensor-parallel", "1", "--at-a-time", "1"]
    done = invoke(stand_ins, *arguments, "--json", str(stand_ins / "g.json"), "--check")
    assert done.exit_code == 1, done.output
    data = json.loads((stand_ins / "g.json").read_text())
    assert [one["arm"] for one in data["rows"]] == [*KINDS]
    (failure,) = data["failures"]
    assert failure.startswith("v1, tensor parallel 1, acceptance given: remote_given ended by itself")
    assert "FAILED: v1, tensor parallel 1, acceptance given: " in done.output
    assert not GpuResult(GpuOptions(), [row(PLAIN), row(DEAD)], failures=["v2-sync: x"]).held
    for kind in (PLAIN, SHIPPED):
        (stand_ins / f"fail-{kind}").touch()
    done = invoke(stand_ins, *arguments, "--json", str(stand_ins / "none.json"))
    assert (done.exit_code, (stand_ins / "none.json").exists()) == (1, False)
    assert "bench-gpu: v1, tensor parallel 1: " in done.output


@pytest.mark.parametrize("ties", [False, True])
def test_texts_that_differ_and_an_old_vllm_are_told(stand_ins: Path, ties: bool) -> None:
    for name in (f"differ-{REMOTE}", "old", *(["ties"] if ties else [])):
        (stand_ins / name).touch()
    arguments = ["--backends", "v1", "--tensor-parallel", "1", "--at-a-time", "1"]
    done = invoke(stand_ins, *arguments, "--json", str(stand_ins / "g.json"), "--check")
    assert done.exit_code == 1, done.output
    data = json.loads((stand_ins / "g.json").read_text())
    assert [one["arm"] for one in data["rows"]] == [SHIPPED, PLAIN, COLOCATED, DEAD, REMOTE]
    lines = ["a, token 6", "line 2, token 6"]
    assert (data["rows"][-1]["ties"], data["rows"][-1]["wrong"]) == ((lines, []) if ties else ([], lines))
    told = "2 texts differ from plain vLLM's, the first at a, token 6" in " ".join(done.output.split())
    assert told is not ties
    assert data["left_out"] == ["Not measured: this vLLM knows no given acceptance."]


def test_a_run_that_cannot_be(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, problem in (
        (["--backends", "v3"], "bench-gpu: --backends: 'v3' is not a list of v1 and v2-sync and v2-async"),
        (["--acceptance", "2"], "--acceptance: 2.0 is not a probability"),
        (["--prompts", "3"], "--prompts: 3 is more than the 2 prompts"),
    ):
        done = invoke(stand_ins, *arguments)
        assert done.exit_code == 2
        assert problem in done.output
    monkeypatch.setattr(machine, "gpus", lambda: ())
    done = invoke(stand_ins)
    assert (done.exit_code, done.output) == (2, "bench-gpu: no GPU here (nvidia-smi lists none)\n")
