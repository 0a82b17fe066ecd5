"""What requests, vLLM and the configuration ask of RemoteProposer."""

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LogLines
from proposer_engine import MAX_LEN, TOY, Engine, K, pool_of, running, stub_vllm, vllm_config
from toys import DrafterServer, draft_model, wait_until

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.controller import engine as engine_module
from vllm_wanspec.controller import service
from vllm_wanspec.controller.requests import tokens_and_drafts
from vllm_wanspec.controller.v1.proposer import RemoteProposer
from vllm_wanspec.errors import ConfigError

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def server() -> Iterator[DrafterServer]:
    with DrafterServer(TOY, model=draft_model(max_context=MAX_LEN)) as server:
        yield server


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_vllm(monkeypatch)


@pytest.fixture
def engine(tmp_path: Path, server: DrafterServer, stubs: None) -> Iterator[Engine]:
    with running(vllm_config(tmp_path, server.url)) as engine:
        yield engine


def asking(text: object) -> dict[str, SimpleNamespace]:
    """A request with ``vllm_xargs``."""
    return {"sampling_params": SimpleNamespace(extra_args={"wanspec": text, "other": 1})}


# What a request asks for


def test_opting_out(engine: Engine) -> None:
    engine.add("off", [1, 2], sampling_params=SimpleNamespace(extra_args={"wanspec": "off"}))
    engine.add("on", [3, 4], sampling_params=SimpleNamespace(extra_args={"wanspec": "max_branches=2", "other": 1}))
    engine.run_until_accepted("on", 20)
    assert engine.accepted["off"] == 0
    assert pool_of(engine).counters.opened_sessions == 1


def test_a_request_s_own_tree_settings(engine: Engine, server: DrafterServer) -> None:
    engine.add("narrow", [1, 2], **asking("max_branches=1, lookahead_tokens=7"))
    engine.add("usual", [3, 4])
    engine.run_until_accepted("narrow", 10)
    engine.run_until_accepted("usual", 10)
    usual = engine.remote._requests._tree
    assert pool_of(engine).tree("narrow") == TreeSettings(
        **{**usual.model_dump(), "max_branches": 1, "lookahead_tokens": 7}
    )
    assert pool_of(engine).tree("usual") == usual
    [connection] = server.host.connections
    asked = {session.limits.lookahead: session.limits.max_branches for session in connection._sessions.values()}
    assert asked[7] == 1
    assert len(asked) == 2


def test_they_hold_when_a_session_begins_anew(engine: Engine) -> None:
    engine.add("a", [1, 2, 3], **asking("max_branches=1"))
    engine.run_until_accepted("a", 5)
    engine.contexts["a"] = [1, 2, 3, 9]
    engine.drafts["a"] = []
    engine.step()
    assert pool_of(engine).counters.opened_sessions == 2
    assert pool_of(engine).tree("a").max_branches == 1


@pytest.mark.parametrize(
    ("wrong", "fragment"),
    [
        ("max_branches=0", "max_branches: '0'"),
        ("branches=1", "branches: is not a known key"),
        ("of", 'right is "off"'),
        (7, "'7'"),
    ],
)
def test_a_wrong_wish_is_served_as_configured_and_said_once(
    engine: Engine, log: LogLines, wrong: object, fragment: str
) -> None:
    for name in "abc":
        engine.add(name, [1, 2, ord(name) % 40], **asking(wrong))
    engine.run_until_accepted("a", 5)
    assert [pool_of(engine).tree(name) for name in "abc"] == [engine.remote._requests._tree] * 3
    [warning] = [line for line in log.warnings() if "vllm_xargs" in line]
    assert fragment in warning
    assert "request a is served as configured" in warning
    assert not log.lines(40)


# What vLLM asks for


@pytest.mark.parametrize("limit", [0, 1, 2, 99])
def test_vllm_s_dynamic_limit_is_obeyed(engine: Engine, limit: int) -> None:
    engine.add("a", [1, 2, 3])
    engine.run_until_accepted("a", 5)
    engine.limit = limit
    for _ in range(10):
        [draft] = engine.step()
        assert len(draft) <= min(limit, K)
    engine.limit = None
    engine.run_until_accepted("a", 5)


