"""What benches ask of a drafter: sessions that branch at every position, on contexts of held-out text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import aiohttp

from vllm_wanspec.core.messages import Limits
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.cpu import CpuClock
from vllm_wanspec.lab.harness.models import read_prompts
from vllm_wanspec.sim.controller import DrafterClient, DraftTokenizer, Tally

CONTEXT_TOKENS = 400
MAX_NODES = 4096
#: Tokens that the drafter asks of its engine at a time: a longer main line would be interrupted by a new start.
STEADY_LOOKAHEAD = 256
#: Between a commit and the next: the step of the target that is played.
COMMIT_INTERVAL_S = 0.04
#: A draft that is further ahead than this is committed at once, so that its lookahead never ends it.
LONGEST_LEAD = 128


@dataclass(frozen=True)
class SteadyLoad:
    """What sessions ask for whose branches all run, with nothing committed.

    Args:
        branch_depth: Tokens of a side branch. The budget of nodes must hold this much for each of the widest session's
            branches, its main line, and the leaves between them.
        max_branches: Tokens followed at each position: few leaves, so that the budget goes into branches.
    """

    branch_depth: int = 48
    max_branches: int = 2
    lookahead: ClassVar[int] = STEADY_LOOKAHEAD

    def limits(self, width: int) -> Limits:
        """Those of a session that branches at every position, and runs ``width`` branches if it can."""
        return Limits(
            lookahead=self.lookahead,
            max_nodes=MAX_NODES,
            max_branches=self.max_branches,
            running_branches=width,
            branch_depth=self.branch_depth,
            entropy_threshold_nats=0.0,
            min_probability=0.0,
        )


@dataclass(frozen=True)
class ChurningLoad(SteadyLoad):
    """What a session asks for whose commits of at most so many tokens start and stop branches all the time."""

    branch_depth: int = 16
    max_branches: int = 8
    commit_tokens: int = 1
    lookahead: ClassVar[int] = LONGEST_LEAD + 64


@dataclass(frozen=True, slots=True)
class Drafter:
    """A running drafter, and what it takes to load and watch it.

    Args:
        http: Open aiohttp session.
        url: Its base URL.
        tokenizer: Of its model.
        texts: Contexts in token ids, one after another.
        cpu: Reads its processes' time.
    """

    http: aiohttp.ClientSession
    url: str
    tokenizer: DraftTokenizer
    texts: Iterator[list[int]]
    cpu: CpuClock

    def connect(self, tally: Tally | None = None) -> AbstractAsyncContextManager[DrafterClient]:
        """Connect to it; see `DrafterClient.connect`."""
        return DrafterClient.connect(self.http, self.url, self.tokenizer.fingerprint, tally=tally)


def contexts(prompts: Path, tokenizer: DraftTokenizer, tokens: int = CONTEXT_TOKENS) -> list[list[int]]:
    """Contexts of equal length, each beginning with another held-out prompt.

    Raises:
        ConfigError: The file cannot be read, is malformed, or empty.
    """
    ids = [tokenizer.encode(prompt.text) for prompt in read_prompts(prompts, None)]
    if not any(ids):
        raise ConfigError(f"prompts: {prompts} has no text")
    endless = (itertools.islice(itertools.cycle(ids), first, None) for first in range(len(ids)))
    return [list(itertools.islice(itertools.chain.from_iterable(texts), tokens)) for texts in endless]
