"""DrafterSession's side branches: where they start and what bounds them."""

import math
import random

import pytest
from branch_play import PROMPT, Play, even_step, started
from toys import toy

from vllm_wanspec.core.drafter import DraftStep
from vllm_wanspec.core.states import DrafterState

TOY = toy(seed=3)


# Where branches start


def test_a_branch_starts_at_each_alternative_while_there_are_places() -> None:
    play = Play(running_branches=4)
    actions = play.advance(1)
    assert [play.tokens_of(start) for start in started(actions)] == [[103], [203], [303]]
    assert play.running == [1, 2, 3, 4]
    assert [start.node for start in started(actions)] == [2, 3, 4]  # node 1 is the main line's
    assert {start.max_tokens for start in started(actions)} == {3}  # the branch depth


@pytest.mark.parametrize(
    ("entropy", "threshold", "branches"),
    [(1.0, 0.0, True), (1.0, 1.0, True), (0.999, 1.0, False), (1.0, math.inf, False), (0.0, 0.0, True)],
)
def test_branches_start_from_the_entropy_threshold_on(entropy: float, threshold: float, branches: bool) -> None:
    def step(context: list[int]) -> DraftStep:
        even = even_step(context)
        return DraftStep(even.token, even.logprob, entropy, even.alternatives)

    play = Play(step=step, entropy_threshold_nats=threshold)
    play.advance(1)
    assert (len(play.running) > 1) is branches
    assert (len(play.nodes) > 1) is branches  # nor do the alternatives travel


def test_an_adaptive_threshold_follows_what_the_target_takes() -> None:
    play = Play(entropy_threshold_nats=None, running_branches=4)
    for _ in range(100):  # at one nat the target always takes the draft model's best
        play.calibration.saw_outcome(1.0, 0)
    play.advance(1)
    assert play.running == [1]
    for _ in range(100):  # and then it does no more
        play.calibration.saw_outcome(1.0, 3)
    play.advance(1)
    assert len(play.running) == 4


@pytest.mark.parametrize(("least", "expected"), [(0.0, 3), (0.1, 2), (0.2, 1), (0.3, 0)])
def test_improbable_alternatives_are_left_out(least: float, expected: int) -> None:
    play = Play(min_probability=least)  # 0.25, 0.125 and 0.0625 are there
    play.advance(1)
    assert len(play.running) == 1 + expected
    assert len(play.nodes) == 1 + expected


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_at_most_max_branches_tokens_of_a_position_are_followed(width: int) -> None:
    play = Play(max_branches=width)
    play.advance(1)
    assert len(play.nodes) == len(play.running) == width


def test_the_most_probable_branch_starts_first_whatever_its_position() -> None:
    def step(context: list[int]) -> DraftStep:
        if len(context) == 3:
            return DraftStep(3, math.log(0.9), 1.0, ((103, math.log(0.02)),))
        return DraftStep(len(context), math.log(0.5), 1.0, ((len(context) + 100, math.log(0.4)),))

    play = Play(step=step, width=1)
    play.advance(1, 3)
    play.do(play.session.resize(4, 0.0))
    # 0.9 x 0.4, then 0.9 x 0.5 x 0.4, and only then the 0.02 that was there first.
    assert [play.tokens_of(start) for start in play.starts[1:]] == [[3, 104], [3, 4, 105], [103]]


def test_the_order_is_that_of_calibrated_probabilities() -> None:
    def step(context: list[int]) -> DraftStep:
        return DraftStep(len(context), math.log(0.5), 1.0, ((100, math.log(0.25)), (101, math.log(0.02))))

    play = Play(step=step, width=1)
    weak = play.calibration.bucket(math.log(0.02), best=False)
    strong = play.calibration.bucket(math.log(0.25), best=False)
    for _ in range(500):  # the target takes what the draft model thinks improbable, and not the other
        play.calibration.saw(weak, True)
        play.calibration.saw(strong, False)
    play.advance(1)
    play.do(play.session.resize(2, 0.0))
    assert play.tokens_of(play.starts[-1]) == [101]


