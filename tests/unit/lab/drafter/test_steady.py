"""The width bench's steady load: what is found in arrivals of tokens, and rounds on a toy drafter."""

from __future__ import annotations

import asyncio
import itertools

import aiohttp
import pytest
from toys import FINGERPRINT, VOCAB_SIZE, DrafterServer, draft_model, toy, wait_until

from vllm_wanspec.core.messages import Nodes
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.lab.drafter.loads import MAX_NODES, STEADY_LOOKAHEAD, Drafter, SteadyLoad
from vllm_wanspec.lab.drafter.steady import SHORTEST_STEPS, SteadyWorkload, Trace, cpu_between, phases, summary
from vllm_wanspec.lab.drafter.width_figures import SteadyRow
from vllm_wanspec.lab.harness.cpu import CpuClock
from vllm_wanspec.sim.controller import DrafterError, DraftTokenizer, playing

TOKENIZER = DraftTokenizer(FINGERPRINT, lambda text: [ord(letter) % VOCAB_SIZE for letter in text])


def nodes(*pairs: tuple[int, int]) -> Nodes:
    """Nodes with an id and a parent."""
    return Nodes(1, 4, tuple(NodeRecord(node, parent, node % 7, -0.5, 1.0) for node, parent in pairs))


def every(step_s: float, first_s: float, tokens: int) -> list[float]:
    return [first_s + step_s * index for index in range(tokens)]


def test_the_widest_session_fits_the_budget() -> None:
    load = SteadyLoad()
    assert 63 * load.branch_depth + STEADY_LOOKAHEAD < 0.85 * MAX_NODES
    assert (load.limits(64).running_branches, load.limits(64).max_nodes) == (64, MAX_NODES)


def test_tokens_are_told_from_leaves() -> None:
    trace = Trace(0.0, depth=2, width=2)
    trace.receive(nodes((1, 0), (2, 0)), 1.0)  # the main line, and a leaf
    assert (trace.running, trace.enough_s) == (1, None)
    trace.receive(nodes((3, 1), (4, 1)), 2.0)
    trace.receive(nodes((5, 2), (6, 2)), 2.5)  # the leaf has become a branch
    assert (trace.running, trace.enough_s) == (2, 2.5)
    trace.receive(nodes((7, 3), (8, 5)), 3.0)  # the branch's second and last token
    assert trace.branches == [[1.0, 2.0, 3.0], [2.5, 3.0]]
    assert (trace.running, trace.enough_s, trace.last_s) == (1, 3.0, 3.0)


def test_a_main_line_ends_at_the_lookahead() -> None:
    trace = Trace(0.0, depth=2, width=1)
    for token in range(STEADY_LOOKAHEAD - 1):
        trace.receive(nodes((token + 1, token)), 1.0 + token)
    assert trace.running == 1
    trace.receive(nodes((STEADY_LOOKAHEAD, STEADY_LOOKAHEAD - 1)), 999.0)
    assert trace.running == 0


def test_only_the_time_of_enough_branches_counts() -> None:
    slow, fast = every(0.2, 0.0, 40), every(0.01, 2.0, 101)  # alone until 2.0 and after 3.0
    second = every(0.01, 2.0, 101)
    [phase] = phases([slow, fast, second], 3)
    assert (phase.begin_s, phase.end_s) == pytest.approx((2.0, 3.0))
    assert phase.branch_s == pytest.approx(3.0)
    assert sum(phase.gaps_s) / len(phase.gaps_s) == pytest.approx((200 * 0.01 + 5 * 0.2) / 205)
    assert (phase.tokens, phase.starts) == (205, 0)
    assert phases([slow, fast, second], 4) == []


def test_a_branch_that_follows_another_is_no_gap() -> None:
    main = every(0.01, 0.0, 300)
    others = [every(0.01, 0.5 + 0.4 * index, 36) for index in range(3)]  # 50 ms between one and the next
    found = phases([main, *others], 2)
    assert [len(phase.gaps_s) for phase in found] == [70, 70, 70]
    assert all(gap == pytest.approx(0.01) for phase in found for gap in phase.gaps_s)


