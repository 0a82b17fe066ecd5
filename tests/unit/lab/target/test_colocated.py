"""The co-located draft model with prompt lookup behind it: on a played worker, with values worked out by hand."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_wanspec.errors import ConfigError, UnsupportedError
from vllm_wanspec.lab.target import colocated
from vllm_wanspec.lab.target.colocated import (
    COLOCATED_ENV,
    COUNTS,
    LengthensDrafts,
    colocated_flags,
    counts_path,
    read_counts,
    set_gamma,
)

K = 8
LOOP = [1, 2, 3, 4, 5, 6, 7, 8, 9]
"""Of a text that repeats it, three tokens tell what follows."""


def configuration(**changes: Any) -> Any:
    """Of a server that `colocated_flags` have started; ``changes`` by dotted name with ``__`` for the dot."""
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            method="draft_model", num_speculative_tokens=K, draft_sample_method="greedy"
        ),
        parallel_config=SimpleNamespace(world_size=1, data_parallel_size=1),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        use_v2_model_runner=False,
    )
    for name, value in changes.items():
        section, _, key = name.partition("__")
        setattr(getattr(config, section) if key else config, key or section, value)
    return config


class PlayedWorker:
    """vLLM's part: rows with their tokens, a draft model that says what it is told to, and what vLLM gets."""

    def __init__(self, vllm_config: Any) -> None:
        self.texts: dict[str, list[int]] = {}
        self.says: dict[str, list[int]] = {}
        self.yields: dict[str, list[int]] = {}
        self.gammas: list[int] = []
        self.model_runner: Any = SimpleNamespace(input_batch=None)

    def execute_model(self, scheduler_output: Any) -> None:
        self.gammas.append(scheduler_output.num_spec_tokens_to_schedule)

    def sample_tokens(self, grammar_output: Any) -> Any:
        for name, tokens in self.yields.items():
            self.texts[name] += tokens
        contexts = np.zeros((len(self.texts), 400), dtype=np.int32)
        for row, text in enumerate(self.texts.values()):
            contexts[row, : len(text)] = text
        self.model_runner.input_batch = SimpleNamespace(
            req_id_to_index={name: row for row, name in enumerate(self.texts)},
            num_tokens_no_spec=np.array([len(text) for text in self.texts.values()], dtype=np.int32),
            token_ids_cpu=contexts,
        )
        return SimpleNamespace(req_ids=list(self.yields), sampled_token_ids=list(self.yields.values()))

    def take_draft_token_ids(self) -> Any:
        drafts = [list(self.says[name]) for name in self.texts]
        return SimpleNamespace(req_ids=list(self.texts), draft_token_ids=drafts)


class Worker(LengthensDrafts, PlayedWorker):
    """As `ColocatedWorker` is made."""

    def step(
        self,
        yields: dict[str, list[int]],
        says: dict[str, list[int]],
        verified: dict[str, list[int]] | None = None,
        finished: tuple[str, ...] = (),
    ) -> dict[str, list[int]]:
        """One step of vLLM's.

        Args:
            yields: What the target takes per request; the last token is its own.
            says: What the draft model drafts then.
            verified: The drafts that this step verifies.
            finished: Requests that are over.
        """
        for name in finished:
            del self.texts[name]
        self.yields, self.says = yields, says
        output = SimpleNamespace(
            finished_req_ids=set(finished),
            scheduled_spec_decode_tokens=verified or {},
            num_spec_tokens_to_schedule=K,
        )
        assert self.execute_model(output) is None
        self.sample_tokens(None)
        drafts = self.take_draft_token_ids()
        return dict(zip(drafts.req_ids, drafts.draft_token_ids, strict=True))


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "control.json"
    monkeypatch.setenv(COLOCATED_ENV, str(path))
    set_gamma(path, 3)
    return path


def worker_with(texts: dict[str, list[int]]) -> Worker:
    worker = Worker(configuration())
    worker.texts = {name: list(text) for name, text in texts.items()}
    return worker


def counted(control: Path) -> tuple[int, ...]:
    """Accepted and offered tokens, each the draft model's and lookup's."""
    counts = read_counts(control)
    return tuple(counts[name] for name in COUNTS)


# Lengthening


