"""Several engines of one target: each has its metrics port and its event file, and none holds a step back."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import LogLines
from proposer_engine import MAX_LEN, TOY, pool_of, running, stub_vllm, vllm_config
from toys import DrafterServer, draft_model, wait_until

from vllm_wanspec.config import PROPOSER, Settings
from vllm_wanspec.controller import engine as engine_core
from vllm_wanspec.controller import front, service
from vllm_wanspec.controller.startup import settings_of

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(TOY, model=draft_model(max_context=MAX_LEN)) as server:
        yield server


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    ports: list[int] = []
    stub_vllm(monkeypatch)
    monkeypatch.setattr(service, "serve_metrics", lambda pool, settings: ports.append(settings.port))
    return ports


class Arguments:
    """vLLM's arguments; the configuration is what they give."""

    def __init__(self, config: SimpleNamespace) -> None:
        self.config = config

    def create_engine_config(self) -> SimpleNamespace:
        return self.config

    def verify(self, speculative_config: object) -> None: ...


def in_engine(monkeypatch: pytest.MonkeyPatch, config: SimpleNamespace, *, size: int, rank: int, dense: bool) -> None:
    """What of a configuration reaches an engine process of so many."""
    kind: Any = type("Arguments", (Arguments,), {"create_engine_config": Arguments.create_engine_config})
    monkeypatch.setattr(front, "attribute", lambda module, name: kind)
    monkeypatch.setattr(front, "repair_cpu_expand", lambda: False)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", ModuleType("arg_utils"))
    front.install(lambda config: front.V1)
    parallel = config.parallel_config
    parallel.data_parallel_size = size
    config.speculative_config.model = PROPOSER
    config.model_config.skip_tokenizer_init = False
    assert kind(config).create_engine_config() is config
    parallel.data_parallel_index = rank
    if dense:  # vLLM has each such engine believe that it is alone
        parallel.data_parallel_size, parallel.data_parallel_rank = 1, 0


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("rank", "file"), [(1, "controller.dp1.jsonl"), (3, "controller.dp3.jsonl")])
def test_each_rank_has_its_own_port_and_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: DrafterServer,
    ports: list[int],
    log: LogLines,
    rank: int,
    file: str,
    dense: bool,
) -> None:
    more = f"metrics: {{port: 9464}}\nevents: {tmp_path / 'controller.jsonl'}\n"
    config = vllm_config(tmp_path, server.url, more=more)
    in_engine(monkeypatch, config, size=4, rank=rank, dense=dense)
    with running(config) as engine:
        assert ports == [9464 + rank]
        engine.add("a", [1, 2, 3])
        engine.run_until_accepted("a", 3)
        wait_until((tmp_path / file).exists)
        pool_of(engine)._sink.__self__.close()
    assert json.loads((tmp_path / file).read_text(encoding="utf-8").splitlines()[0])["side"] == "controller"
    assert not (tmp_path / "controller.jsonl").exists()
    [line] = [line for line in log.lines() if "data-parallel" in line]
    assert f"rank {rank}" in line
    assert f"{9464 + rank}" in line
    assert file in line


def test_rank_0_and_an_engine_alone_have_what_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: DrafterServer, ports: list[int]
) -> None:
    for size in (1, 2):
        path = tmp_path / f"{size}.jsonl"
        config = vllm_config(tmp_path, server.url, more=f"metrics: {{port: 9464}}\nevents: {path}\n")
        in_engine(monkeypatch, config, size=size, rank=0, dense=True)
        with running(config) as engine:
            pool_of(engine)._sink.__self__.close()
        assert path.exists()
    assert ports == [9464, 9464]


@pytest.mark.parametrize("rank", [0, 1])
def test_no_step_of_a_dense_model_is_held_back_with_data_parallelism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: DrafterServer, ports: list[int], rank: int
) -> None:
    monkeypatch.setattr(
        engine_core, "_engine_core", lambda: SimpleNamespace(input_queue=SimpleNamespace(qsize=lambda: 0))
    )
    config = vllm_config(tmp_path, server.url)
    in_engine(monkeypatch, config, size=2, rank=rank, dense=True)
    with running(config) as engine:
        assert pool_of(engine)._late._queued() is None


def test_an_engine_alone_may_hold_steps_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: DrafterServer, ports: list[int]
) -> None:
    monkeypatch.setattr(
        engine_core, "_engine_core", lambda: SimpleNamespace(input_queue=SimpleNamespace(qsize=lambda: 0))
    )
    config = vllm_config(tmp_path, server.url)
    in_engine(monkeypatch, config, size=1, rank=0, dense=True)
    with running(config) as engine:
        assert pool_of(engine)._late._queued() == 0


def test_ports_that_cannot_be_are_said_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: DrafterServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = vllm_config(tmp_path, server.url, more="metrics: {port: 65534}\n")
    with pytest.raises(SystemExit) as caught:
        in_engine(monkeypatch, config, size=3, rank=0, dense=True)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "metrics.port" in err
    assert "65533" in err


@pytest.mark.parametrize("events", [".", "/"])
def test_events_in_what_can_only_be_a_folder_are_left_as_they_are(events: str) -> None:
    endpoints = [{"name": "eu", "url": "http://127.0.0.1:1"}]
    settings = Settings.model_validate({"draft_endpoints": endpoints, "events": events})
    assert settings_of(settings, 1).events == events
