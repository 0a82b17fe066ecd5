"""The end of a drafter: no new sessions, and time for those that there are, before vLLM stops the engine.

On SIGTERM vLLM's API server stops the engine first and its connections last. Between the two signals of that order,
the server's and the engine's, is a call of the engine client's `shutdown`, in a thread of its own, while the event loop
goes on: there the sessions get their time. Where the engine's process gets the signal too (Ctrl-C in a terminal, a
service manager that signals whole groups) vLLM ends all requests at once, and so does the host with its sessions.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_wanspec.errors import UnsupportedError
from vllm_wanspec.ledger import SUPPORTED, Wrap, vllm_version

logger = logging.getLogger("vllm.wanspec.drafter")

GRACE_S = 5.0
"""For sessions to finish or move, where vLLM's ``--shutdown-timeout`` says nothing: half of what Docker waits for."""
LOOK_S = 0.05
"""How often is looked whether there are sessions left."""
LAST_WORDS_S = 0.2
"""For what was said last to get away."""

LEDGER = (
    Wrap(
        "vllm.v1.engine.async_llm.AsyncLLM.shutdown",
        "vLLM stops the engine before its connections, and sessions would end as failures of the engine.",
        "Replaced in the instance: called from another thread than the event loop's, has sessions end within a bounded "
        "time; then calls the original.",
        "vLLM tells plugins that its server will stop.",
    ),
)

Ask = Callable[[bool], Awaitable[int]]
"""Takes no new sessions, with True ends those that there are, and gives how many are left."""


async def let_go(ask: Ask, grace_s: float) -> int:
    """Take no new sessions, wait until there are none or for ``grace_s`` seconds, end the rest; how many these were."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + grace_s
    while True:
        left = await ask(False)
        if not left or loop.time() >= end_s:
            break
        await asyncio.sleep(LOOK_S)
    if left:
        await ask(True)
        await asyncio.sleep(LAST_WORDS_S)
    logger.info("drafter stops: no more sessions are taken, %d were ended before they were over", left)
    return left


def before_shutdown(engine_client: Any, ask: Ask, grace_s: float) -> None:
    """Have sessions end before ``engine_client`` stops the engine; called on the server's event loop.

    Raises:
        UnsupportedError: It has no `shutdown`.
    """
    original = getattr(engine_client, "shutdown", None)
    if original is None:
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no AsyncLLM.shutdown, which a drafter wraps; use vLLM {SUPPORTED}"
        )
    loop, thread = asyncio.get_running_loop(), threading.get_ident()

    def shutdown(*args: Any, **kwargs: Any) -> Any:
        # vLLM calls it a second time on the loop itself, when all is over: then there is nothing to wait for.
        if threading.get_ident() != thread and loop.is_running():
            going = asyncio.run_coroutine_threadsafe(let_go(ask, grace_s), loop)
            try:
                going.result(2 * grace_s + LAST_WORDS_S)
            except Exception as error:
                going.cancel()
                logger.warning("the drafter's sessions could not be let go (%s)", type(error).__name__)
        return original(*args, **kwargs)

    engine_client.shutdown = shutdown