def test_hopeless_branches_wait_until_commits_make_them_likely() -> None:
    def step(context: list[int]) -> DraftStep:
        if len(context) == 7:
            return DraftStep(7, math.log(0.5), 2.0, ((107, math.log(0.3)),))
        return DraftStep(len(context), math.log(0.2), 0.1)

    play = Play(step=step, lookahead=12, entropy_threshold_nats=1.0, min_probability=0.01)
    play.advance(1, 5)
    assert play.running == [1]  # 0.2 to the fourth times 0.3
    actions = play.commit(3, 4, 5)
    assert [play.tokens_of(start) for start in started(actions)] == [[3, 4, 5, 6, 107]]


# What bounds them


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("lookahead", [2, 6, 12])
def test_one_place_is_the_main_line_s_even_while_it_rests(width: int, lookahead: int) -> None:
    rng = random.Random(width)
    play = Play(step=TOY.step, width=width, lookahead=lookahead)
    context, most, rests = list(PROMPT), 0, 0
    for turn in range(400):  # busy commits and quiet times in turn
        if play.running and rng.random() < (0.6, 0.98)[turn // 100 % 2]:
            play.advance(rng.choice(play.running))
        else:
            tokens = TOY.verify(context, [node.token for node in play.session.tree.best_path(rng.randrange(4))])
            context += tokens
            play.commit(*tokens)
        assert len(play.sides) <= width - 1
        assert len(play.running) <= width
        most = max(most, len(play.running))
        rests += len(play.running) == len(play.sides) > 0
    assert most == width
    assert rests > 0 or width == 1


def test_a_server_s_width_and_the_controller_s_wish_both_bind() -> None:
    assert Play(width=3, running_branches=8).session.width == 3
    assert Play(width=30, running_branches=8).session.width == 8
    assert Play(width=None, running_branches=8).session.width == 8


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_branches_end_at_their_depth(depth: int) -> None:
    play = Play(branch_depth=depth, max_branches=2, running_branches=2, lookahead=12)
    play.advance(1)
    [side] = play.starts[1:]
    assert side.max_tokens == depth
    play.advance(side.branch, depth)
    assert side.branch not in play.running
    assert side.branch not in play.stops


def test_branches_end_at_the_lookahead() -> None:
    play = Play(branch_depth=8, lookahead=5, max_branches=2, running_branches=64)
    play.settle()
    positions = {n.id: 0 for n in play.nodes} | {0: 0}
    for node in play.nodes:
        positions[node.id] = positions[node.parent] + 1
    assert max(positions.values()) == 5
    for start in play.starts[1:]:
        assert len(start.tokens) + start.max_tokens <= len(PROMPT) + 5
        assert start.max_tokens >= 1


def test_branches_end_at_the_draft_model_s_longest_context() -> None:
    play = Play(branch_depth=8, lookahead=20, max_context=len(PROMPT) + 6, running_branches=64)
    play.settle()
    assert max(len(start.tokens) + start.max_tokens for start in play.starts) == len(PROMPT) + 6


def test_leaves_beyond_the_lookahead_branch_once_they_are_within_it() -> None:
    play = Play(lookahead=4, max_branches=2, running_branches=64)
    play.advance(1, 4)
    assert [3, 4, 5, 106] not in [play.tokens_of(start) for start in play.starts]
    play.commit(3)
    assert [3, 4, 5, 106] in [play.tokens_of(start) for start in play.starts]


@pytest.mark.parametrize("max_nodes", [8, 12, 20, 40, 100])
@pytest.mark.parametrize("order", [1, -1])
def test_the_budget_holds_and_keeps_room_for_the_main_line(max_nodes: int, order: int) -> None:
    play = Play(max_nodes=max_nodes, lookahead=8, running_branches=64)
    for _ in range(6):
        while play.running:
            play.advance(play.running[::order][0])  # side branches first, or the main line first
            assert play.session.tree.size <= max_nodes
        assert play.main_tip.position == play.session.tree.committed_length + 8  # however much the others took
        play.commit(*(node.token for node in play.session.tree.best_path(5)))


def test_a_full_tree_says_so_and_goes_on_after_a_commit() -> None:
    play = Play(max_nodes=8, lookahead=20)
    play.settle()
    assert play.session.state is DrafterState.FULL
    play.commit(3)
    assert play.session.state is DrafterState.DRAFTING


def test_ids_rise_over_all_branches() -> None:
    play = Play(running_branches=64)
    play.settle()
    ids = [node.id for node in play.nodes]
    assert ids == list(range(1, len(ids) + 1))
    assert all(node.parent < node.id for node in play.nodes)
