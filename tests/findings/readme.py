"""The repository's own words: its pages, its README by sections, its results."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def page(path: str) -> str:
    """A page with a single space wherever it has any."""
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


def readme() -> str:
    """README.md with a single space wherever it has any."""
    return page("README.md")


def section(title: str) -> str:
    """A section of README.md as it is written."""
    return (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


def words(name: str) -> str:
    """A result's report."""
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def figures(name: str) -> dict[str, Any]:
    """A result's raw numbers."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result
