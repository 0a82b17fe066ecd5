"""The ideal at the width used against the drafter that runs live: its session, without overhead of engine and link.

The engine gives every running branch a token each forward, and begins one the moment that it is asked to. So with
places for all branches the session is as fast as the ideal, and with fewer never faster.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_wanspec.core.analysis.ideal import Width, ideal_decode_ms
from vllm_wanspec.core.drafter import Action, DrafterSession, DraftStep, StartBranch, StopBranch
from vllm_wanspec.core.messages import Commit, Limits, Nodes, Open
from vllm_wanspec.core.tree import DraftTree

VOCAB_SIZE = 10_000
PROMPT = (9_999,)
LIMIT = 4
TARGET_MS, DRAFT_MS = 30.0, 5.0
LOGPROBS = tuple(log(share) for share in (0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.04, 0.02))
NODES_FIRST = {"engine": 0, "arrival": 1, "told": 2, "step": 3}
"""What comes first at the same moment: a draft that arrives when a step begins is there."""


class Run:
    """One text, from its first token on; token i of the text is i."""

    def __init__(self, ranks: Sequence[int | None], rtt_ms: float, width: Width, places: int) -> None:
        assert width.alternatives is not None and width.depth is not None
        self.ranks, self.one_way_ms = ranks, rtt_ms / 2.0
        limits = Limits(60, 4000, width.alternatives, places, width.depth)
        self.drafter = DrafterSession(Open(1, PROMPT, limits), vocab_size=VOCAB_SIZE, max_context=1000)
        self.tree = DraftTree(len(PROMPT), vocab_size=VOCAB_SIZE, max_nodes=4000)
        self.events: list[tuple[float, int, int, Callable[[float], None]]] = []
        self.order = count()
        self.branches: dict[int, tuple[list[int], int]] = {}
        self.committed = 0

    def decode_ms(self) -> float:
        """From the first token to the last."""
        self.at(self.one_way_ms - TARGET_MS, "told", lambda now: self.do(self.drafter.start(now), now))
        self.at(0.0, "step", lambda now: self.commit(1, now))
        while True:
            now, _, _, event = heapq.heappop(self.events)
            event(now)
            if self.committed == len(self.ranks):
                return now

    def at(self, when: float, kind: str, event: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (when, NODES_FIRST[kind], next(self.order), event))

    def commit(self, number: int, now: float) -> None:
        position = len(PROMPT) + self.committed
        tokens = tuple(range(self.committed, min(self.committed + number, len(self.ranks))))
        self.committed += len(tokens)
        self.tree.commit(tokens)
        message = Commit(1, position, tokens)
        self.at(now + self.one_way_ms, "told", lambda then: self.do(self.drafter.committed(message, then), then))
        self.at(now, "step", self.step)

    def step(self, now: float) -> None:
        draft, _, _ = self.tree.draft(LIMIT)
        right = 0
        while right < len(draft) and draft[right] == self.committed + right:
            right += 1
        self.at(now + TARGET_MS, "step", lambda then: self.commit(right + 1, then))

    def do(self, actions: Iterable[Action], now: float) -> None:
        for action in actions:
            match action:
                case StartBranch(branch=branch):
                    self.branches[branch] = (action.tokens, action.max_tokens)
                    self.extend(branch, now)
                case StopBranch(branch):
                    del self.branches[branch]
                case Nodes():
                    self.at(now + self.one_way_ms, "arrival", lambda _, sent=action: self.arrived(sent))
                case _:
                    raise AssertionError(action)

    def arrived(self, sent: Nodes) -> None:
        self.tree.catch_up(sent.seen)
        self.tree.append(sent.nodes)

    def extend(self, branch: int, now: float) -> None:
        self.at(now + DRAFT_MS, "engine", lambda then: self.drafted(branch, then))

    def drafted(self, branch: int, now: float) -> None:
        if branch not in self.branches:
            return
        tokens, left = self.branches[branch]
        step = self.distribution(tokens)
        tokens.append(step.token)
        self.branches[branch] = (tokens, left - 1)
        if left > 1:
            self.extend(branch, now)
        self.do(self.drafter.drafted(branch, [step], now), now)
        if left == 1 and self.branches.pop(branch, None):
            self.do(self.drafter.ended(branch, now), now)

    def distribution(self, tokens: Sequence[int]) -> DraftStep:
        """The text's own token at its place among tokens of no other use; one certain token off the text."""
        index = len(tokens) - len(PROMPT)
        others = list(range(100 + 10 * index, 108 + 10 * index))
        if index >= len(self.ranks) or list(tokens[len(PROMPT) :]) != list(range(index)):
            return DraftStep(others[0], -0.01, 0.01)
        rank = self.ranks[index]
        if rank is not None:
            others[rank] = index
        ranked = list(zip(others, LOGPROBS, strict=True))
        return DraftStep(*ranked[0], 2.0, tuple(ranked[1:]))


def ideal_ms(ranks: Sequence[int | None], rtt_ms: float, width: Width) -> float:
    return ideal_decode_ms(
        ranks,
        len(PROMPT),
        rtt_ms=rtt_ms,
        target_ms=lambda tokens: TARGET_MS,
        draft_ms=lambda tokens: DRAFT_MS,
        limit=LIMIT,
        width=width,
    )


RANKS = st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 1, 2, 3, None]), min_size=1, max_size=16)
WIDTHS = st.builds(Width, st.integers(1, 4), st.none(), st.integers(1, 4))
RTTS_MS = st.sampled_from([0.0, 10.0, 20.0, 50.0, 100.0])


@given(RANKS, RTTS_MS, WIDTHS)
@settings(deadline=None)
def test_with_places_for_all_branches_the_live_drafter_is_as_fast(
    ranks: list[int | None], rtt_ms: float, width: Width
) -> None:
    assert Run(ranks, rtt_ms, width, 200).decode_ms() == ideal_ms(ranks, rtt_ms, width)


@given(RANKS, RTTS_MS, WIDTHS, st.integers(1, 6))
@settings(deadline=None)
def test_with_fewer_it_is_never_faster(ranks: list[int | None], rtt_ms: float, width: Width, places: int) -> None:
    assert Run(ranks, rtt_ms, width, places).decode_ms() >= ideal_ms(ranks, rtt_ms, width)


def test_a_scarcity_of_places_is_what_the_ideal_leaves_out() -> None:
    ranks, width = (0, 1, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0), Width(4, None, 8)
    assert Run(ranks, 20.0, width, 2).decode_ms() > ideal_ms(ranks, 20.0, width)


@pytest.mark.parametrize(("depth", "expected_ms"), [(1, 120.0), (2, 90.0), (8, 60.0)])
def test_a_branch_of_the_live_drafter_rests_as_drawn(depth: int, expected_ms: float) -> None:
    assert Run((0, 2, 0, 0, 0, 0, 0), 20.0, Width(4, None, depth), 200).decode_ms() == expected_ms
