"""What people see while something long runs: servers coming up, requests going on, and how far it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vllm_wanspec.lab.harness.client import Completion
from vllm_wanspec.lab.harness.models import Prompt
from vllm_wanspec.lab.harness.servers import Server


def progress_bar(console: Console, auto_refresh: bool = True) -> Progress:
    """Return a progress bar with the time that remains; gone at its end, and not there without a terminal.

    Without ``auto_refresh`` it is drawn where its caller says so: a thread that draws takes the interpreter.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = (*columns, TimeElapsedColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    return Progress(*shown, console=console, transient=True, disable=hidden, auto_refresh=auto_refresh)


@contextlib.contextmanager
def starting(console: Console, servers: Sequence[Server]) -> Iterator[Callable[[Server], None]]:
    """Show a line per server, a spinner with seconds; what is yielded is called with each server that answers."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Only a terminal can redraw lines; elsewhere the lines of `ready` have to do.
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks = {server.name: progress.add_task(f"starting {server.name}", total=1) for server in servers}

    def ready(server: Server) -> None:
        progress.update(tasks[server.name], visible=False, completed=1)
        console.print(f"{server.name} is ready after {server.ready_after_s or 0.0:.0f} s", highlight=False)

    with progress:
        yield ready


class Onlooker:
    """Is told of requests as they go on; this one shows nothing."""

    def begin(self, prompt: Prompt) -> None:
        """A prompt was sent."""

    def stream(self, text: str, tokens: int) -> None:
        """Text of some tokens arrived."""

    def end(self, completion: Completion) -> None:
        """The answer is complete."""


NOBODY = Onlooker()
