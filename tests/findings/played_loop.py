"""An event loop whose time is played: whenever nothing is ready it is at once the time of the next timer."""

import asyncio
from collections.abc import Coroutine


class PlayedLoop(asyncio.SelectorEventLoop):
    """For code that has no sockets: an hour of waiting takes no time, and every run is the same."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now_s = max(self._now_s, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def played(main: Coroutine[None, None, None]) -> None:
    """Run a scenario on played time."""
    with asyncio.Runner(loop_factory=PlayedLoop) as runner:
        runner.run(main)


def now_s() -> float:
    """The running loop's time."""
    return asyncio.get_running_loop().time()
