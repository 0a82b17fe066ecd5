"""Step pacing: the arithmetic with a fake clock, the wrap on a stand-in for vLLM's model runner."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_wanspec.emulate.pacing import PACING_ENV, STATS_ENV, Pacer, Pacing, install, install_draft, install_from_env
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


def runner_class() -> Any:
    class Runner:
        def _model_forward(self, input_ids: Any = None, positions: Any = None, **more: Any) -> Any:
            return ("output", input_ids, positions, more)

    return Runner


def pacer_on(fake: FakeTime, pacing: Pacing, path: Path | None = None) -> Pacer:
    return Pacer(pacing, path, clock=fake.clock, sleep=fake.sleep)


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


def steps_in(path: Path) -> int:
    return int(json.loads(path.read_text())["steps"]) if path.exists() else 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never came true"
        time.sleep(0.005)


def test_statistics_are_written_soon_after_the_last_step(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    pacer = Pacer(Pacing(1.0), path, stats_interval_s=0.02)
    for steps in (3, 6):
        for _ in range(3):
            pacer.run(lambda: None, tokens=1)
        wait_for(lambda steps=steps: steps_in(path) == steps)
    assert not [entry for entry in tmp_path.iterdir() if entry.name != "stats.json"]


def test_no_forward_writes_statistics(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    pacer = Pacer(Pacing(0.5), path, stats_interval_s=600.0)
    for _ in range(6):
        pacer.run(lambda: None, tokens=1)
    assert not list(tmp_path.iterdir())
    pacer.write_stats()
    written = json.loads(path.read_text())
    assert (written["steps"], written["paced_ms_total"]) == (6, pytest.approx(3.0))
    assert set(written) == {"steps", "overruns", "paced_ms_total", "work_ms_total"}


def test_statistics_that_cannot_be_written_do_not_stop_the_model(tmp_path: Path) -> None:
    fake = FakeTime()
    pacer = pacer_on(fake, Pacing(1.0), tmp_path / "missing" / "stats.json")
    assert pacer.run(lambda: fake.work(2.0, "result"), tokens=1) == "result"
    pacer.write_stats()
    assert pacer.run(lambda: fake.work(2.0, "result"), tokens=1) == "result"


def test_a_process_that_paced_nothing_leaves_the_file_alone(tmp_path: Path) -> None:
    Pacer(Pacing(1.0), tmp_path / "stats.json").write_stats()
    assert not list(tmp_path.iterdir())


def test_the_wrap_passes_arguments_and_counts_tokens() -> None:
    cls = runner_class()
    pacer = install(Pacing(0.0, 0.001), runner_class=cls)
    ids, positions = Rows((7,)), Rows((3, 7))
    assert cls()._model_forward(input_ids=ids, positions=positions, extra=1) == ("output", ids, positions, {"extra": 1})
    assert pacer.stats.paced_ms_total == pytest.approx(0.007)
    cls()._model_forward(None, positions)  # embeddings instead of ids
    assert pacer.stats.paced_ms_total == pytest.approx(0.014)
    assert cls()._model_forward() == ("output", None, None, {})
    assert pacer.stats.steps == 3


def test_installing_twice_wraps_once() -> None:
    cls = runner_class()
    first = install(Pacing(1.0), runner_class=cls)
    wrapped = cls._model_forward
    assert install(Pacing(2.0), runner_class=cls) is first
    assert cls._model_forward is wrapped


def test_a_draft_model_beside_the_target_is_paced_from_its_loading_on(tmp_path: Path) -> None:
    class Proposer:
        def load_model(self, target: str) -> None:
            self.model = type("Model", (), {"forward": lambda model, input_ids, **more: (target, input_ids, more)})()

    pacer = install_draft(Pacing(0.0, 0.001), proposer_class=Proposer)
    assert install_draft(Pacing(2.0), proposer_class=Proposer) is pacer
    proposer, ids = Proposer(), Rows((5,))
    proposer.load_model("target")
    assert proposer.model.forward(ids, extra=1) == ("target", ids, {"extra": 1})
    assert pacer.stats.steps == 1
    assert pacer.stats.paced_ms_total == pytest.approx(0.005)
    beside = Pacer(Pacing(0.0), tmp_path / "stats.json", stats_interval_s=600.0)
    beside.draft_stats = pacer.stats
    beside.run(lambda: None, tokens=1)
    beside.write_stats()
    counts = json.loads((tmp_path / "stats.json").read_text())
    assert (counts["steps"], counts["draft_steps"], counts["draft_overruns"]) == (1, 1, pacer.stats.overruns)


def test_a_runner_without_the_method_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="_model_forward"):
        install(Pacing(1.0), runner_class=type("Runner", (), {}))


@pytest.mark.parametrize("environ", [{}, {PACING_ENV: ""}, {PACING_ENV: " ", STATS_ENV: "x"}])
def test_nothing_is_paced_unless_asked_for(environ: dict[str, str]) -> None:
    assert install_from_env(environ) is None


def test_a_wrong_environment_variable_is_named() -> None:
    with pytest.raises(ConfigError, match=PACING_ENV):
        install_from_env({PACING_ENV: "slow"})


def test_the_last_counts_are_written_at_exit(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    code = (
        "import sys; from pathlib import Path; from vllm_wanspec.emulate.pacing import Pacer, Pacing\n"
        "pacer = Pacer(Pacing(0.0), Path(sys.argv[1]))\n"
        "for _ in range(3): pacer.run(lambda: None, 1)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)
    assert json.loads(path.read_text())["steps"] == 3


def test_a_multiprocessing_child_writes_its_last_counts_too(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    code = (
        "import multiprocessing, sys; from pathlib import Path; from vllm_wanspec.emulate.pacing import Pacer, Pacing\n"
        "pacer = Pacer(Pacing(0.0), Path(sys.argv[1]))\n"
        "def work():\n"
        "    for _ in range(3): pacer.run(lambda: None, 1)\n"
        "child = multiprocessing.get_context('fork').Process(target=work)\n"
        "child.start(); child.join(); sys.exit(child.exitcode)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)
    assert json.loads(path.read_text())["steps"] == 3
