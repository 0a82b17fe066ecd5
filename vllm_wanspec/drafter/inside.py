"""The session host inside vLLM's engine process.

Tokens reach the sessions where they are made, and a branch begins with the very next step of the engine: no message to
the front end and back lies between, and none of vLLM's per-request work there. Front ends only carry frames, by the
utility calls that this adds to the engine (`EngineGate` in `drafter.gate` makes them).

Everything runs in the engine's own thread, between its steps.
"""

import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from vllm_wanspec.core.drafter import StartBranch
from vllm_wanspec.drafter.connection import Connection
from vllm_wanspec.drafter.engines import TOP_K, draft_step
from vllm_wanspec.drafter.host import DraftModel, Host
from vllm_wanspec.errors import RemoteProtocolError, UnsupportedError
from vllm_wanspec.eventlog import EventLog
from vllm_wanspec.ledger import SUPPORTED, Wrap, attribute, need_attributes, need_methods, vllm_version

logger = logging.getLogger("vllm.wanspec.drafter")

CLIENT_INDEX = -7
"""Of our requests: vLLM groups a step's outputs by it, and no front end has a negative one."""
PREFIX = "wanspec-branch-"
STATS_INTERVAL_S = 0.5
_MODULE = "vllm.v1.engine.core"
_DROPPED = "the drafter has dropped the connection by a fault of its own"

LEDGER = (
    Wrap(
        "vllm.v1.engine.core.EngineCore (methods wanspec_setup, _connect, _receive, _poll, _drain, _close)",
        "Front ends reach the sessions in the engine's process.",
        "Added to the class, where vLLM finds the methods that utility calls name.",
        "vLLM lets plugins add utility calls.",
    ),
    Wrap(
        "vllm.v1.engine.core.EngineCore.step_fn",
        "A step's outputs for our requests are for the sessions here, and no front end knows the requests.",
        "Replaced in the instance when sessions are set up: calls the original, and takes our outputs out of its own.",
        "vLLM lets code in the engine's process have requests of its own.",
    ),
    Wrap(
        "vllm.v1.engine.core.EngineCore.add_request, EngineCore.abort_requests, .request_block_hasher (called)",
        "Branches are requests that are made and ended between two steps.",
        "Not wrapped: called as vLLM does for what comes in from front ends.",
        "As above.",
    ),
    Wrap(
        "vllm.v1.engine.core.EngineCoreProc.output_queue",
        "What vLLM itself says of our requests, when it stops or pauses, has the number of a front end that is none: "
        "the thread that sends it would end.",
        "Replaced in the instance by one that gives such outputs to the sessions, and all others to the original.",
        "As above.",
    ),
)


def install() -> None:
    """Add the utility calls to vLLM's engine; nothing in a process that has none."""
    if _MODULE in sys.modules:
        core = sys.modules[_MODULE].EngineCore
        for call in (wanspec_setup, wanspec_connect, wanspec_receive, wanspec_poll, wanspec_drain, wanspec_close):
            setattr(core, call.__name__, call)


def check() -> None:
    """Fail early where this vLLM's engine cannot have sessions in its process.

    Raises:
        UnsupportedError: It lacks what they need.
    """
    core = attribute(_MODULE, "EngineCore")
    need_methods(core, ("add_request", "abort_requests"))
    need_attributes(core, ("step_fn", "request_block_hasher"))
    process = attribute(_MODULE, "EngineCoreProc")
    need_methods(process, ("is_running",))
    need_attributes(process, ("output_queue",))


def _check_core(core: Any) -> None:
    """The same of an engine that is there; one in no process of its own has no output queue.

    Raises:
        UnsupportedError: It lacks what sessions need.
    """
    for name in ("step_fn", "add_request", "abort_requests", "request_block_hasher"):
        if not hasattr(core, name):
            raise UnsupportedError(
                f"vLLM {vllm_version()} has no EngineCore.{name}, which sessions in the engine need; "
                f"use vLLM {SUPPORTED}, or have them in the front end"
            )


