"""What a request may say in ``vllm_xargs``: all that can only mean off is off, and what means nothing is refused."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from proposer_engine import MAX_LEN, TOY, Engine, pool_of, running, stub_vllm, vllm_config
from toys import DrafterServer, draft_model

from vllm_wanspec.config import PROPOSER
from vllm_wanspec.controller import front
from vllm_wanspec.ledger import wrap

pytestmark = pytest.mark.usefixtures("short_waits")

OFF = [
    "off",
    "Off",
    "OFF",
    " off ",
    "false",
    "False",
    "no",
    "none",
    "disabled",
    "0",
    "0.0",
    False,
    0,
    0.0,
    ["off"],
    [0],
]
ON = ["on", "ON", " true ", "yes", "enabled", "1", True, 1, 1.0, ["on"]]
NARROW = ["max_branches=1", " max_branches = 1 ", ["max_branches=1"], ["max_branches=1", "branch_depth=8"]]
WRONG = [
    ("", "says nothing"),
    ("  ", "nothing"),
    ([], "nothing"),
    ("of", "'of'"),
    (7, "7"),
    (0.5, "0.5"),
    (-1, "-1"),
    ("max_branches", "'max_branches'"),
    ("max_branches=0", "max_branches: '0'"),
    ("branches=1", "branches: is not a known key"),
    ("max_branches=1,max_branches=2", "max_branches is given twice"),
    ("off,max_branches=1", "'off'"),
    (["off", "on"], "'off'"),
    ({"max_branches": 1}, "max_branches"),
    ("x" * 5000, "xxx"),
    (
        ",".join(f"k{number}=1" for number in range(200_000)),
        "longer than 1000",
    ),  # would take minutes, and a reply of MBs
    (["max_branches=1"] * 100, "longer than 1000"),
]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    stub_vllm(monkeypatch)
    with (
        DrafterServer(TOY, model=draft_model(max_context=MAX_LEN)) as server,
        running(vllm_config(tmp_path, server.url)) as engine,
    ):
        yield engine


def asking(value: object) -> dict[str, SimpleNamespace]:
    return {"sampling_params": SimpleNamespace(extra_args={"wanspec": value, "other": 1})}


@pytest.mark.parametrize("value", [value for value in OFF if value != "off"], ids=repr)
def test_all_that_can_only_mean_off_is_off(engine: Engine, value: object) -> None:
    engine.add("off", [1, 2], **asking(value))
    engine.add("on", [3, 4])
    engine.run_until_accepted("on", 5)
    assert pool_of(engine).length("off") is None
    assert pool_of(engine).counters.opened_sessions == 1


@pytest.mark.parametrize("value", ON, ids=repr)
def test_all_that_can_only_mean_on_is_as_configured(engine: Engine, value: object) -> None:
    engine.add("a", [1, 2], **asking(value))
    engine.step()
    assert pool_of(engine).tree("a") == engine.remote._requests._tree


@pytest.mark.parametrize("value", NARROW[:2], ids=repr)
def test_keys_of_the_tree(engine: Engine, value: object) -> None:
    engine.add("a", [1, 2], **asking(value))
    engine.step()
    assert pool_of(engine).tree("a") == engine.remote._requests._tree.model_copy(update={"max_branches": 1})


@pytest.mark.parametrize("value", NARROW[2:], ids=repr)
def test_keys_of_the_tree_in_a_list(engine: Engine, value: object) -> None:
    test_keys_of_the_tree(engine, value)


# At the door


class Params:
    """As much of vLLM's SamplingParams as is wrapped."""

    def __init__(self, extra_args: dict[str, Any] | None) -> None:
        self.extra_args = extra_args
        self.verified: list[tuple[Any, ...]] = []

    def verify(
        self, model_config: Any, speculative_config: Any, structured_outputs_config: Any, tokenizer: Any
    ) -> None:
        self.verified.append((model_config, speculative_config, structured_outputs_config, tokenizer))


