"""Command-line options that measuring commands share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from vllm_wanspec.errors import ConfigError

ModelsFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder with target/, draft/, prompts.jsonl and bench_prompts.jsonl.",
        show_default="examples/demo_models of the checkout",
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


def listed(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Read names as in ``"steady,churning"``; one that comes twice counts once.

    Raises:
        ConfigError: Another name than the known ones, or none.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(names) <= set(known):
        raise ConfigError(f"{option}: {text!r} is not a list of {' and '.join(known)}")
    return names


def parse_widths(text: str) -> tuple[int, ...]:
    """Read ``"1,8,16"``.

    Raises:
        ConfigError: Not different numbers from 1 to 1024.
    """
    try:
        widths = [int(part) for part in text.split(",")]
    except ValueError:
        widths = []
    if not widths or len(set(widths)) < len(widths) or not all(1 <= width <= 1024 for width in widths):
        raise ConfigError(f"--widths: {text!r} is not a list of different numbers from 1 to 1024, as in 1,8,16")
    return tuple(sorted(widths))


def parse_list(
    option: str, text: str, read: Callable[[str], Item], form: str = "of numbers, as in 0,10,20"
) -> tuple[Item, ...]:
    """Read the values of a comma-separated list, each once; ``form`` says of what.

    Raises:
        ConfigError: The list is empty, or ``read`` raises ValueError for a part of it.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        values = [read(part) for part in parts]
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a list {form}") from None
    if not values:
        raise ConfigError(f"{option}: the list is empty")
    return tuple(dict.fromkeys(values))
