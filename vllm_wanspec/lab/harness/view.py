"""What people see while something long runs: servers coming up, requests going on, and how far it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

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


class StartView:
    """A line per server: a spinner with seconds until it is ready."""

    def __init__(self, console: Console, servers: Sequence[Server]) -> None:
        self._console = console
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        # Only a terminal can redraw lines; elsewhere the lines of `ready` have to do.
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks = {server.name: self.progress.add_task(f"starting {server.name}", total=1) for server in servers}

    def ready(self, server: Server) -> None:
        """Note that a server answers."""
        self.progress.update(self._tasks[server.name], visible=False, completed=1)
        seconds = server.ready_after_s or 0.0
        self.progress.console.print(f"{server.name} is ready after {seconds:.0f} s", highlight=False)


@contextlib.contextmanager
def starting(console: Console, servers: Sequence[Server]) -> Iterator[StartView]:
    """Show servers that are starting, until the block ends."""
    view = StartView(console, servers)
    with view.progress:
        yield view


class Onlooker:
    """Is told of requests as they go on; this one shows nothing."""

    def begin(self, prompt: Prompt) -> None:
        """A prompt was sent."""

    def stream(self, text: str, tokens: int) -> None:
        """Text of some tokens arrived."""

    def end(self, completion: Completion) -> None:
        """The answer is complete."""


NOBODY = Onlooker()
