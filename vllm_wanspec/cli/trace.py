"""``wanspec trace``: one request's life from the event logs of its target and drafter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vllm_wanspec.text import printable
from vllm_wanspec.trace import timeline
from vllm_wanspec.trace.chrome import write_chrome
from vllm_wanspec.trace.page import token_texts, tokens_of, write_page
from vllm_wanspec.trace.target import Figures

PROGRESS_FROM_BYTES = 8 << 20
PLAIN_WIDTH = 140


def trace(
    events: Annotated[
        list[Path],
        typer.Argument(metavar="EVENTS...", help="Event logs of one run: the controller's, the drafters' too."),
    ],
    request: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Request to show, or how its id begins.", show_default="the one with most tokens"
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to put the page.", show_default="the first log's name + .html"),
    ] = None,
    chrome: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a Chrome trace too, of the --request or of all; open it in Perfetto."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Show tokens as texts, by its tokenizer.json.")
    ] = None,
    text: Annotated[bool, typer.Option(help="Print the table of requests.", show_default="without --request")] = True,
) -> None:
    """Show a request's life as a page: steps, drafts on their way, branches, the tree and what was wasted.

    Without --request, prints a table of all requests first.
    """
    with _reading(events, "figures") as progress:
        figures = timeline.summarize(events, progress)
    shown = timeline.find_request(figures, request)
    console = _console()
    if text and request is None:
        print_table(console, figures)
    wanted = figures if chrome is not None and request is None else [shown]
    with _reading(events, "events") as progress:
        timelines = timeline.load(events, wanted, progress)
    chosen = next(entry for entry in timelines if entry.target.figures.id == shown.id)
    texts = token_texts(tokenizer, tokens_of(chosen)) if tokenizer is not None else None
    page = html if html is not None else events[0].with_name(events[0].name + ".html")
    write_page(page, chosen, texts)
    console.print(Text(f"request {printable(shown.id)}: {page}"), soft_wrap=True)
    if chrome is not None:
        write_chrome(chrome, timelines)
        console.print(Text(f"Chrome trace of {_requests(len(timelines))}: {chrome}"), soft_wrap=True)


def print_table(console: Console, figures: Sequence[Figures]) -> None:
    """A line for each request."""
    table = Table(title=_requests(len(figures)), title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("request", overflow="fold")
    table.add_column("drafter", overflow="fold")
    for name in ("tokens", "steps", "tokens per step", "ms per token", "misses", "caught by a branch", "waits"):
        table.add_column(name, justify="right")
    for entry in figures:
        table.add_row(
            Text(printable(entry.id)),
            Text(printable(", ".join(entry.drafters)) or "–"),
            *(f"{count:,}" for count in (entry.tokens, entry.steps)),
            *("–" if value is None else f"{value:.2f}" for value in (entry.tokens_per_step, entry.ms_per_token)),
            *(f"{count:,}" for count in (entry.misses, entry.caught)),
            f"{entry.waits:,} ({1e3 * entry.waited_s:.0f} ms)" if entry.waits else "0",
        )
    console.print(table)


def _console() -> Console:
    """A wide one where nobody's terminal sets the width."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def _requests(count: int) -> str:
    return f"{count:,} request" + ("s" if count != 1 else "")


@contextlib.contextmanager
def _reading(paths: Sequence[Path], what: str) -> Iterator[timeline.Progress | None]:
    """A progress bar on the terminal while big logs are read; else None."""
    total = sum(path.stat().st_size for path in paths if path.is_file())
    console = Console(stderr=True)
    if total < PROGRESS_FROM_BYTES or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("reading {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