class InsideHost(Host):
    """A host whose branches are requests of the engine core in the same thread."""

    def __init__(self, core: Any, model: DraftModel, *, top_k: int = TOP_K, **settings: Any) -> None:
        """Draft with a vLLM ``EngineCore``; ``top_k`` as for `VllmEngine`, other settings as for `Host`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import FinishReason
        from vllm.v1.request import Request

        super().__init__(model, **settings)
        self._core = core
        self._request = Request
        self._length = FinishReason.LENGTH
        self._params = SamplingParams(
            temperature=0.0,
            logprobs=top_k,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )

    def stepped(self, outputs: Any) -> None:
        """Take one step's outputs for our requests (vLLM's ``EngineCoreOutputs``); a bad one ends its session alone."""
        for output in outputs.outputs:
            handle = int(output.request_id[len(PREFIX) :])
            try:
                self._take(handle, output)
            except Exception as error:
                self.failed(handle, f"{type(error).__name__}: {error}, in what it gave")
            if output.finish_reason is not None and handle in self._running:
                self.gone(handle)  # a session that ends has stopped its branches itself

    def _take(self, handle: int, output: Any) -> None:
        if output.new_token_ids:
            ranked = output.new_logprobs
            rows = zip(output.new_token_ids, ranked.logprob_token_ids.tolist(), ranked.logprobs.tolist(), strict=True)
            self.drafted(handle, [draft_step(token, ids, logprobs) for token, ids, logprobs in rows])
        if output.finish_reason == self._length:
            self.ended(handle)
        elif output.finish_reason is not None:
            self.failed(handle, f"it ended a request: {output.finish_reason}")

    def _extend(self, handle: int, start: StartBranch) -> None:
        request = self._request(
            f"{PREFIX}{handle}",
            start.tokens,
            self._params,
            None,
            client_index=CLIENT_INDEX,
            block_hasher=self._core.request_block_hasher,
        )
        request.max_tokens = start.max_tokens
        self._core.add_request(request)

    def _cease(self, handle: int) -> None:
        self._core.abort_requests([f"{PREFIX}{handle}"])
        self.gone(handle)


class OutputQueue:
    """vLLM's queue to its output thread, but for what is of our requests."""

    def __init__(self, queue: Any, ours: Callable[[Any], None]) -> None:
        """Stand in front of ``queue``; ``ours`` takes outputs (``EngineCoreOutputs``) that have `CLIENT_INDEX`."""
        self._queue = queue
        self._ours = ours

    def put_nowait(self, item: Any) -> None:
        """See ``queue.Queue``."""
        if isinstance(item, tuple) and item[0] == CLIENT_INDEX:
            self._ours(item[1])
        else:
            self._queue.put_nowait(item)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class _FrontEnd:
    """One front-end process: its controllers, its call that waits for something to send, and who has come to an end.

    Of the latter there are the last frames, and what was wrong; nothing, where the controller was refused.
    """

    def __init__(self) -> None:
        self.connections: dict[int, Connection] = {}
        self.written: set[int] = set()
        self.ended: dict[int, tuple[list[bytes], str]] = {}
        self.waiting: Future[list[Any]] | None = None

    def end(self, number: int, fault: str) -> None:
        """A controller's connection is over, by its fault or because it was refused."""
        connection = self.connections.pop(number)
        self.ended[number] = (connection.frames(), fault)
        connection.end()
        self.written.discard(number)


