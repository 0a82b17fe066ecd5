"""What waits for the engine core of this process: whether a step may be held back depends on it."""

import weakref
from collections.abc import Callable
from typing import Any

from vllm_wanspec.ledger import Wrap, attribute, wrap

LEDGER = (
    Wrap(
        "vllm.v1.engine.core.EngineCore.post_step",
        "Whether a step may be held back depends on what waits for the engine, which the model runner cannot see.",
        "Class-wide wrap: remembers the engine core of this process, to look at the length of its input queue.",
        "vLLM tells custom proposers how many requests wait.",
    ),
)

_engine_core: weakref.ReferenceType[Any] | None = None


def install() -> None:
    """Set the wrap.

    Raises:
        UnsupportedError: vLLM has no engine core where it is sought.
    """
    wrap(attribute("vllm.v1.engine.core", "EngineCore"), "post_step", _remembering_the_core)


def queued_requests() -> int | None:
    """Requests and aborts that wait for the engine core of this process; None where it runs in another one."""
    core = _engine_core() if _engine_core is not None else None
    queue = getattr(core, "input_queue", None)
    return None if queue is None else int(queue.qsize())


def _remembering_the_core(original: Callable[..., Any]) -> Callable[..., Any]:
    def post_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _engine_core
        if _engine_core is None or _engine_core() is not self:
            _engine_core = weakref.ref(self)
        return original(self, *args, **kwargs)

    return post_step