def test_lookup_goes_on_after_the_draft_up_to_k_tokens(control: Path) -> None:
    worker = worker_with({"a": [*LOOP, 1, 2]})
    assert worker.step({"a": [3]}, {"a": [4, 5, 6]}) == {"a": [4, 5, 6, 7, 8, 9, 1, 2]}


def test_a_draft_that_nothing_follows_stays_as_it_is(control: Path) -> None:
    worker = worker_with({"a": [*LOOP, 1, 2]})
    assert worker.step({"a": [3]}, {"a": [40, 50, 60]}) == {"a": [40, 50, 60]}


def test_the_more_rows_the_more_probable_a_token_must_be(control: Path) -> None:
    """Chances begin at a half each, for the draft as a whole and per token: 1/4, 1/8, 1/16, 1/32 and 1/64."""
    names = ["a", "b", "c", "d"]
    worker = worker_with({name: [*LOOP, 1, 2] for name in names})
    drafts = worker.step({name: [3] for name in names}, {name: [4, 5, 6] for name in names})
    assert drafts == {name: [4, 5, 6, 7, 8, 9, 1] for name in names}  # 1/64 is below 4 x 0.005


def test_zeros_in_place_of_drafts_give_way_to_lookup_alone(control: Path) -> None:
    """vLLM hands out K zeros for all requests when one is within K tokens of the longest length."""
    worker = worker_with({"a": [*LOOP, 1, 2], "b": [21, 22, 23]})
    drafts = worker.step({"a": [3], "b": [24]}, {"a": [0] * K, "b": [0] * K})
    assert drafts == {"a": [4, 5, 6, 7, 8, 9], "b": []}  # 1/2 ... 1/64, then 1/128, below 2 x 0.005


def test_tokens_that_arrive_step_by_step_are_searched_too(control: Path) -> None:
    worker = worker_with({"a": [30]})
    assert worker.step({"a": LOOP}, {"a": [50, 51, 52]}) == {"a": [50, 51, 52]}
    assert worker.step({"a": [1, 2, 3]}, {"a": [4, 5, 6]}) == {"a": [4, 5, 6, 7, 8, 9, 1, 2]}


def test_a_request_with_a_former_ones_name_has_its_own_text(control: Path) -> None:
    worker = worker_with({"a": [*LOOP, 1, 2]})
    worker.step({"a": [3]}, {"a": [4, 5, 6]})
    worker.step({}, {}, finished=("a",))
    worker.texts = {"a": [*range(100, 120), 1, 2]}
    assert worker.step({"a": [3]}, {"a": [4, 5, 6]}) == {"a": [4, 5, 6]}


# What is learnt


def repeat(worker: Worker, times: int, yields: list[int]) -> list[int]:
    """Start new requests with the same text, each of which then takes ``yields``; the draft of the last."""
    for number in range(times):
        name = f"{number}"
        worker.texts = {name: [*LOOP, 1, 2]}
        draft = worker.step({name: [3]}, {name: [4, 5, 6]})[name]
        worker.step({name: yields}, {name: [70, 71, 72]}, {name: draft})
        worker.step({}, {}, finished=(name,))
    worker.texts = {"last": [*LOOP, 1, 2]}
    return worker.step({"last": [3]}, {"last": [4, 5, 6]})["last"]


def test_guesses_that_are_wrong_become_short(control: Path) -> None:
    worker = worker_with({})
    # After n requests drafts have been taken whole in 1 + n of 2 + n cases, guesses been right in 1 of 2 + n. Tokens
    # with a chance of (1 + n) / (2 + n)^(1 + i) >= 0.005: 5, 4, 3, 3, then 2 until n = 11, then 1.
    assert repeat(worker, 18, [4, 5, 6, 99]) == [4, 5, 6, 7]
    assert counted(control) == (18 * 3, 0, 18 * 3, 5 + 4 + 3 + 3 + 8 * 2 + 6 * 1)


def test_drafts_that_are_rejected_are_not_gone_on_with_but_never_shortened(control: Path) -> None:
    worker = worker_with({})
    # Never taken whole: 1 of 101 after 99 times, x 1/2 is just below 0.005.
    assert repeat(worker, 98, [4, 99]) == [4, 5, 6, 7]
    assert repeat(worker, 1, [4, 99]) == [4, 5, 6]


# γ


