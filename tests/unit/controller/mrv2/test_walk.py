"""The device walk against the walk of `core.block`: the kernel in Triton's interpreter, and what runs on a CPU."""

import json
import os
import random
import re
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pytest
from mrv2_env import triton_env
from walk_cases import CAPACITY, COUNTED, FILLER, LIMIT, VOCAB_SIZE, Slots, random_slots, request_states

from vllm_wanspec.controller.mrv2.memory import RING, DeviceMemory
from vllm_wanspec.controller.mrv2.walk import DeviceWalk
from vllm_wanspec.core.block import BEST, BLOCK_NODES, UNDER_ROOT, Publication, Walked, header_parts, word

SEED, COUNT = 4, 400
NO_ROW = 7
"""The row that has no slot."""
DEADLINE_S = 100
COMPILE = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from vllm_wanspec.controller.mrv2.kernel import walk_kernel
constants = dict(BLOCK=128, UNDER_ROOT=255, FOLLOW=32, LIMIT=8, COLUMNS=8, VOCAB=150_000, COUNT_DROPPED=False)
types = dict.fromkeys(walk_kernel.arg_names, "*i64") | dict.fromkeys(constants, "constexpr")
types |= {"all_token_ids": "*i32", "total_len": "*i32", "all_token_ids_stride": "i32", "drafts_stride": "i32"}
source = ASTSource(walk_kernel, types, constants)
print(json.dumps(compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]))
"""


def python(*arguments: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def slots() -> Slots:
    return random_slots(COUNT, random.Random(SEED))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interpreted")
    program, env = Path(__file__).with_name("interpreted_walk.py"), triton_env()
    # Said here too, for where Python does not look beside a program.
    env["PYTHONPATH"] += os.pathsep + str(program.parent)
    python(str(program), str(SEED), str(COUNT), str(folder), env=env)
    return folder


def check(slots: Slots, told: np.ndarray, drafts: np.ndarray) -> None:
    """Each row of a batch of all slots, in their order, is what the reference finds."""
    for slot in range(COUNT):
        if slot == NO_ROW:
            assert told[slot, 0] == 0
            assert (drafts[slot] == -1).all()
            continue
        tokens, looked_up = slots.expected(slot)
        filled = [*tokens, *[FILLER] * (LIMIT - len(tokens))]
        assert told[slot].tolist() == [len(tokens) | looked_up << 8, *filled], slot
        assert drafts[slot].tolist() == [*filled, -1], slot
        assert all(0 <= token < VOCAB_SIZE for token in filled)


def test_the_slots_are_of_all_kinds(slots: Slots) -> None:
    """Each number is of slots without which the tests below could not fail."""
    walks = [slots.expected(slot) for slot in range(COUNT)]
    headers = [header_parts(int(header)) for header in slots.headers]
    assert sum(len(found.tokens) == LIMIT for found in walks) > 15
    assert sum(0 < len(found.tokens) < LIMIT for found in walks) > 60
    assert sum(not found.tokens for found in walks) > 60
    assert sum(found.looked_up > 0 for found in walks) > 40
    assert sum(slots.followed(slot) > 1 and bool(walks[slot].tokens) for slot in range(COUNT)) > 20
    assert sum(slots.dropped(slot) > 0 and bool(walks[slot].tokens) for slot in range(COUNT)) > 30
    assert sum(header.nodes > BLOCK_NODES for header in headers) > 10
    assert sum(header.nodes == BLOCK_NODES for header in headers) > 5
    assert sum(header.root > CAPACITY for header in headers) > 20


def test_the_kernel_finds_what_the_reference_finds(slots: Slots, interpreted: Path) -> None:
    check(slots, np.load(interpreted / "told.npy"), np.load(interpreted / "drafts.npy"))


def test_the_kernel_counts_what_it_drops_also_over_copies(slots: Slots, interpreted: Path) -> None:
    told = np.load(interpreted / "counted.npy")
    for row in range(COUNTED):
        slot = COUNT - 1 - row
        tokens, looked_up = slots.expected(slot)
        head = len(tokens) | looked_up << 8 | slots.dropped(slot) << 16
        assert told[row, : 1 + len(tokens)].tolist() == [head, *tokens]


def test_the_kernel_compiles_for_a_gpu_and_waits_for_nothing(tmp_path: Path) -> None:
    env = triton_env() | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ptx = json.loads(python("-c", COMPILE, env=env))
    # The header once, and four words a lane.
    assert len(re.findall(r"ld\.volatile\.global\.b64", ptx)) == 1 + BLOCK_NODES // 32
    # A warp alone: no barrier, no atomic, no fence, no local memory for what did not fit.
    assert not re.findall(r"\b(?:bar|barrier|atom|red|membar|fence|local)\b", ptx)


def test_on_a_cpu_the_reference_walks(slots: Slots) -> None:
    import torch

    cpu = torch.device("cpu")
    memory, states = DeviceMemory.allocate(COUNT, LIMIT, cpu), request_states(slots)
    memory.headers[:], memory.words[:] = slots.headers, slots.words
    rows = torch.arange(COUNT)
    rows[NO_ROW] = -1
    DeviceWalk(memory, states, LIMIT, VOCAB_SIZE, cpu).launch(rows, RING - 1)
    check(slots, memory.told(RING - 1), states.draft_tokens.numpy())
    told = memory.told_drafts(RING - 1, COUNT)
    assert all(told[slot] == slots.expected(slot) for slot in range(COUNT) if slot != NO_ROW)
    assert not memory.told(0).any()


def test_rows_are_told_in_the_order_of_the_batch(slots: Slots) -> None:
    import torch

    cpu = torch.device("cpu")
    memory, states = DeviceMemory.allocate(COUNT, LIMIT, cpu), request_states(slots)
    memory.headers[:], memory.words[:] = slots.headers, slots.words
    walk = DeviceWalk(memory, states, LIMIT, VOCAB_SIZE, cpu)
    walk.launch(torch.tensor([5, 2, 9]), 1)
    assert memory.told_drafts(1, 4) == [*map(slots.expected, (5, 2, 9)), Walked([], 0)]
    assert (states.draft_tokens[[5, 2, 9], :LIMIT] >= 0).all()
    assert (states.draft_tokens[[0, 1, 3, 4]] == -1).all()
    walk.launch(torch.tensor([], dtype=torch.int64), 1)
    assert memory.told_drafts(1, 1) == [slots.expected(5)]


def test_a_walk_sees_what_has_been_published(slots: Slots) -> None:
    import torch

    cpu = torch.device("cpu")
    memory, states = DeviceMemory.allocate(COUNT, LIMIT, cpu), request_states(slots)
    publication = Publication(memory.headers, memory.words)
    states.total_len.gpu[2] = 10
    publication.publish(2, 10, array("q", [word(UNDER_ROOT, 4, 255, BEST), word(0, 1, 200, BEST)]))
    walk = DeviceWalk(memory, states, LIMIT, VOCAB_SIZE, cpu)
    walk.launch(torch.tensor([2]), 0)
    assert memory.told_drafts(0, 1) == [([4, 1], 0)]
    publication.clear(2)
    walk.launch(torch.tensor([2]), 0)
    assert memory.told_drafts(0, 1) == [([], 0)]


def test_memory_of_another_limit_is_refused(slots: Slots) -> None:
    import torch

    cpu = torch.device("cpu")
    states = request_states(slots)
    with pytest.raises(ValueError, match="a limit of 4 tokens for memory that holds 5"):
        DeviceWalk(DeviceMemory.allocate(8, LIMIT, cpu), states, 4, VOCAB_SIZE, cpu)
    with pytest.raises(ValueError, match="and drafts of 6"):
        DeviceWalk(DeviceMemory.allocate(8, 7, cpu), states, 7, VOCAB_SIZE, cpu)
    with pytest.raises(ValueError, match=r"outside 1\.\.255"):
        DeviceMemory.allocate(8, 256, cpu)
