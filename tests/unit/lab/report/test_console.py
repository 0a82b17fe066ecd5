"""Documents on the console."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vllm_wanspec.lab.report.console import print_document
from vllm_wanspec.lab.report.document import Document, Table

SENTENCE = "time per token of the one divided by that of the other, at this distance"


def printed(table: Table, width: int) -> list[str]:
    screen = Console(file=io.StringIO(), width=width)
    print_document(Document("title", [table], [], [], [], "here"), screen)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [50, 70, 90])
def test_a_sentence_among_the_keys_is_broken_before_any_figure(width: int) -> None:
    table = Table("bars", ("", "what", "at most", "is"), [("✓", SENTENCE, "0.900", "0.763 (0.742–0.780)")], keys=2)
    lines = printed(table, width)
    assert max(map(len, lines)) <= width
    assert any("0.763 (0.742–0.780)" in line for line in lines)
    assert any("0.900" in line for line in lines)
    cells = [line.split("│")[2].strip() for line in lines if line.count("│") > 2]
    assert SENTENCE in " ".join(cells)