def test_nearly_all_branches_are_enough_and_a_new_one_is_a_start() -> None:
    lasting = [every(0.01, 0.0, 101) for _ in range(9)]
    [phase] = phases([*lasting, every(0.01, 0.5, 20)], 10)
    assert phase.starts == 1
    assert phase.branch_s == pytest.approx(9 * 1.0 + 0.19)
    assert len(phase.gaps_s) == 900 + 19


def test_short_phases_are_left_out() -> None:
    assert phases([every(0.01, 0.0, SHORTEST_STEPS)], 1) == []
    assert len(phases([every(0.01, 0.0, SHORTEST_STEPS + 1)], 1)) == 1


def test_processor_time_between_two_moments() -> None:
    samples = [(1.0, {"api": 10.0}), (2.0, {"api": 10.5}), (4.0, {"api": 12.5})]
    assert cpu_between(samples, "api", 1.5, 3.0) == pytest.approx(1.25)
    assert cpu_between(samples, "api", 0.0, 9.0) == pytest.approx(2.5)
    assert cpu_between(samples, "engine", 1.0, 4.0) == 0.0
    assert cpu_between([], "api", 1.0, 4.0) == 0.0


def test_a_window_s_figures() -> None:
    found = phases([every(0.01, 0.0, 201)], 1) + phases([every(0.02, 10.0, 101)], 1)
    samples = [(at_s, {"api": 0.25 * at_s, "engine": 0.5 * at_s, "core": 0.8 * at_s}) for at_s in range(15)]
    row = summary(1, 2, found, samples)
    assert (row.width, row.rounds, row.measured_s) == pytest.approx((1, 2, 4.0))
    assert row.running == pytest.approx(1.0)
    assert row.step_ms == pytest.approx(1e3 * 4.0 / 300)
    assert row.events_per_s == pytest.approx(75.0)
    assert (row.api_cpu, row.engine_cpu, row.others_cpu) == pytest.approx((0.25, 0.5, 0.05))


def test_a_window_without_a_phase_is_all_zero() -> None:
    row = summary(8, 3, [], [])
    assert row.step_ms == row.events_per_s == row.api_cpu == row.running == 0.0
    assert not row.is_near


def workload(http: aiohttp.ClientSession, server: DrafterServer, load: SteadyLoad) -> SteadyWorkload:
    texts = itertools.cycle([[1] * 50, [2] * 50])
    return SteadyWorkload(Drafter(http, server.url, TOKENIZER, texts, CpuClock()), load)


@pytest.mark.parametrize("width", [1, 8])
def test_rounds_on_a_toy_drafter(width: int) -> None:
    async def run() -> SteadyRow:
        async with asyncio.timeout(30.0), aiohttp.ClientSession() as http:
            return await workload(http, server, SteadyLoad(branch_depth=40)).window(width, 1.0)

    with DrafterServer(toy(), model=draft_model(max_context=400), pace=Pacing(2.0)) as server:
        row = asyncio.run(run())
        wait_until(lambda: server.sessions == 0)
    assert row.rounds >= 1
    assert row.measured_s > 0.0
    assert row.is_near
    assert row.step_ms >= 1.9
    assert row.events_per_s * row.step_ms == pytest.approx(1e3 * row.running, rel=0.15)


def test_a_lost_drafter_is_told() -> None:
    async def run() -> None:
        async with asyncio.timeout(30.0), aiohttp.ClientSession() as http:
            task = asyncio.create_task(workload(http, server, SteadyLoad()).window(4, 60.0))
            while not server.sessions:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(server.stop)
            with pytest.raises(DrafterError, match="broke"):
                await task

    with DrafterServer(toy()) as server:
        asyncio.run(run())


def test_the_load_ends_with_the_block() -> None:
    async def run() -> None:
        async with asyncio.timeout(30.0), aiohttp.ClientSession() as http:
            async with playing(workload(http, server, SteadyLoad()).play(4)):
                while not server.sessions:
                    await asyncio.sleep(0.001)

    with DrafterServer(toy()) as server:
        asyncio.run(run())
        wait_until(lambda: server.sessions == 0)
