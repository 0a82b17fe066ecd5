"""A result for people as one value, from which console, Markdown and plots are written alike.

Each bench says what its document holds; nothing else knows how tables look. Texts are plain, never markup.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Column = tuple[str, Callable[[Item], str]]
"""A column's title, and what stands in it for one row."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table, and the sentences that belong to it.

    Attributes:
        title: What it shows.
        titles: Of the columns.
        rows: Cells.
        keys: So many columns at the left say what a row is about.
        note: What the columns mean; comes after it in Markdown alone.
        remarks: What it shows, in sentences.
        wrong: Numbers of the rows that mean nothing, or something bad.
        level: Of its heading in Markdown: 2, or 3 for one that belongs to the table before.
    """

    title: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1
    note: str = ""
    remarks: Sequence[str] = ()
    wrong: Collection[int] = ()
    level: int = 2


@dataclass(frozen=True, slots=True)
class Document:
    """A bench's result.

    Attributes:
        title: What was asked.
        tables: The answer.
        warnings: Why the figures may mean nothing; the first thing that a reader of the page sees.
        remarks: What the tables mean.
        method: How it was measured, a paragraph each.
        provenance: Command, machine, versions, commit.
        plots: What the picture beside the page shows; empty: there is none.
        conditions: What stands above every table: what each arm has, and the paces; may be empty.
    """

    title: str
    tables: Sequence[Table]
    warnings: Sequence[str]
    remarks: Sequence[str]
    method: Sequence[str]
    provenance: str
    plots: str = ""
    conditions: str = ""


def table_of(
    title: str,
    columns: Sequence[Column[Item]],
    items: Sequence[Item],
    keys: int = 1,
    *,
    note: str = "",
    wrong: Callable[[Item], bool] = lambda item: False,
) -> Table:
    """Return the table with a row per item; ``wrong`` says which of them are."""
    rows = [[text(item) for _, text in columns] for item in items]
    places = [place for place, item in enumerate(items) if wrong(item)]
    return Table(title, [name for name, _ in columns], rows, keys, note, wrong=places)
