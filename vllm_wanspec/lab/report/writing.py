"""Writing results: one way to console, JSON, Markdown, pictures and exit status for all benches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import typer
from rich.console import Console

from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.harness.running import (
    Outputs,
    check_outputs,
    console_of_this_run,
    one_line_errors,
    write_output,
)
from vllm_wanspec.lab.report.console import print_document
from vllm_wanspec.lab.report.document import Document
from vllm_wanspec.lab.report.markdown import markdown


class Result(Protocol):
    """What a bench has found."""

    @property
    def held(self) -> bool:
        """Whether all bars are known to be kept."""

    def as_json(self) -> dict[str, Any]:
        """Return what the result file has beside where it comes from."""


Found = TypeVar("Found", bound=Result)


def measured(
    program: str,
    measure: Callable[[Console], Found],
    document: Callable[[Found, Provenance], Document],
    outputs: Outputs,
    check: bool,
) -> None:
    """Run a measuring command as a whole: measure, print, write, and say by the exit status how it went.

    Args:
        program: The command, such as ``python -m PACKAGE.width``, whose last word people call the bench by.
        measure: Reads the options and measures; shows progress on a console.
        document: Makes what people read of what was found and where.
        outputs: Where to write.
        check: Whether a bar that is missed, or not known to be kept, is a failure.

    Raises:
        typer.Exit: The command failed, was interrupted, or missed a bar; see `one_line_errors`.
    """
    console, began_s = console_of_this_run(), time.monotonic()
    with one_line_errors(f"bench-{program.rpartition('.')[2]}"):
        check_outputs(outputs)
        begun = Provenance.of_this_run(program)
        found = measure(console)
        provenance = begun.after(time.monotonic() - began_s)
        data = found.as_json() | provenance.as_json()
        Publication(document(found, provenance), data).publish(outputs, console)
    if check and not found.held:
        raise typer.Exit(1)


class Publication(NamedTuple):
    """What is published of a result.

    Attributes:
        document: For people.
        data: For programs: the result file's content.
        flat: Lists of it that get one line for each of their many entries.
        draw: Writes the picture of a page to a path; False where it cannot (no matplotlib) or has nothing to draw.
    """

    document: Document
    data: dict[str, Any]
    flat: Collection[str] = ()
    draw: Callable[[Path], bool] = lambda path: False

    def publish(self, outputs: Outputs, console: Console) -> None:
        """Print it, and write the files that ``outputs`` names.

        Raises:
            WanspecError: A file cannot be written.
        """
        print_document(self.document, console)
        if outputs.json_path is not None:
            write_output("--json", outputs.json_path, json_text(self.data, self.flat))
        if outputs.markdown_path is not None:
            picture = outputs.markdown_path.with_suffix(".png")
            drawn = bool(self.document.plots) and self.draw(picture)
            write_output("--markdown", outputs.markdown_path, markdown(self.document, picture.name if drawn else None))


def json_text(data: Mapping[str, Any], flat: Collection[str] = ()) -> str:
    """Return the text of a result file."""
    text = json.dumps(dict(data) | {name: [] for name in flat}, indent=1, ensure_ascii=False)
    for name in flat:
        lines = ",\n  ".join(json.dumps(one, ensure_ascii=False) for one in data[name])
        text = text.replace(f'\n "{name}": []', f'\n "{name}": [\n  {lines}\n ]', 1)
    return text + "\n"
