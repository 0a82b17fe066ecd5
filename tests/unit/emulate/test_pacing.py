"""Step pacing: the arithmetic with a fake clock, the wrap on a stand-in for vLLM's model runner."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_wanspec.emulate.pacing import (
    COUNT_ONLY,
    DRAFT_PACING_ENV,
    PACING_ENV,
    STATS_ENV,
    STATS_WIDTH,
    Pacer,
    Pacing,
    install,
    install_draft,
    install_from_env,
)
from vllm_wanspec.errors import ConfigError, UnsupportedError


class FakeTime:
    """A clock that only sleeping and working move."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds

    def work(self, seconds: float, result: Any = None) -> Any:
        self.now_s += seconds
        return result


@dataclass
class Rows:
    """As much of a tensor as pacing looks at."""

    shape: tuple[int, ...]
    is_cuda: bool = False


def runner_class() -> Any:
    class Runner:
        use_async_scheduling = True
        num_spec_tokens = 3

        def _model_forward(self, input_ids: Any = None, positions: Any = None, **more: Any) -> Any:
            return ("output", input_ids, positions, more)

    return Runner


def proposer_class(fake: FakeTime, work_s: float = 0.0) -> Any:
    """One that inherits how it loads its model, as vLLM's do; a forward takes ``work_s``."""

    class Base:
        def load_model(self, target: str) -> None:
            self.model = SimpleNamespace(forward=lambda ids, **more: fake.work(work_s, (target, ids, more)))

    return type("Proposer", (Base,), {})


def pacer_on(fake: FakeTime, pacing: Pacing, draft_pacing: Pacing = COUNT_ONLY, path: Path | None = None) -> Pacer:
    return Pacer(pacing, draft_pacing, path, clock=fake.clock, sleep=fake.sleep)


def counts_in(path: Path) -> dict[str, Any]:
    counts: dict[str, Any] = json.loads(path.read_text())
    return counts


@pytest.mark.parametrize(
    ("text", "base_ms", "per_token_ms"),
    [("35+0.1", 35.0, 0.1), ("5", 5.0, 0.0), (" 5 + 0.02 ", 5.0, 0.02), ("0+0", 0.0, 0.0), ("1e1+1e-2", 10.0, 0.01)],
)
def test_a_pace_is_read(text: str, base_ms: float, per_token_ms: float) -> None:
    pacing = Pacing.parse(text)
    assert (pacing.base_ms, pacing.per_token_ms) == (base_ms, per_token_ms)
    assert Pacing.parse(pacing.setting) == pacing


