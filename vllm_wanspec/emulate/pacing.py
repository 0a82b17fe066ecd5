"""Step pacing: give a tiny model the step time of a large one, and count forwards.

The model forward alone is stretched, by sleeping, to ``base + per_token * tokens`` milliseconds;
scheduling, drafting and transport come on top and stay visible.  vLLM is imported only when pacing
is installed.  A real forward that takes longer than its pace is counted as an overrun: a run with
more than 1 % of them says nothing about the paced hardware.

Forwards of the target and of a draft model beside it are counted where they run, and the counts
stand in a file as soon as a forward's work is done.  A pace of 0 counts and does nothing else.

This module must not change what a forward computes.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_wanspec.errors import ConfigError, UnsupportedError

PACING_ENV = "WANSPEC_PACING"
DRAFT_PACING_ENV = "WANSPEC_DRAFT_PACING"
STATS_ENV = "WANSPEC_PACING_STATS"
#: Characters of the statistics file, more than its counts ever need: a new text covers all of the one before.
STATS_WIDTH = 512
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

    @property
    def counts_only(self) -> bool:
        """Whether forwards are counted and not stretched: there is no pace to overrun."""
        return not (self.base_ms or self.per_token_ms)

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


#: The pace of forwards that are counted and not stretched.
COUNT_ONLY = Pacing(0.0)


@dataclass(slots=True)
class PacingStats:
    """What one kind of forward has done so far.

    Attributes:
        steps: Forwards.
        overruns: Those whose real work exceeded their pace; none where they are only counted.
        paced_ms_total: Sum of their paces, milliseconds.
        work_ms_total: Sum of their real work, milliseconds; where forwards are only counted, that of a GPU is not
            waited for, and this is the time to queue it.
    """

    steps: int = 0
    overruns: int = 0
    paced_ms_total: float = 0.0
    work_ms_total: float = 0.0

    def add(self, work_ms: float, pace_ms: float, overrun: bool) -> None:
        """Count a forward."""
        self.steps += 1
        self.overruns += overrun
        self.paced_ms_total += pace_ms
        self.work_ms_total += work_ms

    def as_json(self, prefix: str = "") -> dict[str, float]:
        """Return the fields of the statistics file; ``prefix`` comes before their names."""
        return {
            f"{prefix}steps": self.steps,
            f"{prefix}overruns": self.overruns,
            f"{prefix}paced_ms_total": round(self.paced_ms_total, 3),
            f"{prefix}work_ms_total": round(self.work_ms_total, 3),
        }


class StatsFile:
    """A small JSON object in a file, rewritten in place at a cost of microseconds.

    Opened at the first write, and so in the process that has something to write, whatever forks come before.  A reader
    may find the file empty or a text half written, and reads again.  A file that cannot be written is warned of once.

    Args:
        path: Where it lies, in an existing folder.
    """

    def __init__(self, path: Path) -> None:
        self._path: Path | None = path
        self._descriptor: int | None = None

    def write(self, values: Mapping[str, object]) -> None:
        """Replace what stands there."""
        if self._path is None:
            return
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.pwrite(self._descriptor, json.dumps(values).ljust(STATS_WIDTH).encode(), 0)
        except OSError as error:
            logger.warning("cannot write pacing statistics to %s (%s); giving up on them", self._path, error)
            self._path = None


class Pacer:
    """Runs the forwards of a target, and of a draft model beside it, no faster than their paces, and counts them.

    Args:
        pacing: The target's pace.
        draft_pacing: The draft model's.
        stats_path: File that holds the counts as JSON, rewritten within each forward's time; None writes nothing.
        clock: Monotonic seconds.
        sleep: Sleeps for that many seconds.

    Attributes:
        stats: The target's counts.
        draft_stats: The draft model's, all 0 where vLLM loads none.
        async_scheduling: Whether the runner in effect schedules ahead; None before its first forward.
        num_spec_tokens: Draft tokens per step that the runner in effect is made for; None before its first forward.
    """

    def __init__(
        self,
        pacing: Pacing,
        draft_pacing: Pacing = COUNT_ONLY,
        stats_path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.pacing = pacing
        self.draft_pacing = draft_pacing
        self.stats = PacingStats()
        self.draft_stats = PacingStats()
        self.async_scheduling: bool | None = None
        self.num_spec_tokens: int | None = None
        self._file = None if stats_path is None else StatsFile(stats_path)
        self._clock = clock
        self._sleep = sleep

    def run(self, forward: Callable[[], Any], tokens: int) -> Any:
        """Call the target's ``forward`` and return its result, not before the pace of ``tokens`` rows has passed."""
        return self._run(forward, self.pacing.step_ms(tokens), self.pacing, self.stats)

    def run_draft(self, forward: Callable[[], Any], tokens: int) -> Any:
        """Do the same for the draft model's ``forward``."""
        return self._run(forward, self.draft_pacing.step_ms(tokens), self.draft_pacing, self.draft_stats)

    def counts(self) -> dict[str, object]:
        """Return the fields of the statistics file."""
        settings = {"async_scheduling": self.async_scheduling, "num_spec_tokens": self.num_spec_tokens}
        return {**self.stats.as_json(), **self.draft_stats.as_json("draft_"), **settings}

    def _run(self, forward: Callable[[], Any], pace_ms: float, pacing: Pacing, stats: PacingStats) -> Any:
        started_s = self._clock()
        result = forward()
        work_ms = (self._clock() - started_s) * 1000.0
        stats.add(work_ms, pace_ms, overrun=work_ms > pace_ms and not pacing.counts_only)
        if self._file is not None:
            self._file.write(self.counts())
        left_s = started_s + pace_ms / 1000.0 - self._clock()
        if left_s > 0.0:
            self._sleep(left_s)
        return result


