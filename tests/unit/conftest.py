"""What the unit tests share: captured log lines, short waits of the link."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from vllm_wanspec.controller import link

# A busy machine must not fail a property by its slowness.
settings.register_profile("unit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unit")


class LogLines(logging.Handler):
    """Collects what the package logs; pytest's own capture misses it once vLLM has set up the ``vllm`` logger."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def lines(self, level: int = logging.INFO) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno >= level]

    def warnings(self) -> list[str]:
        return self.lines(logging.WARNING)


@pytest.fixture
def log() -> Iterator[LogLines]:
    handler = LogLines()
    logger = logging.getLogger("vllm.wanspec")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-offs and time-outs of the link, in hundredths of a second instead of seconds."""
    monkeypatch.setattr(link, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(link, "MAX_BACKOFF_S", 0.04)
    monkeypatch.setattr(link, "REFUSED_BACKOFF_S", 0.03)
    monkeypatch.setattr(link, "PING_INTERVAL_S", 0.05)