@pytest.mark.parametrize("text", ["", "fast", "35+", "35+0.1+2", "-1", "35+-0.1", "nan", "inf", "35,0.1", "1e9"])
def test_a_wrong_pace_is_refused_by_name_and_value(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pacing.parse(text, "--target-pace")
    assert "--target-pace" in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_step_sleeps_for_what_is_left_of_its_pace() -> None:
    fake = FakeTime()
    pacer = pacer_on(fake, Pacing(35.0, 0.5))
    assert pacer.run(lambda: fake.work(0.010, "result"), tokens=10) == "result"
    assert fake.slept_s == [pytest.approx(0.030)]
    assert (pacer.stats.steps, pacer.stats.overruns) == (1, 0)
    assert pacer.stats.paced_ms_total == pytest.approx(40.0)
    assert pacer.stats.work_ms_total == pytest.approx(10.0)


def test_work_longer_than_the_pace_is_an_overrun_and_not_stretched() -> None:
    fake = FakeTime()
    pacer = pacer_on(fake, Pacing(5.0))
    pacer.run(lambda: fake.work(0.006), tokens=1)
    pacer.run(lambda: fake.work(0.001), tokens=1)
    assert fake.slept_s == [pytest.approx(0.004)]
    assert (pacer.stats.steps, pacer.stats.overruns) == (2, 1)


def test_a_failing_forward_is_neither_stretched_nor_counted() -> None:
    fake = FakeTime()
    pacer = pacer_on(fake, Pacing(5.0))
    with pytest.raises(ZeroDivisionError):
        pacer.run(lambda: 1 // 0, tokens=1)
    assert not fake.slept_s
    assert pacer.stats.steps == 0


def test_a_pace_of_zero_counts_and_neither_stretches_nor_overruns() -> None:
    fake = FakeTime()
    pacer = pacer_on(fake, Pacing.parse("0"))
    for _ in range(3):
        pacer.run(lambda: fake.work(0.002), tokens=9)
    assert not fake.slept_s
    assert (pacer.stats.steps, pacer.stats.overruns, pacer.stats.paced_ms_total) == (3, 0, 0.0)
    assert pacer.stats.work_ms_total == pytest.approx(6.0)


@pytest.mark.parametrize(("pacing", "waits"), [(COUNT_ONLY, 0), (Pacing(0.0, 0.001), 1)])
def test_only_a_pace_waits_for_the_device(pacing: Pacing, waits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(current_stream=lambda: stream)))
    cls = runner_class()
    pacer = install(Pacer(pacing), cls)
    cls()._model_forward(Rows((1,), is_cuda=True))
    assert (pacer.stats.steps, len(waited)) == (1, waits)


def test_the_file_has_a_forward_before_its_sleep(tmp_path: Path) -> None:
    path, fake = tmp_path / "stats.json", FakeTime()
    seen: list[int] = []

    def sleep(seconds: float) -> None:
        seen.append(counts_in(path)["steps"])
        fake.sleep(seconds)

    pacer = Pacer(Pacing(5.0), COUNT_ONLY, path, fake.clock, sleep)
    assert not path.exists()
    for _ in range(3):
        pacer.run(lambda: fake.work(0.001), tokens=1)
    assert seen == [1, 2, 3]
    assert fake.slept_s == [pytest.approx(0.004)] * 3


def test_writing_comes_out_of_the_sleep(tmp_path: Path) -> None:
    fake = FakeTime()
    pacer = pacer_on(fake, Pacing(5.0), path=tmp_path / "stats.json")
    counted = pacer.counts
    pacer.counts = lambda: fake.work(0.0005, counted())  # type: ignore[method-assign]
    pacer.run(lambda: fake.work(0.001), tokens=1)
    assert fake.slept_s == [pytest.approx(0.0035)]
    assert pacer.stats.work_ms_total == pytest.approx(1.0)


def test_counts_are_rewritten_in_place_at_a_fixed_width(tmp_path: Path) -> None:
    path, fake = tmp_path / "stats.json", FakeTime()
    path.write_text("x" * 2 * STATS_WIDTH)
    pacer = pacer_on(fake, Pacing(5.0), Pacing(1.0), path)
    with path.open() as opened:
        for steps in range(1, 12):
            pacer.run(lambda: fake.work(0.010), tokens=1)
            opened.seek(0)
            text = opened.read()
            assert (json.loads(text)["steps"], len(text)) == (steps, STATS_WIDTH)
    pacer.run_draft(lambda: fake.work(0.0005), tokens=1)
    assert counts_in(path) == {
        "steps": 11,
        "overruns": 11,
        "paced_ms_total": 55.0,
        "work_ms_total": 110.0,
        "draft_steps": 1,
        "draft_overruns": 0,
        "draft_paced_ms_total": 1.0,
        "draft_work_ms_total": 0.5,
        "async_scheduling": None,
        "num_spec_tokens": None,
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats.json"]


def test_the_largest_counts_fit_into_the_width() -> None:
    pacer = Pacer(Pacing(1.0))
    for stats in (pacer.stats, pacer.draft_stats):
        stats.steps = stats.overruns = 10**12
        stats.paced_ms_total = stats.work_ms_total = 1e15 + 0.125
    pacer.async_scheduling, pacer.num_spec_tokens = False, 1000
    assert len(json.dumps(pacer.counts())) < STATS_WIDTH


@pytest.mark.parametrize("name", ["missing/stats.json", "."])
def test_statistics_that_cannot_be_written_do_not_stop_the_model(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeTime()
    pacer = pacer_on(fake, Pacing(1.0), path=tmp_path / name)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert pacer.run(lambda: fake.work(2.0, "result"), tokens=1) == "result"
    assert [str(tmp_path / name) in record.getMessage() for record in caplog.records] == [True]
    assert pacer.stats.steps == 3


def test_the_wrap_passes_arguments_and_counts_tokens() -> None:
    cls = runner_class()
    pacer = install(Pacer(Pacing(0.0, 0.001)), cls)
    ids, positions = Rows((7,)), Rows((3, 7))
    assert cls()._model_forward(input_ids=ids, positions=positions, extra=1) == ("output", ids, positions, {"extra": 1})
    assert pacer.stats.paced_ms_total == pytest.approx(0.007)
    cls()._model_forward(None, positions)  # embeddings instead of ids
    assert pacer.stats.paced_ms_total == pytest.approx(0.014)
    assert cls()._model_forward() == ("output", None, None, {})
    assert pacer.stats.steps == 3


def test_settings_are_those_of_the_runner_that_runs() -> None:
    cls = runner_class()
    pacer = install(Pacer(COUNT_ONLY), cls)
    assert (pacer.async_scheduling, pacer.num_spec_tokens) == (None, None)
    cls()._model_forward()
    assert (pacer.async_scheduling, pacer.num_spec_tokens) == (True, 3)
    runner = cls()
    runner.use_async_scheduling, runner.num_spec_tokens = False, 0
    runner._model_forward()
    assert pacer.counts().items() >= {"async_scheduling": False, "num_spec_tokens": 0}.items()


def test_installing_twice_wraps_once() -> None:
    cls, proposers = runner_class(), proposer_class(FakeTime())
    first = install(Pacer(Pacing(1.0)), cls)
    install_draft(first, proposers)
    wrapped, loading = cls._model_forward, proposers.load_model
    assert install(Pacer(Pacing(2.0)), cls) is first
    install_draft(Pacer(Pacing(2.0)), proposers)
    assert (cls._model_forward, proposers.load_model) == (wrapped, loading)


def test_a_draft_model_beside_the_target_is_stretched_to_its_own_pace() -> None:
    fake = FakeTime()
    proposers = proposer_class(fake, work_s=0.001)
    pacer = pacer_on(fake, Pacing(35.0), Pacing(5.0, 0.02))
    install_draft(pacer, proposers)
    proposer, ids = proposers(), Rows((50,))
    proposer.load_model("target")
    pacer.run(lambda: fake.work(0.005), tokens=1)
    assert proposer.model.forward(ids, extra=1) == ("target", ids, {"extra": 1})
    assert fake.slept_s == [pytest.approx(0.030), pytest.approx(0.005)]  # 5 ms + 50 x 0.02 ms less 1 ms of work
    assert (pacer.stats.steps, pacer.draft_stats.steps) == (1, 1)
    assert pacer.draft_stats.paced_ms_total == pytest.approx(6.0)
    assert pacer.draft_stats.work_ms_total == pytest.approx(1.0)


def test_a_draft_model_without_a_pace_is_counted() -> None:
    fake = FakeTime()
    proposers = proposer_class(fake, work_s=0.001)
    pacer = pacer_on(fake, Pacing(35.0))
    install_draft(pacer, proposers)
    proposer = proposers()
    proposer.load_model("target")
    pacer.run(lambda: fake.work(0.035), tokens=1)
    for _ in range(3):
        proposer.model.forward(Rows((1,)))
    assert not fake.slept_s
    stats = pacer.draft_stats
    assert (stats.steps, stats.overruns, stats.paced_ms_total) == (3, 0, 0.0)
    assert stats.work_ms_total == pytest.approx(3.0)


def test_what_a_draft_model_runs_before_the_first_forward_is_warming_up() -> None:
    fake = FakeTime()
    proposers = proposer_class(fake)
    pacer = pacer_on(fake, Pacing(35.0), Pacing(5.0))
    install_draft(pacer, proposers)
    proposer = proposers()
    proposer.load_model("target")
    assert proposer.model.forward(Rows((512,)), extra=2) == ("target", Rows((512,)), {"extra": 2})
    assert (pacer.draft_stats.steps, fake.slept_s) == (0, [])


def test_every_class_that_inherits_the_loading_is_counted() -> None:
    fake = FakeTime()
    proposers = proposer_class(fake)
    pacer = pacer_on(fake, COUNT_ONLY)
    install_draft(pacer, proposers)
    other = type("Eagle", proposers.__bases__, {})()
    other.load_model("target")
    pacer.run(lambda: None, tokens=1)
    other.model.forward(Rows((1,)))
    assert pacer.draft_stats.steps == 1


@pytest.mark.vllm
def test_every_proposer_of_the_installed_vllm_with_such_a_model_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"draft_model": "DraftModelProposer", "eagle": "EagleProposer", "dflash": "DFlashProposer"}
    proposers = [
        getattr(importlib.import_module(f"vllm.v1.spec_decode.{module}"), name) for module, name in names.items()
    ]
    base = next(known for known in proposers[0].__mro__ if "load_model" in vars(known))
    monkeypatch.setattr(base, "load_model", base.load_model)  # what is set back in the end
    pacer = Pacer(COUNT_ONLY)
    install_draft(pacer)
    assert [proposer.load_model.wanspec_pacer for proposer in proposers] == [pacer] * 3


@pytest.mark.parametrize(("draft_pace", "stretched_ms"), [("", 0.0), ("20+1", 21.0)])
def test_the_environment_asks_for_both_forwards(
    draft_pace: str, stretched_ms: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, draft = ModuleType("vllm.v1.worker.gpu_model_runner"), ModuleType("vllm.v1.spec_decode.draft_model")
    runner.GPUModelRunner, draft.DraftModelProposer = runner_class(), proposer_class(FakeTime())  # type: ignore[attr-defined]
    for module in (runner, draft):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "stats.json"
    install_from_env({PACING_ENV: "1", DRAFT_PACING_ENV: draft_pace, STATS_ENV: f" {path} "})
    proposer = draft.DraftModelProposer()
    proposer.load_model("target")
    runner.GPUModelRunner()._model_forward(Rows((1,)))
    assert counts_in(path)["draft_steps"] == 0
    began_s = time.monotonic()
    proposer.model.forward(Rows((1,)))
    assert time.monotonic() - began_s >= stretched_ms / 1000.0
    counts = counts_in(path)
    assert (counts["steps"], counts["paced_ms_total"]) == (1, 1.0)
    assert (counts["draft_steps"], counts["draft_paced_ms_total"]) == (1, stretched_ms)
    assert (counts["async_scheduling"], counts["num_spec_tokens"]) == (True, 3)


def test_a_runner_without_the_method_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="_model_forward"):
        install(Pacer(Pacing(1.0)), type("Runner", (), {}))


def test_a_proposer_without_loading_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="load_model"):
        install_draft(Pacer(Pacing(1.0)), type("Proposer", (), {}))


@pytest.mark.parametrize("environ", [{}, {PACING_ENV: ""}, {PACING_ENV: " ", STATS_ENV: "x"}])
def test_nothing_is_paced_unless_asked_for(environ: dict[str, str]) -> None:
    assert install_from_env(environ) is None


@pytest.mark.parametrize("name", [PACING_ENV, DRAFT_PACING_ENV])
def test_a_wrong_environment_variable_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: "):
        install_from_env({PACING_ENV: "5"} | {name: "slow"})


@pytest.mark.parametrize("ending", ["", "os.abort()"])
def test_a_forked_child_counts_whatever_its_end(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    code = (
        "import os, sys; from pathlib import Path; from vllm_wanspec.emulate.pacing import COUNT_ONLY, Pacer, Pacing\n"
        "pacer = Pacer(Pacing(0.0), COUNT_ONLY, Path(sys.argv[1]))\n"
        "if not (child := os.fork()):\n"
        "    for _ in range(3): pacer.run(lambda: None, 1)\n"
        f"    {ending or 'os._exit(0)'}\n"
        "os.waitpid(child, 0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)
    assert counts_in(path)["steps"] == 3
