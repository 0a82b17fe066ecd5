"""A program: the walk's kernel in Triton's interpreter, over the slots that `walk_cases` makes of a seed.

``interpreted_walk.py SEED SLOTS FOLDER`` writes ``told.npy`` and ``drafts.npy``, and ``counted.npy``: what a second
walk tells, of the last slots first, over memory that the device has copies of, with dropped words counted.
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from walk_cases import COUNTED, LIMIT, VOCAB_SIZE, random_slots, request_states

from vllm_wanspec.controller.mrv2.memory import DeviceMemory
from vllm_wanspec.controller.mrv2.walk import DeviceWalk


def main(seed: int, count: int, folder: Path) -> None:
    slots = random_slots(count, random.Random(seed))
    cpu = torch.device("cpu")
    states = request_states(slots)
    rows = torch.arange(count)
    rows[7] = -1

    memory = DeviceMemory.allocate(count, LIMIT, cpu)
    memory.headers[:], memory.words[:] = slots.headers, slots.words
    DeviceWalk(memory, states, LIMIT, VOCAB_SIZE, cpu).run_kernel(rows, 2)
    np.save(folder / "told.npy", memory.told(2))
    np.save(folder / "drafts.npy", states.draft_tokens.numpy())

    copied = DeviceMemory(count, LIMIT, cpu, None)
    copied.headers[:], copied.words[:] = slots.headers, slots.words
    last = torch.arange(count - 1, count - 1 - COUNTED, -1)
    DeviceWalk(copied, states, LIMIT, VOCAB_SIZE, cpu).run_kernel(last, 0, count_dropped=True)
    np.save(folder / "counted.npy", copied.told(0))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