OURS = SimpleNamespace(model=PROPOSER)


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> Any:
    kind = type("Params", (Params,), {"verify": Params.verify})
    for _ in range(3):
        wrap(kind, "verify", front._verifying)
    return kind


@pytest.mark.parametrize(("value", "fragment"), WRONG, ids=lambda value: repr(value)[:40])
def test_what_is_not_understood_is_refused_at_the_door(params: Any, value: object, fragment: str) -> None:
    asked = params({"wanspec": value})
    with pytest.raises(front.request_fault(), match=r"^vllm_xargs: wanspec: ") as caught:
        asked.verify("model", OURS, None, "tokenizer")
    message = str(caught.value)
    assert fragment in message
    assert '"off"' in message or "known here" in message or "greater" in message or "twice" in message
    assert len(message) < 500
    assert "\n" not in message
    assert not asked.verified


@pytest.mark.parametrize("key", ["Wanspec", "WANSPEC", " wanspec", "wan_spec", "wan-spec"])
def test_a_key_that_can_only_mean_ours_is_refused_at_the_door(params: Any, key: str) -> None:
    with pytest.raises(front.request_fault(), match=r"^vllm_xargs: .*is not a known key; it is spelled wanspec"):
        params({key: "off"}).verify("model", OURS, None, "tokenizer")


@pytest.mark.parametrize("value", [*OFF, *ON, *NARROW, None], ids=repr)
def test_what_is_understood_passes_once(params: Any, value: object) -> None:
    asked = params({"wanspec": value, "other": object()})
    asked.verify("model", OURS, tokenizer="tokenizer", structured_outputs_config=None)
    assert asked.verified == [("model", OURS, None, "tokenizer")]


@pytest.mark.parametrize("speculative", [None, SimpleNamespace(model="other"), SimpleNamespace(method="ngram")])
def test_without_our_proposer_nothing_is_judged(params: Any, speculative: object) -> None:
    asked = params({"wanspec": "nonsense", "Wanspec": 7})
    asked.verify("model", speculative, None, "tokenizer")
    assert len(asked.verified) == 1
    params(None).verify("model", OURS, None, "tokenizer")


def test_a_vllm_whose_requests_are_verified_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("SamplingParams", (), {"verify": lambda self, model_config: None})
    monkeypatch.setattr(front, "attribute", lambda module, name: kind)
    with pytest.raises(front.UnsupportedError, match=r"another SamplingParams\.verify .*use vLLM"):
        front.check_requests()
    kind.verify = None  # type: ignore[attr-defined]
    with pytest.raises(front.UnsupportedError, match=r"no SamplingParams\.verify, .*use vLLM"):
        front.check_requests()


@pytest.mark.vllm
@pytest.mark.parametrize("value", ["of", 7, ["off", "on"], 0.5], ids=repr)
def test_a_wrong_wish_in_a_request_s_body_is_a_fault_of_the_request(value: object) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import SamplingParams

    wrap(SamplingParams, "verify", front._verifying)
    bodies = (
        CompletionRequest(model="m", prompt="a", vllm_xargs={"wanspec": value}),
        ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "a"}], vllm_xargs={"wanspec": value}),
    )
    for body in bodies:
        params = body.to_sampling_params(5, {})
        assert isinstance(params, SamplingParams)
        # Any other error of a request's verification is HTTP 500.
        with pytest.raises(VLLMClientError, match=r"vllm_xargs: wanspec: ") as caught:
            params.verify(None, OURS, None, None)  # type: ignore[arg-type]
        assert create_error_response(caught.value).error.code == 400


@pytest.mark.vllm
@pytest.mark.parametrize("value", [False, 0, "OFF", ["off"]], ids=repr)
def test_an_opt_out_in_a_request_s_body_is_one(engine: Engine, value: object) -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    body = CompletionRequest(model="m", prompt="a", vllm_xargs={"wanspec": value})
    engine.add("off", [1, 2], sampling_params=body.to_sampling_params(5, {}))
    engine.step()
    assert pool_of(engine).length("off") is None
