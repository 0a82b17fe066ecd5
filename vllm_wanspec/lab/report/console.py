"""Documents on the console."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from vllm_wanspec.lab.report.cells import MARKS
from vllm_wanspec.lab.report.document import Document, Table

#: What a column takes beside its text.
COLUMN_MARGIN = 3
MARK_STYLES = {MARKS[True]: "green", MARKS[False]: "bold red"}


def print_document(document: Document, console: Console) -> None:
    """Print tables, method and remarks, and last, where a person looks, the warnings.

    A cell or remark that ends with a mark has its colour.
    """
    for table in document.tables:
        for part in _rich_tables(table, console.width):
            console.print(part)
        if document.conditions:
            console.print(escape(document.conditions), style="dim", highlight=False)
        for text in table.remarks:
            console.print(_marked(text), style="bold", highlight=False)
    for text in document.method:
        console.print(escape(text), highlight=False)
    for text in document.remarks:
        console.print(_marked(text), style="bold", highlight=False)
    console.print(escape(document.provenance), style="dim", highlight=False)
    for text in document.warnings:
        console.print(escape(text), style="bold red", highlight=False)


def _rich_tables(table: Table, width: int) -> Iterator[RichTable]:
    """The table; where it is too wide, in parts that all begin with the key columns."""
    columns = list(zip(table.titles, *table.rows, strict=True))
    if sum(max(map(len, column)) + COLUMN_MARGIN for column in columns) < width:
        yield _rich_table(table.title, columns, {}, table)
        return
    # Titles may be broken between words, figures never.
    widths = {name: max(map(len, (*name.split(), *cells))) for name, *cells in columns}
    keys, rest, title = columns[: table.keys], columns[table.keys :], table.title
    room = width - 1 - sum(widths[key[0]] + COLUMN_MARGIN for key in keys)
    figures = [widths[name] + COLUMN_MARGIN for name, *_ in rest]
    lack = min(sum(figures), max(width // 2, *figures)) - room
    if lack > 0:  # the last key may be a sentence, which may be broken, between words
        name, *cells = keys[-1]
        lack = min(lack, widths[name] - max(len(word) for text in (name, *cells) for word in text.split() or [""]))
        widths[name] -= lack
        room += lack
    while rest:
        count, used = 0, 0
        while count < len(rest) and (used := used + widths[rest[count][0]] + COLUMN_MARGIN) <= room:
            count += 1
        part, rest = rest[: max(1, count)], rest[max(1, count) :]
        yield _rich_table(title, [*keys, *part], widths, table)
        title = f"{table.title}, continued"


def _rich_table(title: str, columns: Sequence[Sequence[str]], widths: Mapping[str, int], table: Table) -> RichTable:
    made = RichTable(title=title, title_justify="left")
    for place, (name, *_) in enumerate(columns):
        made.add_column(name, justify="right" if place >= table.keys else "left", width=widths.get(name))
    for place, row in enumerate(zip(*(cells for _, *cells in columns), strict=True)):
        made.add_row(*map(_marked, row), style="red" if place in table.wrong else None)
    return made


def _marked(text: str) -> str:
    style = MARK_STYLES.get(text[-1:])
    return f"[{style}]{escape(text)}[/]" if style else escape(text)
