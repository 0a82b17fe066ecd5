"""The litmus test's judgement, on the CPU: it passes sound walks and finds each kind of unsound one."""

import random

import numpy as np
import pytest
import walk_litmus
from walk_litmus import (
    CONTEXT,
    CONTEXT_TOKEN,
    FILLER,
    HOT_SLOTS,
    LIMIT,
    PLACE_BITS,
    SLOTS,
    VOCAB_SIZE,
    Tally,
    Writer,
)

from vllm_wanspec.core.block import BLOCK_NODES, MAX_TOKEN, Publication, walk


class Stage:
    """A writer, and the reference walk in place of the kernel."""

    def __init__(self) -> None:
        self.headers, self.words = np.zeros(SLOTS, np.int64), np.zeros((SLOTS, 2, BLOCK_NODES), np.int64)
        self.writer = Writer(Publication(self.headers, self.words), random.Random(1))
        self.slots = np.arange(2 * HOT_SLOTS) % HOT_SLOTS
        self.before = self.writer.latest.copy()

    def told(self) -> np.ndarray:
        """What one batch of walks tells."""
        rows = []
        for slot in self.slots:
            header = int(self.headers[slot])
            words = self.words[slot, header & 1].tolist()
            tokens = walk(header, words, [CONTEXT_TOKEN] * CONTEXT, CONTEXT, LIMIT, VOCAB_SIZE).tokens
            rows.append([len(tokens), *tokens, *[FILLER] * (LIMIT - len(tokens))])
        return np.array([rows], np.int64)

    def violations(self, told: np.ndarray) -> int:
        tally = Tally()
        tally.add(told, self.slots, self.writer, self.before)
        assert tally.walks == len(self.slots)
        return tally.violations


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_all_tokens_fit_a_word() -> None:
    assert VOCAB_SIZE - 1 <= MAX_TOKEN


def test_sound_walks_are_no_violations(stage: Stage) -> None:
    tally = Tally()
    for _ in range(200):
        before = stage.writer.latest.copy()
        stage.writer.step()
        tally.add(stage.told(), stage.slots, stage.writer, before)
    assert (tally.walks, tally.violations, tally.words_dropped) == (200 * len(stage.slots), 0, 0)
    assert tally.shortened == 0
    assert tally.without_draft < tally.walks / 2


def test_a_draft_that_ends_early_is_counted(stage: Stage) -> None:
    told = stage.told()
    [longest] = np.flatnonzero(told[0, :, 0] == told[0, :, 0].max())[:1]
    assert told[0, longest, 0] > 1
    told[0, longest, 0] -= 1
    told[0, longest, told[0, longest, 0] + 1] = FILLER
    told[0, longest, 0] |= 7 << 16
    tally = Tally()
    tally.add(told, stage.slots, stage.writer, stage.before)
    assert (tally.violations, tally.shortened, tally.words_dropped) == (0, 1, 7)


@pytest.mark.parametrize("column", [1, 2])
@pytest.mark.parametrize(
    "other",
    [
        lambda token: token + 1,
        lambda token: token - (1 << PLACE_BITS),
        lambda token: CONTEXT_TOKEN,
        lambda token: MAX_TOKEN,
        lambda token: -1,
    ],
    ids=["place", "publication", "context", "outside", "negative"],
)
def test_one_wrong_token_is_a_violation(stage: Stage, column: int, other) -> None:
    told = stage.told()
    [row] = np.flatnonzero(told[0, :, 0] >= 2)[:1]
    told[0, row, column] = other(told[0, row, column])
    assert stage.violations(told) == 1


def test_a_draft_of_another_slot_is_a_violation(stage: Stage) -> None:
    told = stage.told()
    row = next(row for row in range(1, len(stage.slots)) if told[0, row, 0] and told[0, row - 1, 0])
    told[0, row] = told[0, row - 1]
    assert stage.violations(told) == 1


def test_an_old_draft_is_a_violation(stage: Stage) -> None:
    told = stage.told()
    drafted = {int(slot) for slot, found in zip(stage.slots, told[0, :, 0], strict=True) if found}
    slot = min(drafted)
    while stage.writer.latest[slot] == stage.before[slot]:
        stage.writer.step()
    assert stage.violations(told) == 0  # as old as the launch: a reader may have seen it
    stage.before = stage.writer.latest.copy()
    assert stage.violations(told) >= 2


def test_a_row_that_no_walk_wrote_is_a_violation(stage: Stage) -> None:
    told = stage.told()
    told[0, 3] = -1
    assert stage.violations(told) == 1


def test_a_place_without_a_draft_has_the_filler(stage: Stage) -> None:
    told = stage.told()
    told[0, :, 0] = 0
    assert stage.violations(told) == int((told[0, :, 1] != FILLER).sum()) > 0


def test_numbers_must_not_come_round_within_a_batch(stage: Stage) -> None:
    stage.writer.published += walk_litmus.NUMBERS
    with pytest.raises(RuntimeError, match="come round"):
        stage.violations(stage.told())


def test_the_writer_can_be_held(stage: Stage) -> None:
    stage.writer.start()
    for _ in range(3):
        stage.writer.hold()
        published = stage.writer.published
        told = stage.told()
        assert stage.violations(told) == 0
        assert stage.writer.published == published
        stage.writer.go_on()
    stage.writer.stop()
    assert stage.writer.published > SLOTS


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(walk_litmus, "missing", lambda: "torch finds no GPU")
    assert walk_litmus.main([]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == "walk_litmus: torch finds no GPU: this needs an NVIDIA GPU, torch and Triton\n"
