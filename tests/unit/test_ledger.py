"""The ledger: every wrap has its entry, and how seams are looked up and wrapped."""

from pathlib import Path
from typing import Any

import pytest

from vllm_wanspec import ledger
from vllm_wanspec.controller import cpu_mends, engine, front
from vllm_wanspec.controller.mrv2 import hooks as mrv2
from vllm_wanspec.controller.v1 import hooks as v1
from vllm_wanspec.drafter import drain, inside
from vllm_wanspec.errors import UnsupportedError

MODULES = (front, cpu_mends, engine, v1, mrv2, inside, drain)


def test_every_entry_says_what_why_how_and_until_when() -> None:
    entries = [wrap for module in MODULES for wrap in module.LEDGER]
    assert len({wrap.target for wrap in entries}) == len(entries)
    for wrap in entries:
        assert all((wrap.target, wrap.why, wrap.how, wrap.until))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_wrap_in_the_code_has_an_entry(module: Any) -> None:
    source = Path(module.__file__).read_text(encoding="utf-8")
    text = " ".join(wrap.target for wrap in module.LEDGER)
    lines = source.splitlines()
    wrapped = {line.split('"')[-2] for line in lines if line.strip().startswith("wrap(") and '"' in line}
    wrapped |= {line.split(" = ")[0].split(".")[-1] for line in lines if line.startswith("    runner.")}
    for name in wrapped:
        assert name in text, name


def test_a_vllm_without_the_module() -> None:
    with pytest.raises(UnsupportedError, match=r"has no vllm_wanspec\.nothing\.GPUModelRunner; use vLLM"):
        ledger.attribute("vllm_wanspec.nothing", "GPUModelRunner")
    with pytest.raises(UnsupportedError, match=r"has no vllm_wanspec\.errors\.Nothing; use vLLM"):
        ledger.attribute("vllm_wanspec.errors", "Nothing")


class Seam:
    def __init__(self) -> None:
        self.known = 1

    def method(self, first: int, second: int = 2) -> int:
        return first + second


def test_what_is_needed_and_there_passes() -> None:
    ledger.need_methods(Seam, ["method"])
    ledger.need_parameters(Seam, "method", ("self", "first"))
    ledger.need_attributes(Seam, ["known"])


@pytest.mark.parametrize(
    ("need", "said"),
    [
        (lambda: ledger.need_methods(Seam, ["method", "absent"]), "has no Seam.absent, which remote drafting wraps"),
        (lambda: ledger.need_parameters(Seam, "absent", ["self"]), "has no Seam.absent, which"),
        (lambda: ledger.need_parameters(Seam, "method", ["self", "x"]), "has another Seam.method than remote drafting"),
        (lambda: ledger.need_attributes(Seam, ["absent"]), "has no Seam.absent, which remote drafting uses"),
    ],
)
def test_what_is_needed_and_is_not_there_is_named(need: Any, said: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        need()
    assert said in str(caught.value)
    assert "use vLLM" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_method_is_wrapped_once_and_one_that_is_not_there_not_at_all() -> None:
    kind = type("Kind", (Seam,), {"method": Seam.method})
    for _ in range(3):
        ledger.wrap(kind, "method", lambda original: lambda self, *args: 10 * original(self, *args))
        ledger.wrap(kind, "absent", lambda original: original)
    assert kind().method(1) == 30
    assert kind.method.__wrapped__ is Seam.method
    assert not hasattr(kind, "absent")


def test_a_method_that_is_given_back_stays() -> None:
    kind = type("Kind", (Seam,), {"method": Seam.method})
    ledger.wrap(kind, "method", lambda original: original)
    assert kind.method is Seam.method
    assert not hasattr(Seam.method, "wanspec")
