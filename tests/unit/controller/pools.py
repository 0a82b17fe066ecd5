"""A pool over toy drafters on sockets, and the engine's side of one batch."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, toy, wait_until

from vllm_wanspec.config import DraftEndpoint, Settings
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.sim.models import Language

TOY = toy(seed=4)
LIMIT = 4
PROMPT = [9, 8, 7]


@contextmanager
def pool_of(*urls: str, **sections: object) -> Iterator[DraftPool]:
    endpoints = [DraftEndpoint(name=f"d{index}", url=url) for index, url in enumerate(urls)]
    settings = Settings.model_validate({"draft_endpoints": endpoints, "fallback": [], **sections})
    pool = DraftPool(settings, fingerprint=FINGERPRINT, vocab_size=VOCAB_SIZE, speculation_length=LIMIT, seed=1)
    pool.start()
    try:
        yield pool
    finally:
        pool.stop()


@contextmanager
def served(language: Language = TOY, **sections: object) -> Iterator[tuple[DraftPool, DrafterServer]]:
    with DrafterServer(language) as server, pool_of(server.url, **sections) as pool:
        wait_until(lambda: up(pool))
        yield pool, server


def up(pool: DraftPool) -> int:
    return sum(link.welcome is not None for link in pool.links)


def peek(pool: DraftPool, request: str, limit: int = LIMIT) -> list[int]:
    """What could be handed out now, whatever it costs."""
    with pool._arrived:
        tree = pool._sessions[request].core.tree
        return tree.draft(limit)[0] if tree is not None else []


class Target:
    """The engine's side of one batch: verifies drafts and keeps the contexts."""

    def __init__(self, pool: DraftPool, requests: dict[str, list[int]]) -> None:
        self.pool = pool
        self.contexts = {name: list(prompt) for name, prompt in requests.items()}
        self.starts = {name: len(prompt) for name, prompt in requests.items()}
        self.drafts: dict[str, list[int]] = {name: [] for name in requests}
        self.accepted = 0
        pool.begin([], list(requests.items()))

    def step(self) -> None:
        rows = []
        for name, context in self.contexts.items():
            draft = self.drafts[name]
            assert len(draft) <= LIMIT
            assert draft == TOY.drafted(context, len(draft))
            tokens = TOY.verify(context, draft)
            self.accepted += len(tokens) - 1
            context += tokens
            rows.append((name, tokens))
        self.pool.step(rows)
        drafts = self.pool.draft([name for name, _ in rows], LIMIT)
        self.drafts = dict(zip(self.contexts, drafts, strict=True))

    def run_until_accepted(self, count: int) -> None:
        """Steps at a pace that a drafter can follow, until so many more drafts were accepted."""
        wanted = self.accepted + count
        end = time.monotonic() + 20.0
        pause = threading.Event()
        while self.accepted < wanted:
            assert time.monotonic() < end, f"{self.accepted} of {wanted} accepted; {self.pool.counters}"
            self.step()
            pause.wait(0.003)
        self.check()

    def check(self) -> None:
        for name, context in self.contexts.items():
            start = self.starts[name]
            assert context[start:] == TOY.continuation(context[:start], len(context) - start)
