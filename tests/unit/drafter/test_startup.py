"""What cannot draft is said before a drafter starts, in one line; what can do so less well is said and adapted to."""

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import LogLines
from prometheus_client import CollectorRegistry
from toys import VOCAB_SIZE, VOCABULARY, toy

from vllm_wanspec import plugin
from vllm_wanspec.config import HOST_ENV, TOKEN_ENV, WIDTH_ENV
from vllm_wanspec.controller import front
from vllm_wanspec.core.messages import vocabulary_fingerprint
from vllm_wanspec.drafter import inside, routes
from vllm_wanspec.drafter.environment import capacity_tokens
from vllm_wanspec.sim.engine import Engine

SERVER = SimpleNamespace(name="OPENAI_API_SERVER")


def configuration(**changes: Any) -> SimpleNamespace:
    """A drafter's, as far as we look."""
    model = {
        "model": "small",
        "skip_tokenizer_init": False,
        "max_logprobs": 20,
        "logprobs_mode": "raw_logprobs",
        "runner_type": "generate",
        "max_model_len": 1024,
        "get_vocab_size": lambda: 80,
        **changes,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(
            data_parallel_size=changes.get("data_parallel_size", 1),
            _api_process_count=changes.get("api_processes", 1),
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=64),
        speculative_config=None,
        additional_config={},
    )


class Arguments:
    """vLLM's arguments, whose configuration is ready."""

    config: Any = None

    def create_engine_config(self, usage_context: Any = None) -> Any:
        return self.config


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As in a process that `wanspec drafter` has become."""
    kind = type("Arguments", (Arguments,), {"create_engine_config": Arguments.create_engine_config})
    monkeypatch.setattr(front, "attribute", lambda module, name: kind)
    monkeypatch.setattr(front, "repair_cpu_expand", lambda: False)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", SimpleNamespace())
    monkeypatch.setenv("VLLM_PLUGINS", "wanspec")
    monkeypatch.delenv(HOST_ENV, raising=False)
    monkeypatch.delenv(WIDTH_ENV, raising=False)
    plugin.register()
    return kind


@pytest.mark.parametrize(
    ("changes", "variables", "says"),
    [
        ({"skip_tokenizer_init": True}, {}, ("--skip-tokenizer-init",)),
        ({"logprobs_mode": "raw_logits"}, {}, ("--logprobs-mode raw_logits", "raw_logprobs")),
        ({"logprobs_mode": "processed_logits"}, {}, ("--logprobs-mode processed_logits", "raw_logprobs")),
        ({"max_logprobs": 0}, {}, ("--max-logprobs 0", "8")),
        ({"runner_type": "pooling"}, {}, ("pooling", "generates")),
        ({}, {WIDTH_ENV: "many"}, (WIDTH_ENV, "'many'")),
        ({}, {HOST_ENV: "there"}, (HOST_ENV, "'there'")),
        ({"data_parallel_size": 2}, {HOST_ENV: "engine"}, (HOST_ENV, "front-end")),
        ({"api_processes": 2}, {}, ("one API server process", "--api-server-count 1")),
    ],
    ids=str,
)
def test_what_cannot_draft_ends_with_one_line_and_2(
    arguments: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    variables: dict[str, str],
    says: tuple[str, ...],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    arguments.config = configuration(**changes)
    with pytest.raises(SystemExit) as caught:
        arguments().create_engine_config(SERVER)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("wanspec: ")
    assert err.count("\n") == 1
    assert all(text in err for text in says), err


@pytest.mark.parametrize(
    ("plugins", "usage"), [(None, SERVER), ("other", SERVER), ("wanspec", SimpleNamespace(name="LLM_CLASS"))], ids=str
)
def test_a_process_that_is_no_drafter_is_left_alone(
    arguments: Any, monkeypatch: pytest.MonkeyPatch, plugins: str | None, usage: object
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS")
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    arguments.config = configuration(skip_tokenizer_init=True, max_logprobs=0, runner_type="pooling")
    assert arguments().create_engine_config(usage_context=usage) is arguments.config


@pytest.mark.parametrize("changes", [{}, {"max_logprobs": -1}, {"logprobs_mode": "processed_logprobs"}], ids=str)
def test_what_can_draft_passes(arguments: Any, changes: dict[str, Any]) -> None:
    arguments.config = configuration(**changes)
    assert arguments().create_engine_config(SERVER) is arguments.config


class Client:
    """vLLM's engine client, as far as `init_state` looks."""

    def __init__(self, vocabulary: dict[Any, int], **changes: Any) -> None:
        self.vllm_config = configuration(**changes)
        self._vocabulary = vocabulary

    def shutdown(self, timeout: float | None = None) -> None: ...

    def get_tokenizer(self) -> SimpleNamespace:
        return SimpleNamespace(get_vocab=lambda: self._vocabulary)


def asked_for(monkeypatch: pytest.MonkeyPatch, client: Client) -> tuple[int, SimpleNamespace]:
    """How many alternatives a drafter that gets ready asks its engine for, and its state."""
    asked: list[int] = []

    def engine(client: Any, top_k: int = 8) -> Engine:
        asked.append(top_k)
        return Engine(toy())

    monkeypatch.setattr(routes, "VllmEngine", engine)
    monkeypatch.setenv(TOKEN_ENV, "secret")
    monkeypatch.setattr(routes, "REGISTRY", CollectorRegistry())
    state = SimpleNamespace()
    asyncio.run(routes.WanspecRoutes().init_state(client, state, None))
    return asked[0], state


@pytest.mark.parametrize(("most", "wanted"), [(5, 5), (1, 1)])
def test_fewer_log_probabilities_are_adapted_to_and_said(
    monkeypatch: pytest.MonkeyPatch, log: LogLines, most: int, wanted: int
) -> None:
    assert asked_for(monkeypatch, Client(VOCABULARY, max_logprobs=most))[0] == wanted
    [line] = log.warnings()
    assert f"--max-logprobs {most}" in line
    assert "8" in line


@pytest.mark.parametrize("most", [-1, 8, 20])
def test_enough_log_probabilities(monkeypatch: pytest.MonkeyPatch, log: LogLines, most: int) -> None:
    assert asked_for(monkeypatch, Client(VOCABULARY, max_logprobs=most))[0] == 8
    assert not log.warnings()


def test_a_vocabulary_of_bytes_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = {token.encode(): index for token, index in VOCABULARY.items()} | {b"\xff\xfe": VOCAB_SIZE + 10}
    _, state = asked_for(monkeypatch, Client(vocabulary))
    model = state.wanspec_port().connection._host.model
    assert model.vocab_size == VOCAB_SIZE + 11
    assert model.fingerprint == vocabulary_fingerprint(vocabulary)


@pytest.mark.parametrize(
    ("cache", "tokens"),
    [
        ({"num_gpu_blocks": 100, "block_size": 16}, 1600),
        ({"num_gpu_blocks": None, "block_size": 16}, None),
        ({}, None),
    ],
)
def test_what_the_cache_holds(cache: dict[str, int | None], tokens: int | None) -> None:
    assert capacity_tokens(SimpleNamespace(cache_config=SimpleNamespace(**cache))) == tokens


def test_a_configuration_without_a_cache() -> None:
    assert capacity_tokens(SimpleNamespace()) is None


@pytest.mark.vllm
def test_the_installed_vllm_has_what_a_host_in_the_engine_needs() -> None:
    inside.check()
