"""Step pacing: give a tiny model the step time of a large one.

The model forward alone is stretched, by sleeping, to ``base + per_token * tokens`` milliseconds;
scheduling, drafting and transport come on top and stay visible.  vLLM is imported only when pacing
is installed.  A real forward that takes longer than its pace is counted as an overrun: a run with
more than 1 % of them says nothing about the paced hardware.

This module must not change what a forward computes.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing import util as multiprocessing_util
from pathlib import Path
from typing import Any

from vllm_wanspec.errors import ConfigError, UnsupportedError

PACING_ENV = "WANSPEC_PACING"
DRAFT_PACING_ENV = "WANSPEC_DRAFT_PACING"
STATS_ENV = "WANSPEC_PACING_STATS"
STATS_INTERVAL_S = 1.0
MAX_BASE_MS = 60_000.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pacing:
    """The emulated duration of one forward.

    Args:
        base_ms: Milliseconds that every forward takes.
        per_token_ms: Milliseconds that each token (row) in the step adds.
    """

    base_ms: float
    per_token_ms: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("base_ms", self.base_ms), ("per_token_ms", self.per_token_ms)):
            if not 0.0 <= value <= MAX_BASE_MS:  # also refuses nan
                raise ConfigError(f"pacing: {name} is {value!r}, expected 0 to {MAX_BASE_MS:g} milliseconds")

    @classmethod
    def parse(cls, text: str, source: str = "pacing") -> Pacing:
        """Read ``"35+0.1"`` (milliseconds + milliseconds per token) or ``"35"``.

        Args:
            text: The setting.
            source: Name of the setting, for the error message.

        Raises:
            ConfigError: The text is not one or two numbers joined by ``+``, or out of range.
        """
        parts = text.split("+")
        try:
            if len(parts) > 2:
                raise ValueError
            return cls(*map(float, parts))
        except ValueError:
            expected = "milliseconds+milliseconds per token, as in 35+0.1"
            raise ConfigError(f"{source}: {text!r} is not a pace, expected {expected}") from None
        except ConfigError as error:
            raise ConfigError(f"{source}: {text!r}: {error}") from None

    def step_ms(self, tokens: int) -> float:
        """Return the milliseconds that a forward of ``tokens`` rows takes."""
        return self.base_ms + self.per_token_ms * tokens

    def scaled(self, factor: float) -> Pacing:
        """Return the pace of forwards that take ``factor`` times as long.

        Raises:
            ConfigError: They would take longer than a pace may.
        """
        return Pacing(self.base_ms * factor, self.per_token_ms * factor)

    def __str__(self) -> str:
        return f"{self.base_ms:g} ms + {self.per_token_ms:g} ms per token"

    @property
    def setting(self) -> str:
        """The text that :meth:`parse` reads."""
        return f"{self.base_ms!r}+{self.per_token_ms!r}"


@dataclass(slots=True)
class PacingStats:
    """What was paced so far: forwards, those whose real work exceeded the pace, and both sums."""

    steps: int = 0
    overruns: int = 0
    paced_ms_total: float = 0.0
    work_ms_total: float = 0.0

    def as_json(self) -> dict[str, float]:
        """Return the fields of the statistics file."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


