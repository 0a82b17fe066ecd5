"""Write the generated parts of the pages: figures from ``docs/results``, states from the code (``make docs``)."""

from __future__ import annotations

import sys
from pathlib import Path

from pages.blocks import filled, way
from pages.results import Results
from pages.writers import writers

from vllm_wanspec.core.states import states_markdown

ROOT = Path(__file__).resolve().parents[1]
STATES = Path("docs", "reference", "states.md")


def pages(root: Path) -> list[Path]:
    """Return the pages that may have figures; results speak of runs of their own."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in found if page.parent != root / "docs" / "results"]


def generated(root: Path) -> dict[Path, str]:
    """Return what each page should be.

    Raises:
        UnknownBlock: A page asks for figures that nobody writes.
        FileNotFoundError: A result file is missing.
    """
    results = root / "docs" / "results"
    makers = writers(Results(results))
    texts = {page: filled(page.read_text(encoding="utf-8"), makers, way(page, results)) for page in pages(root)}
    return texts | {root / STATES: states_markdown()}


def main() -> int:
    """Write what has changed, and name it."""
    for page, text in generated(ROOT).items():
        if page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
