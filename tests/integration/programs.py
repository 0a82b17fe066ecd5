"""Programs that end by themselves: run with a deadline, and leave nothing behind."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str
    seconds: float


@dataclass
class Program:
    """A program in a process group of its own; its output goes to files, so that it never blocks."""

    name: str
    argv: Sequence[str]
    env: dict[str, str]
    folder: Path
    core: int | None = None
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        pin = ["taskset", "-c", str(self.core)] if self.core is not None else []
        self.began_s = time.monotonic()
        with self._path("out").open("wb") as out, self._path("err").open("wb") as err:
            self.process = subprocess.Popen(
                [*pin, *self.argv],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,
            )

    def end(self, deadline_s: float) -> Ended:
        """Wait for its end; whatever of its group still runs then is killed.

        Raises:
            subprocess.TimeoutExpired: It was still running ``deadline_s`` seconds from now.
        """
        try:
            code = self.process.wait(deadline_s)
        finally:
            self.kill()
        return Ended(code, self._text("out"), self._text("err"), time.monotonic() - self.began_s)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}"

    def _text(self, kind: str) -> str:
        return self._path(kind).read_text("utf-8", "replace")
