"""What people see while a target answers prompts: its texts as they come, alone or beside another target's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.text import Text

from vllm_wanspec.lab.harness.client import Completion
from vllm_wanspec.lab.harness.models import Prompt
from vllm_wanspec.lab.harness.view import Onlooker
from vllm_wanspec.lab.records import Reference
from vllm_wanspec.lab.stats import Timed

PROMPT_TAIL_LINES = 3
TEXT_LINES = 14
REFRESHES_PER_S = 8


class ArmView(Onlooker):
    """Shows one target answering prompts: progress bars and the text as it streams.

    Args:
        console: Where to.
        title: The target's name.
        prompts: How many prompts there are.
        max_tokens: Tokens per prompt at most.
        plain: The target's own texts in the order in which the prompts are sent, where answers are to be shown beside
            them; None gives a line about each answer.
    """

    def __init__(
        self, console: Console, title: str, prompts: int, max_tokens: int, plain: Sequence[Reference] | None = None
    ) -> None:
        self.console = console
        self._title = title
        self._max_tokens = max_tokens
        self._plain = None if plain is None else list(plain)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._all = self._progress.add_task(f"{title}: prompts", total=prompts)
        self._current: TaskID | None = None
        self._prompt: Prompt | None = None
        self._text = ""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(
                console=self.console,
                get_renderable=self._render,
                transient=True,
                refresh_per_second=REFRESHES_PER_S,
            )
            self._live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, prompt: Prompt) -> None:
        """A prompt was sent."""
        self._prompt = prompt
        self._text = ""
        self._current = self._progress.add_task(f"{self._title}: {prompt.module}", total=self._max_tokens)

    def stream(self, text: str, tokens: int) -> None:
        """Text of some tokens arrived."""
        self._text += text
        if self._current is not None:
            self._progress.advance(self._current, tokens)

    def end(self, completion: Completion) -> None:
        """The answer is complete: print its text beside the target's own, or one line about it."""
        if self._prompt is None or self._current is None:
            return
        self._progress.remove_task(self._current)
        self._progress.advance(self._all)
        pace = f"{completion.tpot_ms:.1f} ms per token" if completion.tpot_ms is not None else "one token"
        line = f"{self._title}, {self._prompt.module}: {len(completion.token_ids)} tokens, {pace}"
        if self._plain is None:
            self.console.print(Text(line))
        else:
            shown = python_text(self._prompt.text, completion.text)
            title = Text(line + _beside(self._plain.pop(0), completion))
            self.console.print(Panel(shown, title=title, title_align="left"))
        self._prompt = self._current = None

    def _render(self) -> RenderableType:
        if self._prompt is None:
            return self._progress
        return Group(self._progress, Panel(python_text(self._prompt.text, self._text, keep_end=True)))


def _beside(plain: Reference, completion: Completion) -> str:
    """How an answer compares with the target's own text."""
    alone_ms = Timed(plain.time_ms, len(plain.expected) - 1).per_token_ms
    pace = "" if alone_ms is None else f" (plain {alone_ms:.1f})"
    return f"{pace}, {'identical' if completion.token_ids == plain.expected else 'different'}"


def python_text(prompt: str, continuation: str, lines: int = TEXT_LINES, keep_end: bool = False) -> Text:
    """Return Python source as coloured text: the prompt's last lines dimmed, then the continuation.

    Args:
        prompt: What was sent.
        continuation: What came back so far.
        lines: Longest result in lines.
        keep_end: Drop lines at the top of a longer text; else at its end, and a last line says so.
    """
    tail = "\n".join(prompt.splitlines()[-PROMPT_TAIL_LINES:]) + ("\n" if prompt.endswith("\n") else "")
    text = Syntax("", "python", theme="ansi_dark", background_color="default").highlight(tail + continuation)
    text.stylize("dim", 0, len(tail))
    text.rstrip()
    rows = text.split("\n")
    if len(rows) <= lines:
        return text
    kept = rows[-lines:] if keep_end else [*rows[: lines - 1], Text(f"… {len(rows) - lines + 1} more lines", "dim")]
    return Text("\n").join(kept)
