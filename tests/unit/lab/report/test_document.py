"""Documents: one small result on the console, as a Markdown page, and as files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.harness.running import Outputs
from vllm_wanspec.lab.report.console import print_document
from vllm_wanspec.lab.report.document import Document, Table, table_of
from vllm_wanspec.lab.report.markdown import markdown
from vllm_wanspec.lab.report.writing import Publication, json_text

WIDE = Table("Wide", ["case", *(f"figure number {index}" for index in range(6))], [["a", *("12345",) * 6]])
SPEEDS = table_of(
    "Speeds",
    [("case", lambda item: item[0]), ("ms", lambda item: f"{item[1]:.1f}"), ("bar", lambda item: item[2])],
    [("a|b [x]", 1.0, "≤ 2 ✓"), ("slow", 9.0, "≤ 2 ✗")],
    note="Columns mean this.",
    wrong=lambda item: item[1] > 5.0,
)


def document(*tables: Table, plots: str = "") -> Document:
    return Document(
        "What is asked", tables, ["DISTURBED: again."], ["all held ✓"], ["Done so."], "here; now.", plots, "not paced"
    )


def shown(found: Document, width: int, colours: bool = False) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=colours, color_system="standard" if colours else None)
    print_document(found, console)
    return output.getvalue()


def test_the_console_ends_with_the_warnings() -> None:
    text = shown(document(SPEEDS), 100)
    assert text.splitlines()[0].strip() == "Speeds"
    assert "a|b [x]" in text
    assert "Columns mean" not in text
    lines = text.splitlines()
    assert lines[-5] == "not paced"  # under every table
    assert lines[-4:] == ["Done so.", "all held ✓", "here; now.", "DISTURBED: again."]


def test_marks_and_wrong_rows_have_their_colours() -> None:
    lines = shown(document(SPEEDS), 100, colours=True).splitlines()
    green, red = "\x1b[32m≤ 2 ✓", "\x1b[1;31m≤ 2 ✗"
    assert any(green in line for line in lines)
    assert any(red in line and "\x1b[31m" in line for line in lines)
    assert any("\x1b[1;32mall held ✓" in line for line in lines)
    assert "\x1b[1;31mDISTURBED" in lines[-1]


def test_a_table_that_is_too_wide_is_printed_in_parts() -> None:
    text = shown(document(WIDE), 40)
    assert "Wide\n" in text.replace(" ", "")
    assert "Wide, continued" in text
    assert text.count("12345") == 6
    assert text.count("case") == text.count("Wide") > 1  # each part begins with the key column
    assert all(len(line) <= 40 for line in text.splitlines())
    assert "continued" not in shown(document(WIDE), 200)


def test_a_page_begins_with_the_warnings() -> None:
    page = markdown(document(SPEEDS, plots="Two curves."), "page.png")
    assert page.startswith("# What is asked\n\n**DISTURBED: again.**\n\nall held ✓\n\n![Two curves.](page.png)\n\n")
    assert "## Speeds\n\nnot paced\n\n| case | ms | bar |\n| --- | ---: | ---: |\n| a\\|b [x] | 1.0 | ≤ 2 ✓ |\n" in page
    assert page.endswith("Columns mean this.\n\n## How it was measured\n\nDone so.\n\nhere; now.\n")
    assert "![" not in markdown(document(SPEEDS))


def test_what_is_published(tmp_path: Path) -> None:
    console, drawn = Console(file=io.StringIO(), width=100), []

    def draw(path: Path) -> bool:
        drawn.append(path)
        return True

    outputs = Outputs(tmp_path / "new" / "o.json", tmp_path / "o.md")
    made = Publication(document(SPEEDS, plots="Curves."), {"a": "µ", "many": [[1, 2], [3]]}, draw=draw)
    made.publish(outputs, console)
    assert json.loads((tmp_path / "new" / "o.json").read_text("utf-8")) == {"a": "µ", "many": [[1, 2], [3]]}
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["o.json"]
    assert "![Curves.](o.png)" in (tmp_path / "o.md").read_text("utf-8")
    Publication(document(SPEEDS), {}, draw=draw).publish(Outputs(markdown_path=tmp_path / "o.md"), console)
    assert drawn == [tmp_path / "o.png"]  # a page without plots draws nothing
    with pytest.raises(WanspecError, match="--json: cannot write"):
        Publication(document(SPEEDS), {}).publish(Outputs(tmp_path / "new"), console)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "o.md"]


def test_long_lists_get_a_line_for_each_entry() -> None:
    text = json_text({"a": 1, "many": [{"b": 2}, {"b": 3}]}, flat=["many"])
    assert text == '{\n "a": 1,\n "many": [\n  {"b": 2},\n  {"b": 3}\n ]\n}\n'
