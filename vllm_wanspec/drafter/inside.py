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
from typing import Any

from vllm_wanspec.core.drafter import StartBranch
from vllm_wanspec.drafter.connection import Connection
from vllm_wanspec.drafter.engines import TOP_K, draft_step
from vllm_wanspec.drafter.host import DraftModel, Host
from vllm_wanspec.errors import RemoteProtocolError
from vllm_wanspec.eventlog import EventLog

logger = logging.getLogger("vllm.wanspec.drafter")

CLIENT_INDEX = -7
"""Of our requests: vLLM groups a step's outputs by it, and no front end has a negative one."""
PREFIX = "wanspec-branch-"
STATS_INTERVAL_S = 0.5
_MODULE = "vllm.v1.engine.core"


def install() -> None:
    """Add the utility calls to vLLM's engine; nothing in a process that has none."""
    if _MODULE in sys.modules:
        core = sys.modules[_MODULE].EngineCore
        for call in (wanspec_setup, wanspec_connect, wanspec_receive, wanspec_poll, wanspec_close):
            setattr(core, call.__name__, call)


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
        """Take one step's outputs for our requests (vLLM's ``EngineCoreOutputs``)."""
        for output in outputs.outputs:
            handle = int(output.request_id[len(PREFIX) :])
            if output.new_token_ids:
                ranked = output.new_logprobs
                rows = zip(
                    output.new_token_ids, ranked.logprob_token_ids.tolist(), ranked.logprobs.tolist(), strict=True
                )
                self.drafted(handle, [draft_step(token, ids, logprobs) for token, ids, logprobs in rows])
            if output.finish_reason is not None:
                if output.finish_reason == self._length:
                    self.ended(handle)
                else:
                    self.failed(handle, f"it ended a request: {output.finish_reason}")
                if handle in self._running:  # a session that ends has stopped its branches itself
                    self.gone(handle)

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


class _FrontEnd:
    """One front-end process: its controllers, and its call that waits for something to send."""

    def __init__(self) -> None:
        self.connections: dict[int, Connection] = {}
        self.written: set[int] = set()
        self.waiting: Future[list[Any]] | None = None


class Inside:
    """What an engine process keeps for its front ends."""

    def __init__(self, core: Any, settings: dict[str, Any]) -> None:
        """Host sessions in a vLLM ``EngineCore``; ``settings`` as `EngineGate` sends them."""
        from vllm.v1.engine import EngineCoreOutputs

        model = DraftModel(**settings["model"])
        events = settings["events"]
        log = EventLog(events, "drafter", model.name) if events else None
        self._host = InsideHost(
            core,
            model,
            top_k=settings["top_k"],
            running_branches=settings["running_branches"],
            sink=log.record if log else None,
        )
        self._front_ends: dict[str, _FrontEnd] = {}
        self._outputs = EngineCoreOutputs
        self._told_s = 0.0
        core.step_fn = self._wrapped(core.step_fn)

    def connect(self, front_end: str, number: int) -> None:
        """A controller has connected."""
        there = self._front_ends.setdefault(front_end, _FrontEnd())
        there.connections[number] = Connection(self._host, lambda: there.written.add(number))

    def receive(self, front_end: str, number: int, frame: bytes) -> list[Any]:
        """A controller's frame; its breach of the protocol or None, whether it goes on, last words if not; counts."""
        there = self._front_ends[front_end]
        connection = there.connections.get(number)
        if connection is None:
            return ["the drafter has dropped the connection by a fault of its own", False, [], self._counts()]
        try:
            goes_on = connection.receive(frame)
        except RemoteProtocolError as error:
            return [str(error), False, [], self._counts()]
        last = [] if goes_on else connection.frames()
        self._flush()
        return [None, goes_on, last, self._counts()]

    def poll(self, front_end: str) -> Future[list[Any]]:
        """Frames by controller, and counts (`HostStats`), as soon as there are frames."""
        there = self._front_ends.setdefault(front_end, _FrontEnd())
        waiting: Future[list[Any]] = Future()
        there.waiting = waiting
        self._flush()
        return waiting

    def close(self, front_end: str, number: int) -> list[Any]:
        """A controller is gone; counts."""
        there = self._front_ends[front_end]
        connection = there.connections.pop(number, None)
        there.written.discard(number)
        if connection is not None:
            connection.end()
        return self._counts()

    def _counts(self) -> list[Any]:
        return list(self._host.stats())

    def _flush(self) -> None:
        for there in self._front_ends.values():
            if there.waiting is not None and there.written:
                waiting, there.waiting = there.waiting, None
                frames = [[number, there.connections[number].frames()] for number in there.written]
                there.written.clear()
                waiting.set_result([frames, self._counts()])

    def _wrapped(self, step: Callable[[], tuple[Any, bool]]) -> Callable[[], tuple[Any, bool]]:
        """The engine's step; our requests' outputs stay here."""

        def stepped() -> tuple[Any, bool]:
            outputs, executed = step()
            ours = outputs.pop(CLIENT_INDEX, None) if outputs else None
            if ours is not None:
                if ours.scheduler_stats is not None:
                    self._pass_on(ours.scheduler_stats, outputs)
                try:
                    self._host.stepped(ours)
                except Exception:
                    logger.exception("drafting stops for all controllers by a fault of ours")
                    self._drop_all()
                self._flush()
            return outputs, executed

        return stepped

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
                connection = there.connections.pop(number)
                there.written.discard(number)
                connection.end()


# The utility calls; ``core`` is the engine that they become methods of.


def wanspec_setup(core: Any, settings: dict[str, Any]) -> None:
    """Host sessions; further front ends find that done."""
    if getattr(core, "wanspec", None) is None:
        core.wanspec = Inside(core, settings)


def wanspec_connect(core: Any, front_end: str, number: int) -> None:
    """See `Inside.connect`."""
    core.wanspec.connect(front_end, number)


def wanspec_receive(core: Any, front_end: str, number: int, frame: bytes) -> list[Any]:
    """See `Inside.receive`."""
    result: list[Any] = core.wanspec.receive(front_end, number, frame)
    return result


def wanspec_poll(core: Any, front_end: str) -> Future[list[Any]]:
    """See `Inside.poll`."""
    result: Future[list[Any]] = core.wanspec.poll(front_end)
    return result


def wanspec_close(core: Any, front_end: str, number: int) -> list[Any]:
    """See `Inside.close`."""
    result: list[Any] = core.wanspec.close(front_end, number)
    return result
