"""Command-line options that measuring commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from vllm_wanspec.errors import ConfigError

__all__ = ["DraftPace", "JsonFile", "LogFolder", "MarkdownFile", "ModelsFolder", "TargetPace", "parse_list"]

ModelsFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder with target/, draft/ and prompts.jsonl.", show_default="examples/demo_models of the checkout"
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything here.")]
MarkdownFile = Annotated[
    Path | None,
    typer.Option("--markdown", metavar="FILE", help="Write the tables here, and the plots, if any, beside it (.png)."),
]
LogFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep the servers' logs here.", show_default="kept only after a failure"),
]
TargetPace = Annotated[str, typer.Option(metavar="MS+MS", help="Duration of a target forward: ms + ms per token.")]
DraftPace = Annotated[str, typer.Option(metavar="MS+MS", help="Duration of a draft forward: ms + ms per token.")]

Item = TypeVar("Item")


def parse_list(option: str, text: str, read: Callable[[str], Item]) -> tuple[Item, ...]:
    """Read the values of a comma-separated list, each once.

    Raises:
        ConfigError: The list is empty, or ``read`` raises ValueError for a part of it.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        values = [read(part) for part in parts]
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a list of numbers, as in 0,10,20") from None
    if not values:
        raise ConfigError(f"{option}: the list is empty")
    return tuple(dict.fromkeys(values))
