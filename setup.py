"""The one thing that pyproject.toml cannot say: README.md as a package index shows it, with links that work there."""

import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s]+)\)")


def absolute_links(markdown: str, repository: str, tag: str) -> str:
    """Put relative links and images below the repository's address, at a tag; the page's own anchors stay."""

    def absolute(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        if urlsplit(target).scheme or target.startswith("#"):
            return found[0]
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/{tag}/{target})"

    return LINK.sub(absolute, markdown)


def long_description() -> str:
    """Return README.md with its links pointing at what the repository has at this version's tag."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    init = (ROOT / "vllm_wanspec" / "__init__.py").read_text("utf-8")
    version = re.search(r'^__version__ = "([^"]+)"', init, re.MULTILINE)[1]
    return absolute_links((ROOT / "README.md").read_text("utf-8"), project["urls"]["Homepage"], f"v{version}")


if __name__ == "__main__":  # as build tools run it; a test imports the functions
    from setuptools import setup

    setup(long_description=long_description(), long_description_content_type="text/markdown")
