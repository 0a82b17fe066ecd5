"""A peer with the same helpers: a co-located draft model whose drafts our prompt lookup goes on with.

vLLM makes room for K draft tokens per step, its draft model drafts γ of them, and what is left is looked up in the
request's own text by the very code that serves remote drafts. γ is read from a small control file while the server
runs, and where each accepted token came from is written beside it. Nothing here may raise while the engine serves:
after a fault of ours the draft model's own tokens go out as they are.

vLLM names the worker by ``--worker-cls``; it is made when asked for, so that a bench may import the rest without vLLM.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_wanspec.core.draft import NO_DRAFT, Draft
from vllm_wanspec.core.policy.lookup import LookupRates, Text, lengthened
from vllm_wanspec.errors import ConfigError, UnsupportedError

WORKER = "ColocatedWorker"
#: Names the control file: JSON, ``{"gamma": 3}``.
COLOCATED_ENV = "WANSPEC_LAB_COLOCATED"
COUNTS = ("accepted_draft", "accepted_lookup", "offered_draft", "offered_lookup")
COUNTS_SUFFIX = ".counts"
#: A token is looked up while the chance that it is taken is at least this, times the rows of the step: one more token
#: lengthens a step of about 50 ms by 0.1 ms, and each row's step yields about three. (Own derivation.)
LEAST_CHANCE_PER_ROW = 0.005
DIGITS = 15
READ_DEADLINE_S = 1.0
READ_PAUSE_S = 0.001

logger = logging.getLogger("vllm.wanspec.colocated")


def colocated_flags(draft: str, limit: int) -> list[str]:
    """Return the ``vllm serve`` arguments of a target with the draft model beside it and prompt lookup behind that.

    Drafts that are lengthened must pass through the scheduler, which with asynchronous scheduling never sees them.

    Args:
        draft: Draft model: a folder, or a name that vLLM knows.
        limit: K, most draft tokens verified per step.
    """
    config = {"method": "draft_model", "model": draft, "num_speculative_tokens": limit}
    worker = ["--worker-cls", f"{__name__}.{WORKER}", "--no-async-scheduling"]
    return ["--speculative-config", json.dumps(config), *worker]


def set_gamma(path: Path, gamma: int) -> None:
    """Have the server whose control file is ``path`` draft ``gamma`` tokens from its next step on; atomically."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps({"gamma": gamma}), "utf-8")
    scratch.replace(path)


