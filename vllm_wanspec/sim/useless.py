"""A drafter that sends random tokens and is sure of each: the real session host and protocol, without a model.

It runs in a process of its own: ``python -m vllm_wanspec.sim.useless --port 8200 --model DIR``, with the
target's folder, whose vocabulary it claims to have.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Sequence
from random import Random

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.messages import vocabulary_fingerprint
from vllm_wanspec.drafter.host import DraftModel, StreamingHost
from vllm_wanspec.drafter.metrics import HostCollector
from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.sim.language import Language
from vllm_wanspec.sim.synthetic import RUNNING_BRANCHES, SteppedEngine, make_app

__all__ = ["RandomTokens", "model_of"]

ALTERNATIVES = 3
SURE, UNSURE = math.log(0.7), math.log(0.1)
ENTROPY_NATS = 0.94
MAX_CONTEXT_TOKENS = 1023
DEFAULT_PACE = "5+0.02"


class RandomTokens(Language):
    """A draft model whose every guess is drawn from the whole vocabulary."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        """Draw ids below ``vocab_size``, at least five of them."""
        super().__init__(seed)
        self.vocab_size = vocab_size
        self._rng = Random(seed)

    def step(self, context: Sequence[int]) -> DraftStep:
        """One token and three alternatives, whatever the context."""
        token, *others = self._rng.sample(range(self.vocab_size), 1 + ALTERNATIVES)
        return DraftStep(token, SURE, ENTROPY_NATS, tuple((other, UNSURE) for other in others))


def model_of(name: str) -> DraftModel:
    """What the drafter says of itself: a model with the vocabulary of the given one."""
    from transformers import AutoConfig, AutoTokenizer  # not needed to serve, and slow to import

    vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    size = min(max(vocabulary.values()) + 1, int(AutoConfig.from_pretrained(name).vocab_size))
    return DraftModel("random", vocabulary_fingerprint(vocabulary), size, MAX_CONTEXT_TOKENS)


async def _serve(port: int, model: DraftModel, pace: Pacing) -> None:
    engine = SteppedEngine(RandomTokens(model.vocab_size), pace.base_ms, pace.per_token_ms)
    host = StreamingHost(engine, model, running_branches=RUNNING_BRANCHES)
    registry = CollectorRegistry()
    registry.register(HostCollector(host.stats))

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=generate_latest(registry).decode())

    app = make_app(host, engine)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, shutdown_timeout=0.2)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        await engine.run()
    finally:
        await runner.cleanup()


def main() -> None:
    """Serve until a signal ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument("--model", required=True, help="model whose vocabulary is claimed")
    parser.add_argument("--pace", default=DEFAULT_PACE, help="duration of a step: ms + ms per branch")
    arguments = parser.parse_args()
    pace = Pacing.parse(arguments.pace, "--pace")
    asyncio.run(_serve(arguments.port, model_of(arguments.model), pace))


if __name__ == "__main__":
    main()