def test_gamma_is_read_again_when_the_file_changes(control: Path) -> None:
    worker = worker_with({"a": [*LOOP, 1, 2]})
    worker.step({"a": [3]}, {"a": [4, 5, 6]})
    set_gamma(control, 5)
    assert worker.step({"a": [4]}, {"a": [5, 6, 7, 8, 9]}) == {"a": [5, 6, 7, 8, 9, 1, 2, 3]}
    set_gamma(control, 1)
    worker.step({"a": [5]}, {"a": [6]})
    assert worker.gammas == [3, 5, 1]


def test_a_file_that_stays_is_not_read_again(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_with({"a": [20]})
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("read again"))
    worker.step({"a": [3]}, {"a": [4, 5, 6]})
    assert worker.gammas == [3]
    assert not worker._lookup.failed


def test_a_broken_file_keeps_the_last_gamma_and_is_named_once(control: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = worker_with({"a": [20]})
    broken: list[str | None] = ["{", '{"gamma": 9}', '{"gamma": 0}', '{"gamma": true}', '{"gamma": "2"}', "[]", None]
    for text in broken:
        scratch = control.with_name("new")
        if text is None:
            control.unlink()
        else:
            scratch.write_text(text)
            scratch.replace(control)
        worker.step({"a": [3]}, {"a": [4, 5, 6]})
    assert worker.gammas == [3] * len(broken)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(control) in warnings[0]
    set_gamma(control, 2)
    worker.step({"a": [3]}, {"a": [4, 5]})
    control.write_text("{")
    worker.step({"a": [3]}, {"a": [4, 5]})
    assert worker.gammas[-2:] == [2, 2]
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 2


def test_without_a_control_file_k_tokens_are_drafted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(COLOCATED_ENV, raising=False)
    monkeypatch.chdir(tmp_path)
    worker = worker_with({"a": [20]})
    worker.step({"a": [3]}, {"a": [4] * K})
    assert worker.gammas == [K]
    assert not list(tmp_path.iterdir())


# Counts


def test_accepted_tokens_are_counted_by_where_they_came_from(control: Path) -> None:
    worker = worker_with({"a": [*LOOP, 1, 2]})
    assert counted(control) == (0, 0, 0, 0)
    draft = worker.step({"a": [3]}, {"a": [4, 5, 6]})["a"]
    assert counted(control) == (0, 0, 0, 0)  # nothing verified yet
    # 3 of the model's and 2 of lookup's 5; then the draft is cut to one of lookup's, which is taken; then 1 of 3.
    draft = worker.step({"a": [4, 5, 6, 7, 8, 33]}, {"a": [1, 2, 3]}, {"a": draft})["a"]
    assert counted(control) == (3, 2, 3, 5)
    assert len(draft) == K
    draft = worker.step({"a": [1, 2, 3, 4, 34]}, {"a": [40, 41, 42]}, {"a": draft[:4]})["a"]
    assert counted(control) == (6, 3, 6, 6)
    draft = worker.step({"a": [40, 35]}, {"a": [60, 61, 62]}, {"a": draft})["a"]
    assert counted(control) == (7, 3, 9, 6)
    worker.step({"a": [60, 36]}, {"a": [60, 61, 62]}, {"a": draft[:2]})
    assert counted(control) == (8, 3, 11, 6)


def test_rows_without_drafts_and_placeholders_are_not_counted(control: Path) -> None:
    worker = worker_with({"a": [*LOOP, 1, 2], "b": [21, 22, 23]})
    draft = worker.step({"a": [3], "b": []}, {"a": [4, 5, 6], "b": [0, 0, 0]})["a"]
    worker.texts["c"] = [10, 11]  # in vLLM's cache, so that its first step is filled up with placeholders
    says = {"a": [50, 51, 52], "b": [0, 0, 0], "c": [0, 0, 0]}
    worker.step({"a": [4, 44], "b": [24], "c": [12]}, says, {"a": draft, "c": [-1] * K})
    assert counted(control) == (1, 0, 3, 5)
    assert not worker._lookup.failed


def test_the_counts_keep_their_place_in_the_file(control: Path) -> None:
    worker = worker_with({"a": [*LOOP, 1, 2]})
    size = counts_path(control).stat().st_size
    draft = worker.step({"a": [3]}, {"a": [4, 5, 6]})["a"]
    worker.step({"a": [4, 5, 6, 7, 8, 9, 1, 2, 3]}, {"a": [4, 5, 6]}, {"a": draft})
    text = counts_path(control).read_text()
    assert len(text) == size
    assert json.loads(text) == {"accepted_draft": 3, "accepted_lookup": 5, "offered_draft": 3, "offered_lookup": 5}


def test_a_reader_waits_for_a_text_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "control.json"
    texts = ["", '{"accepted_draft": 1', json.dumps(dict.fromkeys(COUNTS, 7))]
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        counts_path(path).write_text(texts[len(pauses) - 1])

    monkeypatch.setattr(colocated.time, "sleep", pause)
    assert read_counts(path) == dict.fromkeys(COUNTS, 7)
    assert len(pauses) == len(texts)


def test_counts_that_nobody_writes_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colocated, "READ_DEADLINE_S", 0.01)
    with pytest.raises(ConfigError, match=r"control\.json\.counts: no counts"):
        read_counts(tmp_path / "control.json")