def read_counts(path: Path) -> dict[str, int]:
    """Return how many tokens a server has verified since it started, by where they came from: the keys of `COUNTS`.

    The draft tokens of a step are counted before its output leaves the engine.

    Args:
        path: The server's control file.

    Raises:
        ConfigError: No server has written any there.
    """
    counts = counts_path(path)
    end_s = time.monotonic() + READ_DEADLINE_S
    while True:
        try:
            found = json.loads(counts.read_text("utf-8"))
            return {name: int(found[name]) for name in COUNTS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if time.monotonic() > end_s:
                raise ConfigError(f"{counts}: no counts of a co-located draft model ({error})") from error
        time.sleep(READ_PAUSE_S)


def counts_path(path: Path) -> Path:
    """Where a server writes its counts whose control file is ``path``."""
    return path.with_name(path.name + COUNTS_SUFFIX)


class Gamma:
    """γ, as the control file says.

    Attributes:
        value: Tokens that the draft model drafts per step, 1 to K; K until the file has said something else.
    """

    def __init__(self, path: Path | None, limit: int) -> None:
        """Read the file if there is one.

        Args:
            path: The control file; None has K drafted always.
            limit: K.
        """
        self.value = limit
        self._path = path
        self._limit = limit
        self._seen: tuple[int, int] | None = None
        self._complained = False
        self.refresh()

    def refresh(self) -> None:
        """Read the file again if it has changed; one that cannot be read leaves γ as it was, and is named once."""
        if self._path is None:
            return
        try:
            status = os.stat(self._path)  # noqa: PTH116 -- Path.stat takes three times as long, in every step
            seen = status.st_mtime_ns, status.st_ino
            if seen == self._seen:
                return
            self._seen = seen
            self.value = _gamma(self._path.read_bytes(), self._limit)
            self._complained = False
            logger.info("the co-located draft model drafts %d tokens per step", self.value)
        except (OSError, ValueError) as error:
            if not self._complained:
                self._complained = True
                logger.warning("%s: %s; %d tokens are drafted per step as before", self._path, error, self.value)


def _gamma(text: bytes, limit: int) -> int:
    found = json.loads(text)
    gamma = found.get("gamma") if isinstance(found, dict) else None
    if type(gamma) is not int or not 1 <= gamma <= limit:
        raise ValueError(f"expected a gamma from 1 to {limit}")
    return gamma


class CountsFile:
    """Counts that others can read while they rise, written in place with one system call."""

    def __init__(self, path: Path | None) -> None:
        """Begin at 0.

        Args:
            path: The file; None writes nothing.

        Raises:
            OSError: It cannot be written.
        """
        self.values = dict.fromkeys(COUNTS, 0)
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.write()

    def write(self) -> None:
        """Bring the file up to date; its length stays the same, so that no reader finds the end of an older text."""
        if self._file is not None:
            pairs = [f'"{name}": {self.values[name]:>{DIGITS}}' for name in COUNTS]
            os.pwrite(self._file, f"{{{', '.join(pairs)}}}\n".encode(), 0)


class Lookup:
    """Goes on with the draft model's drafts, and learns from what became of them.

    Attributes:
        failed: Whether a fault of ours has ended it.
    """

    def __init__(self, limit: int, path: Path | None) -> None:
        """Start without requests.

        Args:
            limit: K, most draft tokens per request and step.
            path: The control file, if there is one; the counts go beside it.

        Raises:
            OSError: The counts cannot be written.
        """
        self.failed = False
        self._limit = limit
        self._gamma = Gamma(path, limit)
        self._counts = CountsFile(None if path is None else counts_path(path))
        self._rates = LookupRates()
        self._taken_whole = [Share() for _ in range(limit + 1)]
        self._texts: dict[str, Text] = {}
        self._drafts: dict[str, Draft] = {}
        self._scheduled: Mapping[str, list[int]] = {}

    def begin(self, scheduler_output: Any) -> None:
        """A step begins: have it draft γ tokens after it, as vLLM's own dynamic speculation does; never raises."""
        try:
            self._gamma.refresh()
            for request in scheduler_output.finished_req_ids:
                self._texts.pop(request, None)
                self._drafts.pop(request, None)
            self._scheduled = scheduler_output.scheduled_spec_decode_tokens
            # Read first: a vLLM that has no such field must not be taken for one that obeys it.
            most = scheduler_output.num_spec_tokens_to_schedule
            scheduler_output.num_spec_tokens_to_schedule = min(most, self._gamma.value)
        except Exception as error:
            self._fail(error)

    def end(self, requests: Sequence[str], sampled: Sequence[Sequence[int]]) -> None:
        """The step has yielded ``sampled`` tokens per request: count whose drafts they were; never raises."""
        if self.failed or not self._scheduled:
            return
        try:
            for request, tokens in zip(requests, sampled, strict=True):
                offered, draft = self._scheduled.get(request), self._drafts.get(request)
                # vLLM may cut drafts, and verify placeholders: where all but one token of a prompt are in its cache.
                if offered and tokens and draft is not None and draft.tokens[: len(offered)] == offered:
                    self._judge(draft, len(offered), tokens)
            self._counts.write()
        except Exception as error:
            self._fail(error)

    def _judge(self, draft: Draft, offered: int, tokens: Sequence[int]) -> None:
        """Learn from ``tokens``, the last of them the target's own; ``offered`` tokens of the draft were verified."""
        accepted, whole, counts = len(tokens) - 1, len(draft.drafted), self._counts.values
        drafted = min(whole, offered)
        counts["offered_draft"] += drafted
        counts["offered_lookup"] += offered - drafted
        counts["accepted_draft"] += min(accepted, drafted)
        counts["accepted_lookup"] += max(0, accepted - drafted)
        if 0 < whole <= offered:
            self._taken_whole[whole].add(accepted >= whole)
        if draft.guess:  # without effect where the draft before it was not taken whole
            self._rates.saw(draft.match, draft.guess, tokens[whole:])

    def lengthen(self, requests: Sequence[str], drafts: Sequence[list[int]], batch: Any) -> None:
        """Lengthen drafts in place, up to K tokens; never raises.

        Args:
            requests: Whose they are.
            drafts: The draft model's; where it drafted nothing, since a request is near its end, K zeros, which give
                way to what is looked up.
            batch: vLLM's input batch, in which the requests' rows have all their tokens.
        """
        if self.failed:
            return
        try:
            gamma = self._gamma.value
            chance, least = self._taken_whole[gamma].value, LEAST_CHANCE_PER_ROW * len(requests)
            for request, tokens in zip(requests, drafts, strict=True):
                text = self._text(request, batch)
                # An expectation of so many tokens keeps lookup from taking the place of the draft model's.
                draft = Draft(tokens[:], float(gamma), chance) if len(tokens) == gamma else NO_DRAFT
                draft = self._drafts[request] = lengthened(draft, text, self._rates, self._limit, least)
                tokens[:] = draft.tokens
        except Exception as error:
            self._fail(error)

    def _text(self, request: str, batch: Any) -> Text:
        """All tokens of a request; read by position, so that they are right whatever the scheduler did meanwhile."""
        row = batch.req_id_to_index[request]
        length = int(batch.num_tokens_no_spec[row])
        text = self._texts.get(request)
        if text is None or text.length > length:
            text = self._texts[request] = Text()
        text.append(batch.token_ids_cpu[row, text.length : length].tolist())
        return text

    def _fail(self, error: Exception) -> None:
        """A fault of ours: say so once, and leave drafts as they are from now on."""
        if not self.failed:
            self.failed = True
            logger.error("prompt lookup behind the draft model stops by a fault of its own", exc_info=error)


class Share:
    """How often something held; a half before anything is known."""

    def __init__(self) -> None:
        """Start without measurements."""
        self._seen, self._held = 2, 1

    @property
    def value(self) -> float:
        """The share, in (0, 1)."""
        return self._held / self._seen

    def add(self, held: bool) -> None:
        """Take one more case."""
        self._seen += 1
        self._held += held


class LengthensDrafts:
    """What a worker of vLLM's becomes `ColocatedWorker` by; stands before it among the bases."""

    model_runner: Any

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the worker.

        Raises:
            UnsupportedError: The server is not one that `colocated_flags` start.
            OSError: The counts cannot be written.
        """
        _check(vllm_config)
        worker: Any = super()
        worker.__init__(vllm_config, *args, **kwargs)
        path = os.environ.get(COLOCATED_ENV)
        limit = int(vllm_config.speculative_config.num_speculative_tokens)
        self._lookup = Lookup(limit, Path(path) if path else None)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the target's forward."""
        self._lookup.begin(scheduler_output)
        worker: Any = super()
        return worker.execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and draft."""
        worker: Any = super()
        output = worker.sample_tokens(grammar_output)
        self._lookup.end(output.req_ids, output.sampled_token_ids)
        return output

    def take_draft_token_ids(self) -> Any:
        """Give the scheduler the drafts for the next step, lengthened."""
        worker: Any = super()
        drafts = worker.take_draft_token_ids()
        if drafts is not None:
            self._lookup.lengthen(drafts.req_ids, drafts.draft_token_ids, self.model_runner.input_batch)
        return drafts


def _check(vllm_config: Any) -> None:
    """Raise UnsupportedError where drafts would not be lengthened, or no longer be exact."""
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    needs = {
        "a draft model": speculative is not None and speculative.method == "draft_model",
        "drafts that are the draft model's best tokens": getattr(speculative, "draft_sample_method", "") == "greedy",
        "synchronous scheduling": not vllm_config.scheduler_config.async_scheduling,
        "Model Runner V1": not vllm_config.use_v2_model_runner,
        "a single process": parallel.world_size == 1 and parallel.data_parallel_size == 1,
    }
    missing = [need for need, met in needs.items() if not met]
    if missing:
        raise UnsupportedError(f"prompt lookup behind a co-located draft model needs {', '.join(missing)}")


def __getattr__(name: str) -> Any:
    """Make the worker of this machine's platform, when vLLM asks for it."""
    if name != WORKER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    else:
        from vllm.v1.worker.gpu_worker import Worker
    made = globals()[name] = type(WORKER, (LengthensDrafts, Worker), {"__module__": __name__})
    return made