def test_length_max_is_obeyed(tmp_path: Path, server: DrafterServer, stubs: None) -> None:
    with running(vllm_config(tmp_path, server.url, speculative=8, more="length: {max: 2}\n")) as engine:
        engine.add("a", [1, 2])
        wait_until(lambda: len(engine.step()[0]) == 2)
        for _ in range(10):
            assert len(engine.step()[0]) <= 2


def test_other_ranks_do_not_connect(
    tmp_path: Path, server: DrafterServer, stubs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_is_first_rank", lambda: False)
    remote = RemoteProposer(vllm_config(tmp_path, server.url))
    assert remote.pool is None
    engine = Engine(remote)
    engine.add("a", [1, 2])
    for _ in range(3):
        assert engine.step() == [[]]
    assert server.attempts == 0


def test_a_wrong_configuration_is_said_when_it_is_built(tmp_path: Path, stubs: None) -> None:
    config = vllm_config(tmp_path, "nonsense")
    with pytest.raises(ConfigError, match="must be a base URL"):
        RemoteProposer(config)
    config.additional_config = {"wanspec": str(tmp_path / "absent.yaml")}
    with pytest.raises(ConfigError, match="cannot be read"):
        RemoteProposer(config)


def test_metrics_are_served_where_configured(
    tmp_path: Path, server: DrafterServer, stubs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports: list[int] = []
    monkeypatch.setattr(service, "serve_metrics", lambda pool, settings: ports.append(settings.port))
    with running(vllm_config(tmp_path, server.url, more="metrics: {port: 9464}\n")):
        assert ports == [9464]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (7, 4)),
        ({"scheduled_spec_decode_tokens": {}, "total_num_scheduled_tokens": 3}, (3, 0)),
        ({"total_num_scheduled_tokens": 40}, (0, 0)),  # a row in the middle of its prefill
        ({"scheduled_new_reqs": [object()]}, (0, 0)),
    ],
)
def test_steps_that_are_examples_of_decoding(changes: dict, expected: tuple[int, int]) -> None:
    output = {
        "scheduled_new_reqs": [],
        "scheduled_spec_decode_tokens": {"a": [1, 2, 3], "c": [4]},
        "num_scheduled_tokens": {"a": 4, "b": 1, "c": 2},
        "total_num_scheduled_tokens": 7,
    }
    assert tokens_and_drafts(SimpleNamespace(**(output | changes))) == expected


def test_steps_are_timed_by_what_they_decode(engine: Engine) -> None:
    engine.add("a", [1, 2, 3])
    engine.run_until_accepted("a", 30)
    times = pool_of(engine).shared.times
    assert times.drafted.samples + times.full.samples > 0.0
    assert pool_of(engine).meter.step_s.get(0.0) > 0.0


def test_steps_are_held_back_only_where_the_queue_is_known(
    tmp_path: Path, server: DrafterServer, stubs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = SimpleNamespace(input_queue=queue.Queue())
    monkeypatch.setattr(engine_module, "_engine_core", lambda: core)
    with running(vllm_config(tmp_path, server.url)) as engine:
        assert pool_of(engine)._late._queued() == 0
        core.input_queue.put(1)
        assert pool_of(engine)._late._queued() == 1
    with running(vllm_config(tmp_path, server.url, parallel=2)) as engine:
        assert pool_of(engine)._late._queued() is None  # data-parallel engines wait for each other


# What the configuration asks for


def test_events_are_recorded_where_configured(tmp_path: Path, server: DrafterServer, stubs: None) -> None:
    path = tmp_path / "controller.jsonl"
    with running(vllm_config(tmp_path, server.url, more=f"events: {path}\n")) as engine:
        engine.add("a", [1, 2, 3])
        engine.run_until_accepted("a", 5)
        wait_until(lambda: path.read_text(encoding="utf-8").count("\n") > 10)
        pool_of(engine)._sink.__self__.close()
    header, *records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (header["side"], header["name"]) == ("controller", "big")
    assert {record["k"] for record in records} == {"a"}