def test_a_draft_that_was_not_verified_is_not_judged_by_placeholders(control: Path) -> None:
    """A request that has been preempted, and whose text is in vLLM's cache when it goes on."""
    worker = worker_with({"a": [*LOOP, 1, 2]})
    worker.step({"a": [3]}, {"a": [4, 5, 6]})
    worker.step({"a": [4]}, {"a": [5, 6, 7]}, {"a": [-1] * K})
    assert counted(control) == (0, 0, 0, 0)


# Where it stands


def test_a_fault_of_ours_leaves_drafts_alone_and_is_named_once(control: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = worker_with({"a": [*LOOP, 1, 2]})
    worker.step({"a": [3]}, {"a": [4, 5, 6]})
    worker.texts["a"][-1] = -1  # no token, as vLLM has it where it schedules asynchronously
    worker.texts["a"].append(-1)
    for _ in range(3):
        assert worker.step({"a": [3]}, {"a": [4, 5, 6]}) == {"a": [4, 5, 6]}
    set_gamma(control, 4)
    assert worker.step({"a": [3]}, {"a": [4, 5, 6, 7]}) == {"a": [4, 5, 6, 7]}
    assert worker.gammas[-1] == 4
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1


def test_a_vllm_without_dynamic_speculation_is_left_alone(control: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = worker_with({"a": [*LOOP, 1, 2]})
    older = SimpleNamespace(finished_req_ids=set(), scheduled_spec_decode_tokens={})
    worker._lookup.begin(older)
    assert worker.step({"a": [3]}, {"a": [0] * K}) == {"a": [0] * K}
    assert "stops by a fault of its own" in caplog.text


def test_a_step_without_drafts_to_take_is_passed_on(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlayedWorker, "take_draft_token_ids", lambda worker: None)
    assert worker_with({}).take_draft_token_ids() is None


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"speculative_config": None}, "a draft model"),
        ({"speculative_config__method": "ngram"}, "a draft model"),
        ({"speculative_config__draft_sample_method": "probabilistic"}, "best tokens"),
        ({"scheduler_config__async_scheduling": True}, "synchronous scheduling"),
        ({"use_v2_model_runner": True}, "Model Runner V1"),
        ({"parallel_config__world_size": 2}, "a single process"),
        ({"parallel_config__data_parallel_size": 2}, "a single process"),
    ],
)
def test_a_server_that_it_cannot_serve_is_refused(changes: dict[str, Any], missing: str, control: Path) -> None:
    with pytest.raises(UnsupportedError, match=missing):
        Worker(configuration(**changes))


def test_the_flags_name_the_draft_model_k_and_the_worker() -> None:
    flags = colocated_flags("a folder/draft", 8)
    config = json.loads(flags[flags.index("--speculative-config") + 1])
    assert config == {"method": "draft_model", "model": "a folder/draft", "num_speculative_tokens": 8}
    assert flags[flags.index("--worker-cls") + 1] == "vllm_wanspec.lab.target.colocated.ColocatedWorker"
    assert "--no-async-scheduling" in flags


def test_a_bench_can_import_it_without_vllm() -> None:
    check = "import sys, vllm_wanspec.lab.target.colocated; sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    root = Path(colocated.__file__).parents[3]
    env = os.environ | {"PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", check], env=env, timeout=60, check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'Another'"):
        colocated.Another  # noqa: B018
