"""Writes the event log: JSON lines, from a thread of its own, so that recording never waits for the disk."""

import atexit
import json
import logging
import queue
import threading
import time
from contextlib import suppress
from pathlib import Path

from vllm_wanspec.core.events import Record, header

logger = logging.getLogger("vllm.wanspec.events")

MAX_WAITING = 100_000
CLOSING_TIMEOUT_S = 5.0


class EventLog:
    """One process's event log; `record` may be called from any thread and never raises."""

    def __init__(self, path: str | Path, side: str, name: str) -> None:
        """Append to ``path``; ``side`` is ``controller`` or ``drafter``, ``name`` is the model's, shortened."""
        self._path = Path(path)
        self._waiting: queue.Queue[Record | None] = queue.Queue(MAX_WAITING)
        self._lost = 0
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="wanspec-events", daemon=True)
        self.record(header(side, name.rstrip("/").rpartition("/")[2], wall_s=time.time(), at_s=time.monotonic()))
        self._thread.start()
        atexit.register(self.close)

    def record(self, record: Record) -> None:
        """Take one record; dropped, and counted, where the disk is too slow."""
        if self._ended:
            return
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Write what waits, and end."""
        if self._thread.is_alive():
            with suppress(queue.Full):
                self._waiting.put(None, timeout=CLOSING_TIMEOUT_S)
            self._thread.join(CLOSING_TIMEOUT_S)

    def _run(self) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                while (record := self._waiting.get()) is not None:
                    file.write(json.dumps(record, separators=(",", ":")) + "\n")
                    if self._waiting.empty():
                        file.flush()
        except OSError as error:
            logger.warning("event log %s: %s; no more events are recorded", self._path, error.strerror or error)
        self._ended = True  # nobody takes records any more: do not keep them
        if self._lost:
            logger.warning("event log %s: %d events are missing, the disk was too slow", self._path, self._lost)
