"""Command-line options that measuring commands share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["DraftPace", "JsonFile", "LogFolder", "MarkdownFile", "ModelsFolder", "TargetPace"]

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
