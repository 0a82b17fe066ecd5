"""What becomes of side branches: one that turns out right goes on as the main line, and width can change."""

from branch_play import PROMPT, Play, started
from toys import toy

from vllm_wanspec.core.drafter import StartBranch, StopBranch
from vllm_wanspec.core.messages import Nodes

TOY = toy(seed=3)

# What becomes of them


def test_a_correction_in_a_running_branch_makes_it_the_main_line() -> None:
    play = Play()
    play.advance(1)
    branch = next(start.branch for start in play.starts if play.tokens_of(start) == [103])
    play.advance(branch, 1)
    known = play.session.tree.last_id
    actions = play.commit(103)
    assert branch in play.running
    assert not [start for start in started(actions) if start.branch != branch and start.node == known]
    assert 1 in play.stops
    assert not [action for action in actions if isinstance(action, Nodes)]  # the controller has them
    assert play.session.tree.best_path(5)[-1] is play.session._running[branch].tip
    more = play.advance(branch)
    assert next(n.token for a in more if isinstance(a, Nodes) for n in a.nodes) == 5  # and on it goes


def test_a_promoted_branch_that_ends_is_followed_by_the_main_line() -> None:
    play = Play(branch_depth=2, running_branches=2, max_branches=2)
    play.advance(1)
    play.commit(103)
    [promoted] = play.running
    actions = play.advance(promoted, 2)
    again = started(actions)[-1]
    assert play.tokens_of(again)[:3] == [103, 4, 5]
    assert again.max_tokens > 100


def test_a_correction_in_an_ended_branch_goes_on_at_its_tip() -> None:
    play = Play(branch_depth=2, running_branches=2, max_branches=2, lookahead=12)
    play.advance(1)
    side = play.starts[1]
    play.advance(side.branch, 2)
    assert side.branch not in play.running
    actions = play.commit(103)
    assert next(play.tokens_of(start) for start in started(actions)) == [103, 4, 5]
    assert not [action for action in actions if isinstance(action, Nodes)]


def test_a_correction_that_is_a_leaf_starts_there_without_an_echo() -> None:
    play = Play(width=1)
    play.advance(1, 3)
    actions = play.commit(203)
    assert actions == [StopBranch(1), StartBranch(2, 3, [], len(PROMPT) + 1, (), 256)]


def test_a_correction_outside_the_tree_stops_everything() -> None:
    play = Play(running_branches=4)
    play.advance(1)
    assert len(play.running) == 4
    actions = play.commit(999)
    assert sorted(play.stops) == [1, 2, 3, 4]
    [start] = started(actions)
    assert play.tokens_of(start) == [999]
    [first] = [action for action in play.advance(start.branch) if isinstance(action, Nodes)]
    assert first.nodes[0].token == 4
    assert first.nodes[0].parent == play.session.tree.cursor.id == first.nodes[0].id - 1  # which stands for 999


def test_impossible_branches_are_stopped_and_possible_ones_run_on() -> None:
    play = Play(running_branches=7)
    play.advance(1, 2)
    at = {tuple(play.tokens_of(start)): start.branch for start in play.starts}
    play.commit(3)
    assert {at[103,], at[203,], at[303,]} <= set(play.stops)
    assert {at[3, 104], at[3, 204], at[3, 304], 1} <= set(play.running)


def test_freed_places_go_to_the_next_candidates() -> None:
    play = Play(running_branches=4)
    play.advance(1, 3)
    before = len(play.starts)
    play.commit(3)
    fresh = play.starts[before:]
    assert len(play.running) == 4
    assert next(play.tokens_of(start) for start in fresh) == [3, 104]


# Changes of width


def test_more_width_starts_branches_at_once() -> None:
    play = Play(width=1)
    play.advance(1, 2)
    assert play.running == [1]
    actions = play.do(play.session.resize(3, 0.0))
    assert len(started(actions)) == 2
    assert (play.session.width, len(play.running)) == (3, 3)
    play.do(play.session.resize(99, 0.0))
    assert play.session.width == 8  # as the controller asked


def test_less_width_lets_branches_end_and_starts_no_others() -> None:
    play = Play(running_branches=6)
    play.advance(1, 2)
    assert len(play.running) == 6
    before = len(play.starts)
    assert play.do(play.session.resize(2, 0.0)) == []
    assert len(play.running) == 6
    for branch in play.running[1:]:
        play.advance(branch, play.left[branch])
    sides = list(play.starts[before:])
    assert len(play.running) == 2
    assert len(sides) == 1  # only once the others had ended
    play.do(play.session.resize(0, 0.0))
    assert play.session.width == 1


def test_what_was_dropped_is_not_remembered_for_ever() -> None:
    play = Play(running_branches=1, lookahead=4, max_nodes=64, min_probability=0.0)
    for _ in range(300):
        play.settle()
        play.commit(play.session.tree.best_path(1)[0].token)
        play.commit(999)
    assert len(play.session._candidates) <= 2 * 64 + 64
    assert play.session.tree.size <= 64


def test_with_several_branches_drafts_are_the_draft_model_s_own_line() -> None:
    play = Play(step=TOY.step, prompt=(3, 1, 4), max_branches=4, running_branches=6, lookahead=10)
    context = [3, 1, 4]
    for _ in range(80):
        play.settle()
        draft = [node.token for node in play.session.tree.best_path(6)]
        assert draft == TOY.drafted(context, 6)
        tokens = TOY.verify(context, draft)
        context += tokens
        play.commit(*tokens)
    assert play.session.tree.committed_length == len(context)
