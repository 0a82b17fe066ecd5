"""Turning into `vllm serve`."""

import os
import sys
from types import SimpleNamespace

import pytest

from vllm_wanspec.cli import launch
from vllm_wanspec.errors import ConfigError


@pytest.mark.parametrize("routes", [False, True])
def test_our_plugin_is_added_to_those_named(routes: bool) -> None:
    for given, wanted in (("a,b", "a,b,wanspec"), ("wanspec,a", "wanspec,a"), ("", "wanspec"), ("a,,b", "a,b,wanspec")):
        assert launch.plugin_list({"VLLM_PLUGINS": given}, routes=routes) == wanted


def test_without_the_variable_all_installed_plugins_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {
        "vllm.general_plugins": ["wanspec", "lora"],
        "vllm.platform_plugins": ["cpu_x"],
        "vllm.endpoint_plugins": ["not_before"],
    }
    monkeypatch.setattr(
        launch, "entry_points", lambda group: [SimpleNamespace(name=name) for name in installed.get(group, [])]
    )
    assert launch.plugin_list({}, routes=True) == "wanspec,lora,cpu_x"
    assert launch.plugin_list({}, routes=False) is None


def test_without_vllm_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        launch.require_vllm()
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    launch.require_vllm()


@pytest.mark.parametrize(("given", "routes", "wanted"), [("x", True, "x,wanspec"), (None, False, None)])
def test_the_process_is_replaced(
    monkeypatch: pytest.MonkeyPatch, given: str | None, routes: bool, wanted: str | None
) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if given is not None:
        monkeypatch.setenv("VLLM_PLUGINS", given)
    monkeypatch.setenv("SOMETHING", "kept")
    launch.become_vllm_serve(["model", "--port", "1"], routes=routes)
    [(path, command, environment)] = calls
    assert path == sys.executable
    assert command == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "model", "--port", "1"]
    assert environment.get("VLLM_PLUGINS") == wanted
    assert environment["SOMETHING"] == "kept"
