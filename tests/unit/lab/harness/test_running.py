"""What a measuring command says where something is missing."""

import sys
from pathlib import Path

import pytest

from vllm_wanspec.errors import UnsupportedError
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.running import check_needs


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with the base install alone."""
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed: get it")
    monkeypatch.setattr(machine, "checkout", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("bare")
def test_one_line_names_all_that_is_missing() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_needs(instead_of_demo_models="--models DIR", plots=True)
    vllm, models, plots = str(caught.value).split("; ")
    assert vllm == "vLLM is not installed: get it"
    assert "give --models DIR" in models
    assert "pip install 'vllm-wanspec[lab]'" in plots
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("bare")
def test_only_what_is_needed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"^vLLM is not installed: get it$"):
        check_needs(instead_of_demo_models=None)
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    check_needs(instead_of_demo_models=None)
    with pytest.raises(UnsupportedError, match=r"^the demo models are not here"):
        check_needs(instead_of_demo_models="--models DIR")
    with pytest.raises(UnsupportedError, match=r"^matplotlib is not installed"):
        check_needs(instead_of_demo_models=None, plots=True)


def test_a_checkout_has_the_demo_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    check_needs(instead_of_demo_models="--models DIR")
