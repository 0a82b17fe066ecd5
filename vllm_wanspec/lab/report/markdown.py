"""Documents as Markdown pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_wanspec.lab.report.document import Document


def markdown(document: Document, picture: str | None = None) -> str:
    """Return the page; ``picture`` is the file name of the plots beside it, if there are any."""
    parts = [f"# {document.title}", *(f"**{text}**" for text in document.warnings), *document.remarks]
    parts += [f"![{document.plots}]({picture})"] if picture else []
    for table in document.tables:
        parts += [f"{'#' * table.level} {table.title}", *([document.conditions] if document.conditions else [])]
        parts += [markdown_table(table.titles, table.rows, table.keys)]
        parts += [*table.remarks, *([table.note] if table.note else [])]
    parts += ["## How it was measured", *document.method, document.provenance]
    return "\n\n".join(parts) + "\n"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], keys: int = 1) -> str:
    """Return a table whose first ``keys`` columns are flush left."""
    rules = ["---"] * keys + ["---:"] * (len(titles) - keys)
    lines = [titles, rules, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
