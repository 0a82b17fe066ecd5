"""A pool over drafters whose network and time are played: a good one, and others that do what they are told.

The target's token at position n is n % VOCAB; the good drafter says so too.
"""

from collections import Counter
from collections.abc import Callable

from vllm_wanspec.config import Settings
from vllm_wanspec.controller.link import DrafterLink
from vllm_wanspec.controller.pool import DraftPool
from vllm_wanspec.core.messages import Commit, Message, Nodes, Open, Welcome
from vllm_wanspec.core.tree import NodeRecord

VOCAB = 1000
AHEAD = 16
LIMIT = 4
STEP_S = 0.02

Answer = Callable[[Message], list[Message]]


class GoodDrafter:
    """Keeps every session drafted `AHEAD` tokens beyond its last commit."""

    def __init__(self) -> None:
        self._drafted: dict[int, tuple[int, int]] = {}

    def __call__(self, message: Message) -> list[Message]:
        if isinstance(message, Open):
            self._drafted[message.session] = (0, message.total)
            return [self._up_to(message.session, message.total)]
        if isinstance(message, Commit):
            return [self._up_to(message.session, message.position + len(message.tokens))]
        return []

    def _up_to(self, session: int, known: int) -> Nodes:
        last, position = self._drafted[session]
        count = max(0, known + AHEAD - position)  # a piece of the context is known before it comes
        records = [NodeRecord(last + i + 1, last + i, (position + i) % VOCAB, -0.1, 0.5) for i in range(count)]
        self._drafted[session] = (last + count, position + count)
        return Nodes(session, known, tuple(records))


class TwoDrafters:
    """Requests of one batch, stepped every `STEP_S`; each drafter's messages arrive at once."""

    def __init__(self, bad: Answer, *, requests: int = 8) -> None:
        self.now = 100.0
        endpoints = [{"name": name, "url": "http://127.0.0.1:9"} for name in ("bad", "good")]
        settings = Settings.model_validate({"draft_endpoints": endpoints, "fallback": []})
        self.pool = DraftPool(
            settings,
            fingerprint="f",
            vocab_size=VOCAB,
            speculation_length=LIMIT,
            clock=lambda: self.now,
            seed=1,
        )
        self.pool._thread._loop.close()  # nothing is connected
        self.answers: dict[DrafterLink, Answer] = dict(zip(self.pool.links, (bad, GoodDrafter()), strict=True))
        for link in self.pool.links:
            link.welcome = Welcome(1, "m", VOCAB, "f", 99, 4096, 10**6)
            link._rtt_s.add(0.02)
        self.length = {f"r{index}": 3 for index in range(requests)}
        self.drafted_steps: Counter[str] = Counter()
        self.pool.begin([], [(name, [0, 1, 2]) for name in self.length])
        self._deliver()

    def _deliver(self) -> None:
        for link, answer in self.answers.items():
            for message in link._outbox.take():
                answers = answer(message)
                if answers:
                    self.pool.link_received(link, answers)

    def step(self) -> None:
        names = list(self.length)
        drafts = self.pool.draft(names, LIMIT)
        self.pool.step_begins(sum(map(len, drafts)) + len(names), sum(map(len, drafts)))
        self.now += STEP_S
        rows = []
        for name, draft in zip(names, drafts, strict=True):
            here = self.length[name]
            tokens = [position % VOCAB for position in range(here, here + len(draft) + 1)]
            assert draft == tokens[:-1]
            self.drafted_steps[name] += bool(draft)
            self.length[name] += len(tokens)
            rows.append((name, tokens))
        self.pool.step(rows)
        self._deliver()

    def shares(self, *, after_s: float, steps: int = 50) -> dict[str, float]:
        """Per request, the share of ``steps`` steps that had a draft, once ``after_s`` have passed."""
        for _ in range(round(after_s / STEP_S)):
            self.step()
        self.drafted_steps.clear()
        for _ in range(steps):
            self.step()
        return {name: self.drafted_steps[name] / steps for name in self.length}
