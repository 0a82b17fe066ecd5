"""What people see of answers."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vllm_wanspec.lab.harness.answer_view import ArmView, python_text
from vllm_wanspec.lab.harness.client import Completion
from vllm_wanspec.lab.harness.models import Prompt
from vllm_wanspec.lab.records import Reference


def test_shown_text_has_the_end_of_the_prompt_and_not_too_many_lines() -> None:
    text = python_text("a = 1\nb = 2\nc = 3\ndef f(", "x):\n" + "    pass\n" * 50, lines=10)
    assert text.plain.startswith("b = 2\nc = 3\ndef f(x):\n    pass")
    assert text.plain.endswith("… 44 more lines")
    assert len(text.plain.splitlines()) == 10
    assert text.get_style_at_offset(Console(), 0).dim
    live = python_text("a = 1\nb = 2\nc = 3\ndef f(", "x):\n" + "    pass\n" * 50 + "end", lines=10, keep_end=True)
    assert live.plain.splitlines() == ["    pass"] * 9 + ["end"]


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ((2, 3), "target, cmd: 2 tokens, 40.0 ms per token (plain 80.0), identical"),
        ((2, 4), "target, cmd: 2 tokens, 40.0 ms per token (plain 80.0), different"),
        ((2,), "target, cmd: 1 tokens, one token (plain 80.0), different"),
    ],
)
def test_an_answer_is_shown_beside_the_plain_one(ids: tuple[int, ...], wanted: str) -> None:
    screen = Console(file=io.StringIO(), width=100)
    plain = Reference(0, "cmd", "class Cmd:", (1,), (2, 3), (None, None), 2, 80.0)
    with ArmView(screen, "target", 1, 2, [plain]) as view:
        view.begin(Prompt("cmd", "class Cmd:"))
        view.stream("x", 1)
        view.end(Completion((1,), ids, " pass", 10.0, 50.0, "length"))
    assert isinstance(screen.file, io.StringIO)
    assert wanted in screen.file.getvalue()
    assert "class Cmd: pass" in screen.file.getvalue()


def test_without_plain_texts_an_answer_is_one_line() -> None:
    screen = Console(file=io.StringIO(), width=100)
    with ArmView(screen, "target", 1, 2) as view:
        view.begin(Prompt("cmd", "class Cmd:"))
        view.end(Completion((1,), (2, 3), " pass", 10.0, 50.0, "length"))
    assert isinstance(screen.file, io.StringIO)
    assert screen.file.getvalue() == "target, cmd: 2 tokens, 40.0 ms per token\n"
