"""The Markdown pages: what they link to, and the files and commands that they name, are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
NAMED = re.compile(r"`([\w./-]+\.(?:html|md|py|toml))`")
MODULE = re.compile(r"python -m (vllm_wanspec[\w.]*)")
MAKE = re.compile(r"`make ([a-z-]+)`")
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
FILES = [
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*"),
        *(file for room in ("docs", "examples", "tests", "vllm_wanspec") for file in (ROOT / room).rglob("*")),
    ]
]
#: Those that speak of the code as it is, not of a release or run of its own.
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "results"]
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives the page's headings."""
    headings = HEADING.findall(page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text("utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_commands_that_are_named_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in NAMED.findall(text):
        assert any(f"/{file}".endswith(f"/{name}") for file in FILES), name
    for module in MODULE.findall(text):
        assert f"{module.rstrip('.').replace('.', '/')}.py" in FILES, module
    assert set(MAKE.findall(text)) <= set(TARGET.findall((ROOT / "Makefile").read_text("utf-8")))


def test_the_pages_at_the_top_are_looked_at() -> None:
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"} <= {page.name for page in PAGES}