class Inside:
    """What an engine process keeps for its front ends."""

    def __init__(self, core: Any, settings: dict[str, Any]) -> None:
        """Host sessions in a vLLM ``EngineCore``; ``settings`` as `EngineGate` sends them.

        Raises:
            UnsupportedError: This engine lacks what sessions need.
        """
        from vllm.v1.engine import EngineCoreOutputs

        _check_core(core)
        model = DraftModel(**settings["model"])
        events = settings["events"]
        log = EventLog(events, "drafter", model.name) if events else None
        self._host = InsideHost(
            core,
            model,
            top_k=settings["top_k"],
            running_branches=settings["running_branches"],
            capacity_tokens=settings.get("capacity_tokens"),
            sink=log.record if log else None,
        )
        self._front_ends: dict[str, _FrontEnd] = {}
        self._outputs = EngineCoreOutputs
        self._told_s = 0.0
        self._engine_runs: Callable[[], bool] = getattr(core, "is_running", lambda: True)
        core.step_fn = self._wrapped(core.step_fn)
        if hasattr(core, "output_queue"):
            core.output_queue = OutputQueue(core.output_queue, self._ended_by_vllm)

    def connect(self, front_end: str, number: int, client: str) -> None:
        """A controller has connected, by the token of that name."""
        there = self._front_ends.setdefault(front_end, _FrontEnd())
        there.connections[number] = Connection(self._host, lambda: there.written.add(number), client)

    def receive(self, front_end: str, number: int, frame: bytes) -> list[Any]:
        """A controller's frame; counts. What follows, a fault too, comes with `poll`."""
        there = self._front_ends[front_end]
        connection = there.connections.get(number)
        if connection is not None:  # else the frame was on its way when the connection ended
            try:
                if not connection.receive(frame):
                    there.end(number, "")
            except RemoteProtocolError as error:
                there.end(number, str(error))
            self._flush()
        return self._counts()

    def poll(self, front_end: str) -> Future[list[Any]]:
        """As soon as there is something: controllers with their frames, and counts (`HostStats`).

        A controller is a number, frames, and None; where it is its end, instead of None what was wrong, or nothing
        (""), where it was refused.
        """
        there = self._front_ends.setdefault(front_end, _FrontEnd())
        waiting: Future[list[Any]] = Future()
        there.waiting = waiting
        self._flush()
        return waiting

    def drain(self, last: bool) -> list[Any]:
        """Take no new sessions, and with ``last`` end those that there are; counts."""
        self._host.drain()
        if last:
            self._host.dismiss()
        self._flush()
        return self._counts()

    def close(self, front_end: str, number: int) -> list[Any]:
        """A controller is gone; counts."""
        there = self._front_ends.get(front_end)
        connection = there.connections.pop(number, None) if there is not None else None
        if there is not None and connection is not None:
            there.written.discard(number)
            connection.end()
        return self._counts()

    def _counts(self) -> list[Any]:
        return list(self._host.stats())

    def _flush(self) -> None:
        for there in self._front_ends.values():
            if there.waiting is not None and (there.written or there.ended):
                waiting, there.waiting = there.waiting, None
                batches: list[list[Any]] = [[n, there.connections[n].frames(), None] for n in there.written]
                batches += [[number, frames, fault] for number, (frames, fault) in there.ended.items()]
                there.written.clear()
                there.ended.clear()
                waiting.set_result([batches, self._counts()])

    def _wrapped(self, step: Callable[[], tuple[Any, bool]]) -> Callable[[], tuple[Any, bool]]:
        """The engine's step; our requests' outputs stay here."""

        def stepped() -> tuple[Any, bool]:
            outputs, executed = step()
            ours = outputs.pop(CLIENT_INDEX, None) if outputs else None
            if ours is not None:
                if ours.scheduler_stats is not None:
                    self._pass_on(ours.scheduler_stats, outputs)
                self._guarded(lambda: self._host.stepped(ours))
            if not self._host.draining and not self._engine_runs():
                self._guarded(lambda: self.drain(last=True))  # vLLM waits until nothing runs any more
            return outputs, executed

        return stepped

    def _ended_by_vllm(self, outputs: Any) -> None:
        """All our requests were ended by vLLM, which stops or pauses: sessions would only ask for new ones."""
        if not self._engine_runs():
            self._guarded(self._host.drain)
        self._guarded(self._host.dismiss)

    def _guarded(self, act: Callable[[], object]) -> None:
        """Do something in the engine's thread, into which nothing of ours is raised."""
        try:
            act()
            self._flush()
        except Exception:
            logger.exception("drafting stops for all controllers by a fault of ours")
            self._drop_all()

    def _pass_on(self, stats: Any, outputs: dict[int, Any]) -> None:
        """Send vLLM's own statistics of a step with a front end's outputs, or, where it has none, now and then.

        A message for each step would take the front end longer than all that it does for drafts.
        """
        now = self._host.now()
        first = next(iter(outputs.values()), None)
        if first is None and now - self._told_s >= STATS_INTERVAL_S:
            self._told_s = now
            first = outputs[0] = self._outputs()
        if first is not None:
            first.scheduler_stats = stats

    def _drop_all(self) -> None:
        for there in self._front_ends.values():
            for number in list(there.connections):
                with suppress(Exception):  # of whatever has broken it; the others are told
                    there.end(number, _DROPPED)
        with suppress(Exception):
            self._flush()


# The utility calls; ``core`` is the engine that they become methods of.


def wanspec_setup(core: Any, settings: dict[str, Any]) -> None:
    """Host sessions; further front ends find that done."""
    if getattr(core, "wanspec", None) is None:
        core.wanspec = Inside(core, settings)


def wanspec_connect(core: Any, front_end: str, number: int, client: str = "") -> None:
    """See `Inside.connect`."""
    core.wanspec.connect(front_end, number, client)


def wanspec_receive(core: Any, front_end: str, number: int, frame: bytes) -> list[Any]:
    """See `Inside.receive`."""
    result: list[Any] = core.wanspec.receive(front_end, number, frame)
    return result


def wanspec_poll(core: Any, front_end: str) -> Future[list[Any]]:
    """See `Inside.poll`."""
    result: Future[list[Any]] = core.wanspec.poll(front_end)
    return result


def wanspec_drain(core: Any, last: bool) -> list[Any]:
    """See `Inside.drain`."""
    result: list[Any] = core.wanspec.drain(last)
    return result


def wanspec_close(core: Any, front_end: str, number: int) -> list[Any]:
    """See `Inside.close`."""
    result: list[Any] = core.wanspec.close(front_end, number)
    return result