class Pacer:
    """Runs forwards no faster than a pace, and keeps count.

    Args:
        pacing: The pace.
        stats_path: File that receives the counts as JSON; None writes nothing.
        stats_interval_s: Seconds between writes, which a thread does, never a forward.
        clock: Monotonic seconds.
        sleep: Sleeps for that many seconds.

    Attributes:
        stats: The counts.
        draft_stats: Those of a co-located draft model, written beside them as ``draft_steps`` and ``draft_overruns``.
    """

    def __init__(
        self,
        pacing: Pacing,
        stats_path: Path | None = None,
        stats_interval_s: float = STATS_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.pacing = pacing
        self.stats = PacingStats()
        self._stats_path = stats_path
        self._clock = clock
        self._sleep = sleep
        self._stats_interval_s = stats_interval_s
        self._written_steps = 0
        self.draft_stats: PacingStats | None = None

    def run(self, forward: Callable[[], Any], tokens: int) -> Any:
        """Call ``forward`` and return its result, not before the pace of ``tokens`` rows has passed."""
        started_s = self._clock()
        result = forward()
        work_ms = (self._clock() - started_s) * 1000.0
        pace_ms = self.pacing.step_ms(tokens)
        if work_ms < pace_ms:
            self._sleep((pace_ms - work_ms) / 1000.0)
        if self.stats.steps == 0 and self._stats_path is not None:
            self._start_writing()
        self.stats.steps += 1
        self.stats.overruns += work_ms > pace_ms
        self.stats.paced_ms_total += pace_ms
        self.stats.work_ms_total += work_ms
        return result

    def _start_writing(self) -> None:
        """Write from now on; not earlier, because a fork after installation forgets threads and exit functions."""
        threading.Thread(target=self._keep_writing, name="wanspec-pacing-stats", daemon=True).start()
        atexit.register(self.write_stats)
        # vLLM's engine process is a multiprocessing child, where atexit functions may not run.
        multiprocessing_util.Finalize(None, self.write_stats, exitpriority=10)

    def _keep_writing(self) -> None:
        while self._stats_path is not None:
            time.sleep(self._stats_interval_s)
            if self.stats.steps != self._written_steps:
                self.write_stats()

    def write_stats(self) -> None:
        """Write the counts atomically; a process that paced nothing leaves the file alone."""
        path = self._stats_path
        if path is None or not self.stats.steps:
            return
        scratch = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            self._written_steps = self.stats.steps
            counts = self.stats.as_json()
            if self.draft_stats is not None:
                counts |= {"draft_steps": self.draft_stats.steps, "draft_overruns": self.draft_stats.overruns}
            scratch.write_text(json.dumps(counts), "utf-8")
            scratch.replace(path)
        except OSError as error:
            logger.warning("cannot write pacing statistics to %s (%s); giving up on them", path, error)
            self._stats_path = None


def install_from_env(environ: Mapping[str, str] = os.environ) -> Pacer | None:
    """Pace this process's forwards if ``WANSPEC_PACING`` asks for it, and a co-located draft model's.

    ``WANSPEC_DRAFT_PACING`` is for the latter; it needs the former.

    Returns:
        The pacer in use, or None when the variable is unset or empty.

    Raises:
        ConfigError: The variable is not a pace.
        UnsupportedError: The installed vLLM has no forward to wrap.
    """
    setting = environ.get(PACING_ENV, "").strip()
    if not setting:
        return None
    stats_path = environ.get(STATS_ENV, "").strip()
    pacer = install(Pacing.parse(setting, PACING_ENV), Path(stats_path) if stats_path else None)
    draft_setting = environ.get(DRAFT_PACING_ENV, "").strip()
    if draft_setting:
        pacer.draft_stats = install_draft(Pacing.parse(draft_setting, DRAFT_PACING_ENV)).stats
    return pacer


def install(pacing: Pacing, stats_path: Path | None = None, runner_class: Any = None) -> Pacer:
    """Wrap the model forward of vLLM's model runner, or of another class; return the pacer in use, the first one.

    Only ``execute_model`` calls the wrapped method, so vLLM's profile and dummy runs are not paced.  The counts go to
    the file at ``stats_path``.

    Raises:
        UnsupportedError: The class has no ``_model_forward``.
    """
    if runner_class is None:
        runner_class = importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    original = getattr(runner_class, "_model_forward", None)
    if original is None:
        raise UnsupportedError("pacing: this vLLM's GPUModelRunner has no _model_forward to stretch")
    if isinstance(installed := getattr(original, "wanspec_pacer", None), Pacer):
        return installed
    pacer = Pacer(pacing, stats_path)

    def paced_forward(runner: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(pacer, functools.partial(original, runner), args, kwargs)

    paced_forward.wanspec_pacer = pacer  # type: ignore[attr-defined]
    runner_class._model_forward = paced_forward
    logger.info("pacing: every model forward takes at least %s", pacing)
    return pacer


def install_draft(pacing: Pacing, proposer_class: Any = None) -> Pacer:
    """Wrap the forward of the draft model that vLLM's or another class loads beside the target; else as `install`."""
    if proposer_class is None:
        proposer_class = importlib.import_module("vllm.v1.spec_decode.draft_model").DraftModelProposer
    load_model = proposer_class.load_model
    if isinstance(installed := getattr(load_model, "wanspec_pacer", None), Pacer):
        return installed
    pacer = Pacer(pacing)

    def paced_load_model(proposer: Any, *args: Any, **kwargs: Any) -> None:
        load_model(proposer, *args, **kwargs)
        original = proposer.model.forward
        proposer.model.forward = lambda *inputs, **named: _run(pacer, original, inputs, named)

    paced_load_model.wanspec_pacer = pacer  # type: ignore[attr-defined]
    proposer_class.load_model = paced_load_model
    logger.info("pacing: every forward of the draft model beside the target takes at least %s", pacing)
    return pacer


def _run(pacer: Pacer, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a model's forward at the pace of the rows in its arguments."""
    rows = _input_rows(args, kwargs)

    def forward() -> Any:
        result = original(*args, **kwargs)
        _wait_for_device(rows)
        return result

    return pacer.run(forward, 0 if rows is None else int(rows.shape[-1]))


def _input_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the tensor whose last axis counts the step's tokens (positions are [tokens] or [3, tokens])."""
    names = ("input_ids", "positions")
    by_name = dict(zip(names, args, strict=False)) | dict(kwargs)
    return next((by_name[name] for name in names if by_name.get(name) is not None), None)


def _wait_for_device(rows: Any) -> None:
    """A GPU forward only queues its kernels: wait for them, or real work would look like none."""
    if getattr(rows, "is_cuda", False):
        importlib.import_module("torch").cuda.current_stream().synchronize()