def install_from_env(environ: Mapping[str, str] = os.environ) -> Pacer | None:
    """Pace and count this process's forwards if ``WANSPEC_PACING`` asks for it, and a co-located draft model's.

    ``WANSPEC_DRAFT_PACING`` is the latter's pace, which needs the former; without it they are counted all the same.

    Returns:
        The pacer in use, or None when the variable is unset or empty.

    Raises:
        ConfigError: A variable is not a pace.
        UnsupportedError: The installed vLLM has no forward to wrap.
    """
    setting = environ.get(PACING_ENV, "").strip()
    if not setting:
        return None
    draft_setting = environ.get(DRAFT_PACING_ENV, "").strip()
    stats_path = environ.get(STATS_ENV, "").strip()
    pacer = Pacer(
        Pacing.parse(setting, PACING_ENV),
        Pacing.parse(draft_setting, DRAFT_PACING_ENV) if draft_setting else COUNT_ONLY,
        Path(stats_path) if stats_path else None,
    )
    pacer = install(pacer)
    install_draft(pacer)
    return pacer


def install(pacer: Pacer, runner_class: Any = None) -> Pacer:
    """Wrap the model forward of vLLM's model runner, or of another class; return the pacer in use, the first one.

    Only ``execute_model`` calls the wrapped method, so vLLM's profile and dummy runs are neither paced nor counted.

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

    def paced_forward(runner: Any, *args: Any, **kwargs: Any) -> Any:
        pacer.async_scheduling = getattr(runner, "use_async_scheduling", None)
        pacer.num_spec_tokens = getattr(runner, "num_spec_tokens", None)
        return _run(pacer.run, pacer.pacing, functools.partial(original, runner), args, kwargs)

    paced_forward.wanspec_pacer = pacer  # type: ignore[attr-defined]
    runner_class._model_forward = paced_forward
    logger.info("pacing: every model forward is %s", _described(pacer.pacing))
    return pacer


def install_draft(pacer: Pacer, proposer_class: Any = None) -> None:
    """Wrap the forward of the draft model that vLLM loads beside the target, once.

    The wrap is set where ``load_model`` lies, at the base of vLLM's proposers: draft models, EAGLE, MTP and DFlash have
    it in common.  Medusa and custom classes load in other ways and are not seen.  What a draft model runs before the
    target's first forward is vLLM's profiling and warming up, which is neither paced nor counted.

    Args:
        pacer: What runs the forwards.
        proposer_class: Another class whose ``load_model``, or that of a base, sets ``model``.

    Raises:
        UnsupportedError: The class has no ``load_model``.
    """
    if proposer_class is None:
        proposer_class = importlib.import_module("vllm.v1.spec_decode.draft_model").DraftModelProposer
    base = next((known for known in proposer_class.__mro__ if "load_model" in vars(known)), None)
    if base is None:
        raise UnsupportedError("pacing: this vLLM's DraftModelProposer has no load_model to wrap")
    load_model = base.load_model
    if hasattr(load_model, "wanspec_pacer"):
        return

    def paced_load_model(proposer: Any, *args: Any, **kwargs: Any) -> None:
        load_model(proposer, *args, **kwargs)
        original = proposer.model.forward

        def paced_forward(*inputs: Any, **named: Any) -> Any:
            if not pacer.stats.steps:
                return original(*inputs, **named)
            return _run(pacer.run_draft, pacer.draft_pacing, original, inputs, named)

        proposer.model.forward = paced_forward

    paced_load_model.wanspec_pacer = pacer  # type: ignore[attr-defined]
    base.load_model = paced_load_model
    logger.info("pacing: every forward of a draft model beside the target is %s", _described(pacer.draft_pacing))


def _described(pacing: Pacing) -> str:
    return "counted" if pacing.counts_only else f"counted, and takes at least {pacing}"


def _run(
    run: Callable[[Callable[[], Any], int], Any],
    pacing: Pacing,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a model's forward by one of a pacer's methods, which paces by the rows in its arguments."""
    rows = _input_rows(args, kwargs)

    def forward() -> Any:
        result = original(*args, **kwargs)
        if not pacing.counts_only:
            _wait_for_device(rows)
        return result

    return run(forward, 0 if rows is None else int(rows.shape[-1]))


def _input_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the tensor whose last axis counts the step's tokens (positions are [tokens] or [3, tokens])."""
    names = ("input_ids", "positions")
    by_name = dict(zip(names, args, strict=False)) | dict(kwargs)
    return next((by_name[name] for name in names if by_name.get(name) is not None), None)


def _wait_for_device(rows: Any) -> None:
    """A GPU forward only queues its kernels: wait for them, or real work would look like none."""
    if getattr(rows, "is_cuda", False):
        importlib.import_module("torch").cuda.current_stream().synchronize()
