"""Marked blocks of Markdown pages: what stands between two comments is written by a program, never by hand.

A block begins with ``<!-- figures: NAME -->`` and ends with ``<!-- end -->``, within a line or over several.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

BLOCK = re.compile(r"(<!-- figures: ([a-z0-9 ]+) -->)(.*?)(<!-- end -->)", re.DOTALL)
OPENING = "<!-- figures:"
RESULTS = "results:"
"""Begins the target of a link to a result file, in a text that knows no page yet."""


class UnknownBlock(Exception):
    """A page asks for figures that nobody writes, or a block does not end."""


def blocks(text: str) -> dict[str, str]:
    """Return what a page's blocks say, by name.

    Raises:
        UnknownBlock: A block has no end, or a name that none can have.
    """
    found = BLOCK.findall(text)
    if len(found) != text.count(OPENING):
        raise UnknownBlock(f"{text.count(OPENING)} blocks begin, {len(found)} have a name and an end")
    return {name: said.strip() for _, name, said, _ in found}


def without_blocks(text: str) -> str:
    """Return what people wrote of a page."""
    return BLOCK.sub("", text)


def filled(text: str, writers: Mapping[str, Callable[[], str]], results: str) -> str:
    """Return a page with its blocks written anew.

    Args:
        text: The page as it is.
        writers: What writes the block of each name.
        results: The way from the page to the folder of results, such as ``../docs/results``.

    Raises:
        UnknownBlock: See `blocks`; or a name has no writer.
    """
    unknown = blocks(text).keys() - writers.keys()
    if unknown:
        raise UnknownBlock(f"nobody writes {', '.join(sorted(unknown))}")

    def written(found: re.Match[str]) -> str:
        opening, name, _, end = found.groups()
        said = writers[name]().replace(f"({RESULTS}", f"({results}/")
        return f"{opening}\n{said}\n{end}" if "\n" in said else f"{opening}{said}{end}"

    return BLOCK.sub(written, text)


def way(page: Path, folder: Path) -> str:
    """Return the relative link from a page to a folder."""
    return Path(os.path.relpath(folder, page.parent)).as_posix()
