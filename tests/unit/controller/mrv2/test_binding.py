"""What the host writes into the runner's slots."""

import numpy as np
import pytest
import torch

from vllm_wanspec.controller.mrv2.binding import FILLING, HostBinding

SLOTS, MOST, UNTOUCHED = 6, 4, 99


class Pool:
    """Gives drafts that came meanwhile."""

    def __init__(self, drafts: list[list[int]]) -> None:
        self.drafts = drafts
        self.asked: list[list[int]] = []

    def draft_again(self, requests: list[str], lengths: list[int]) -> list[list[int]]:
        self.asked.append(lengths)
        return self.drafts


def bound(placed: list[list[int]], fixed: bool, pool: Pool) -> tuple[list[list[int]], torch.Tensor]:
    """What is in the slots of three rows, and all slots."""
    tokens = torch.full((SLOTS, MOST), UNTOUCHED, dtype=torch.int64)
    slots = np.array([4, 0, 2])
    HostBinding(pool, tokens).bind(["a", "b", "c"], slots, placed, fixed)  # type: ignore[arg-type]
    return tokens[torch.as_tensor(slots)].tolist(), tokens


@pytest.mark.parametrize("fixed", [False, True])
def test_a_placeholder_never_gets_into_a_slot(fixed: bool) -> None:
    placed = [[-1] * MOST, [7, 8, -1, -1], []]
    pool = Pool([[], [7, 9], []])
    rows, tokens = bound(placed, fixed, pool)
    assert rows == [[FILLING] * MOST, [7, 8 if fixed else 9, FILLING, FILLING], [FILLING] * MOST]
    assert pool.asked == ([] if fixed else [[MOST, MOST, 0]])
    assert (tokens[[1, 3, 5]] == UNTOUCHED).all()


def test_a_short_draft_is_filled_up_with_an_ordinary_token() -> None:
    rows, _ = bound([[5, 6], [1], [2, 3, 4, 5]], True, Pool([]))
    assert rows == [[5, 6, FILLING, FILLING], [1, FILLING, FILLING, FILLING], [2, 3, 4, 5]]
