"""DrafterSession's main line, rule by rule; the engine is played by the test. Side branches: test_drafter_branches."""

import pytest
from toys import VOCAB_SIZE, limits, toy

from vllm_wanspec.core.drafter import Action, DrafterSession, DraftStep, StartBranch, StopBranch
from vllm_wanspec.core.messages import Commit, Nodes, Open, Reject
from vllm_wanspec.core.policy.expansion import LOOKAHEAD_SLACK
from vllm_wanspec.core.states import DrafterState

PROMPT = (3, 1, 4, 1, 5)
TOY = toy(seed=1)


def make_session(
    *,
    lookahead: int = 16,
    max_nodes: int = 512,
    max_branches: int = 1,
    max_context: int = 1000,
    max_branch_tokens: int = 256,
) -> DrafterSession:
    """One place to run: alternatives become leaves, and none is extended."""
    opened = Open(7, PROMPT, limits(lookahead, max_nodes, max_branches=max_branches))
    return DrafterSession(opened, vocab_size=VOCAB_SIZE, max_context=max_context, max_branch_tokens=max_branch_tokens)


def only_start(actions: list[Action]) -> StartBranch:
    [start] = [action for action in actions if isinstance(action, StartBranch)]
    return start


def node_tokens(actions: list[Action]) -> list[int]:
    return [n.token for action in actions if isinstance(action, Nodes) for n in action.nodes]


def kinds(actions: list[Action]) -> list[type]:
    return [type(action) for action in actions]


def feed(session: DrafterSession, start: StartBranch, count: int) -> list[Action]:
    """Let the engine run a branch for ``count`` tokens, one at a time."""
    context, actions = list(start.tokens), []
    for _ in range(count):
        step = TOY.step(context)
        context.append(step.token)
        actions += session.drafted(start.branch, [step], 0.0)
    return actions


def commit(session: DrafterSession, position: int, tokens: list[int]) -> list[Action]:
    return session.committed(Commit(7, position, tuple(tokens)), 0.0)


def test_start_asks_for_the_continuation_of_the_context() -> None:
    session = make_session()
    [start] = session.start(0.0)
    assert start == StartBranch(1, 0, [], len(PROMPT), (), 256)
    assert start.tokens == list(PROMPT)
    assert session.running == [1]


def test_nodes_carry_the_engine_s_figures_and_what_was_committed() -> None:
    session = make_session(max_branches=3)
    start = only_start(session.start(0.0))
    step = TOY.step(PROMPT)
    [nodes] = session.drafted(start.branch, [step], 0.0)
    assert isinstance(nodes, Nodes)
    assert (nodes.session, nodes.seen) == (7, len(PROMPT))
    assert [n.token for n in nodes.nodes] == [step.token, *(t for t, _ in step.alternatives[:2])]
    assert [n.logprob for n in nodes.nodes] == [step.logprob, *(p for _, p in step.alternatives[:2])]
    assert {n.entropy_nats for n in nodes.nodes} == {step.entropy_nats}
    assert [(n.id, n.parent) for n in nodes.nodes] == [(1, 0), (2, 0), (3, 0)]


def test_the_main_line_goes_on_below_the_engine_s_token() -> None:
    session = make_session(max_branches=2)
    actions = feed(session, only_start(session.start(0.0)), 3)
    nodes = [n for action in actions if isinstance(action, Nodes) for n in action.nodes]
    assert [(n.id, n.parent) for n in nodes] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 3), (6, 3)]


@pytest.mark.parametrize("lookahead", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("burst", [1, 5])
def test_lookahead_is_never_exceeded(lookahead: int, burst: int) -> None:
    session = make_session(lookahead=lookahead)
    start = only_start(session.start(0.0))
    context, actions = list(start.tokens), []
    for _ in range(30):
        steps = []
        for _ in range(burst):
            steps.append(TOY.step(context))
            context.append(steps[-1].token)
        actions += session.drafted(start.branch, steps, 0.0)
    assert node_tokens(actions) == TOY.drafted(PROMPT, lookahead)
    assert kinds(actions).count(StopBranch) == 1
    assert session.running == []


@pytest.mark.parametrize("lookahead", [1, 2, 8, 16])
def test_drafting_starts_again_only_with_some_slack(lookahead: int) -> None:
    session = make_session(lookahead=lookahead)
    feed(session, only_start(session.start(0.0)), lookahead)
    slack = min(LOOKAHEAD_SLACK, lookahead // 2)
    line = TOY.drafted(PROMPT, lookahead)
    for count in range(1, lookahead + 1):
        actions = commit(session, len(PROMPT) + count - 1, [line[count - 1]])
        if count >= max(1, slack):
            break
        assert actions == []
    start = only_start(actions)
    assert start.tokens == [*PROMPT, *line]
    assert count == max(1, slack)


def test_max_nodes_stops_and_a_commit_resumes() -> None:
    session = make_session(max_nodes=10, max_branches=4, lookahead=100)
    start = only_start(session.start(0.0))
    actions = feed(session, start, 20)
    # The lookahead is larger than the budget: all of it is the main line's, and no alternative takes room from it.
    assert node_tokens(actions) == TOY.drafted(PROMPT, 10)
    assert session.tree.size == 10
    assert kinds(actions)[-1] is StopBranch
    assert (session.running, session.state) == ([], DrafterState.FULL)
    line = TOY.drafted(PROMPT, 10)
    again = commit(session, len(PROMPT), line[:1])
    assert session.tree.size == 9
    assert only_start(again).tokens == [*PROMPT, *line]
    assert session.state is DrafterState.DRAFTING


@pytest.mark.parametrize("max_nodes", [16, 20, 33, 512])
def test_alternatives_leave_the_main_line_its_room(max_nodes: int) -> None:
    session = make_session(max_nodes=max_nodes, max_branches=4, lookahead=16)
    actions = feed(session, only_start(session.start(0.0)), 16)
    sizes = [len(action.nodes) for action in actions if isinstance(action, Nodes)]
    assert len(sizes) == 16  # the whole lookahead, however little room there is
    assert min(max_nodes, 4 * 16) - 1 <= sum(sizes) <= max_nodes  # and what is left is used
    assert sizes == sorted(sizes, reverse=True)  # first come, first served
    assert session.running == []


def test_a_commit_along_the_main_line_lets_the_branch_run() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    feed(session, start, 5)
    assert commit(session, len(PROMPT), TOY.drafted(PROMPT, 3)) == []
    assert session.running == [start.branch]
    more = session.drafted(start.branch, [TOY.step([*PROMPT, *TOY.drafted(PROMPT, 5)])], 0.0)
    assert node_tokens(more) == TOY.drafted(PROMPT, 6)[5:]
    assert more[0].seen == len(PROMPT) + 3  # type: ignore[union-attr]


def test_a_commit_up_to_the_tip_lets_the_branch_run() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    feed(session, start, 3)
    assert commit(session, len(PROMPT), TOY.drafted(PROMPT, 3)) == []
    assert session.running == [start.branch]


def test_a_commit_to_a_leaf_starts_again_there_without_an_echo() -> None:
    session = make_session(max_branches=4)
    start = only_start(session.start(0.0))
    feed(session, start, 4)
    leaf = TOY.step(PROMPT).alternatives[1][0]
    actions = commit(session, len(PROMPT), [leaf])
    assert actions == [StopBranch(start.branch), StartBranch(2, 3, [], len(PROMPT) + 1, (), 256)]  # node 3 is the leaf
    assert session.tree.size == 0


def test_committed_tokens_that_were_not_drafted_take_ids_and_do_not_come_back() -> None:
    session = make_session(max_branches=2)
    start = only_start(session.start(0.0))
    feed(session, start, 2)
    known = session.tree.last_id
    first = TOY.draft(PROMPT)
    others = {*range(VOCAB_SIZE)} - {n.token for n in session.tree.cursor.children[first].children.values()}
    strange = min(others)
    actions = commit(session, len(PROMPT), [first, strange, 8])
    assert kinds(actions) == [StopBranch, StartBranch]
    start = only_start(actions)
    assert start.tokens == [*PROMPT, first, strange, 8]
    assert not session.tree.pending
    sent = feed(session, start, 1)[0]
    assert isinstance(sent, Nodes)
    assert (sent.nodes[0].id, sent.nodes[0].parent, sent.seen) == (known + 3, known + 2, len(PROMPT) + 3)


def test_nothing_is_drafted_before_the_whole_context_is_there() -> None:
    opened = Open(7, PROMPT[:2], limits(16, 64), length=len(PROMPT))
    session = DrafterSession(opened, vocab_size=VOCAB_SIZE, max_context=1000)
    assert session.start(0.0) == session.resize(3, 0.0) == []
    assert commit(session, 1, list(PROMPT[1:4])) == []
    assert (session.length, session.state) == (4, DrafterState.NEW)
    start = only_start(commit(session, 4, [PROMPT[4], 9, 8]))  # what was committed meanwhile comes with it
    assert start.tokens == [*PROMPT, 9, 8]
    assert (session.tree.committed_length, session.tree.last_id) == (len(PROMPT) + 2, 2)


def test_on_demand_nothing_is_drafted_that_was_not_asked_for() -> None:
    opened = Open(7, PROMPT, limits(16, 64), on_demand=True)
    session = DrafterSession(opened, vocab_size=VOCAB_SIZE, max_context=1000)
    assert session.start(0.0) == []
    assert session.state is DrafterState.RESTING
    assert commit(session, len(PROMPT), [7]) == []
    start = only_start(session.wanted(3, 0.0))
    assert (start.tokens, start.max_tokens) == ([*PROMPT, 7], 3)
    actions = feed(session, start, 3)
    assert node_tokens(actions) == TOY.drafted((*PROMPT, 7), 3)
    assert session.running == []
    # What was asked for counts from where the context ended then.
    assert commit(session, len(PROMPT) + 1, TOY.drafted((*PROMPT, 7), 2)) == []
    strange = [5, 5, 5]
    assert kinds(commit(session, len(PROMPT) + 3, strange)) == []
    again = only_start(session.wanted(99, 0.0))
    assert len(node_tokens(feed(session, again, 40))) == 16  # never further than the lookahead


def test_who_drafts_anyway_need_not_be_asked() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    assert session.wanted(3, 0.0) == []
    assert session.running == [start.branch]


def test_a_context_that_comes_with_a_gap_is_rejected() -> None:
    session = DrafterSession(Open(7, PROMPT[:2], limits(16, 64), length=5), vocab_size=VOCAB_SIZE, max_context=1000)
    session.start(0.0)
    assert commit(session, 3, [1, 5]) == [Reject(7, "gap")]


@pytest.mark.parametrize("count", [3, 4])
def test_a_context_never_grows_beyond_what_the_model_takes(count: int) -> None:
    session = make_session(max_context=len(PROMPT) + 3)
    session.start(0.0)
    actions = commit(session, len(PROMPT), [7] * count)
    assert kinds(actions) == ([StopBranch] if count == 3 else [StopBranch, Reject])
    assert actions[-1] in (StopBranch(1), Reject(7, "too_long"))
    assert session.length == len(PROMPT) + (3 if count == 3 else 0)


def test_commits_are_idempotent() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    feed(session, start, 6)
    line = TOY.drafted(PROMPT, 4)
    commit(session, len(PROMPT), line)
    before = (session.tree.committed_length, session.tree.size, session.tree.last_id)
    for position, tokens in ((len(PROMPT), line), (len(PROMPT) + 2, line[2:]), (0, list(PROMPT))):
        assert commit(session, position, tokens) == []
    assert (session.tree.committed_length, session.tree.size, session.tree.last_id) == before


def test_an_overlapping_commit_adds_what_is_new() -> None:
    session = make_session()
    feed(session, only_start(session.start(0.0)), 6)
    line = TOY.drafted(PROMPT, 4)
    commit(session, len(PROMPT), line[:2])
    commit(session, len(PROMPT), line)
    assert session.tree.committed_length == len(PROMPT) + 4
    assert session.tree.size == 2


def test_output_of_a_stopped_branch_is_ignored() -> None:
    session = make_session()
    old = only_start(session.start(0.0))
    feed(session, old, 2)
    strange = (TOY.draft(PROMPT) + 1) % VOCAB_SIZE
    new = only_start(commit(session, len(PROMPT), [strange]))
    assert new.branch != old.branch
    assert session.drafted(old.branch, [TOY.step(PROMPT)], 0.0) == []
    assert session.ended(old.branch, 0.0) == []
    assert session.running == [new.branch]
    assert session.tree.size == 0


def test_a_gap_ends_the_session() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    actions = commit(session, len(PROMPT) + 1, [4])
    assert actions == [StopBranch(start.branch), Reject(7, "gap")]


def test_a_token_outside_the_vocabulary_ends_the_session() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    actions = commit(session, len(PROMPT), [4, VOCAB_SIZE])
    assert actions == [StopBranch(start.branch), Reject(7, "vocabulary")]


def test_the_draft_model_s_longest_context_is_kept() -> None:
    session = make_session(max_context=len(PROMPT) + 6)
    start = only_start(session.start(0.0))
    assert start.max_tokens == 6
    actions = feed(session, start, 6)
    assert len(node_tokens(actions)) == 6
    assert session.ended(start.branch, 0.0) == []
    line = TOY.drafted(PROMPT, 6)
    assert commit(session, len(PROMPT), line) == []
    assert commit(session, len(PROMPT) + 6, [1]) == [Reject(7, "too_long")]


def test_long_lines_take_several_engine_requests() -> None:
    session = make_session(lookahead=30, max_branch_tokens=8)
    start = only_start(session.start(0.0))
    assert start.max_tokens == 8
    feed(session, start, 8)
    again = only_start(session.ended(start.branch, 0.0))
    assert again.branch == 2
    assert again.tokens == [*PROMPT, *TOY.drafted(PROMPT, 8)]


def test_engine_failure_rejects_and_nothing_more_is_asked() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    feed(session, start, 2)
    assert session.failed(0.0) == [StopBranch(start.branch), Reject(7, "engine")]
    assert session.drafted(start.branch, [TOY.step(PROMPT)], 0.0) == []
    assert session.ended(start.branch, 0.0) == []
    assert session.state is DrafterState.ENDED
    with pytest.raises(KeyError):  # whoever goes on with a session that is over has a bug
        commit(session, len(PROMPT), [1])


def test_an_engine_that_ends_without_a_token_is_not_asked_for_ever() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    assert session.ended(start.branch, 0.0) == [Reject(7, "engine")]


def test_alternatives_that_only_the_engine_s_padding_has_are_never_sent() -> None:
    session = make_session(max_branches=4)
    start = only_start(session.start(0.0))
    good = DraftStep(3, -0.5, 1.0, ((VOCAB_SIZE, -1.0), (4, -2.0), (VOCAB_SIZE + 7, -3.0)))
    assert node_tokens(session.drafted(start.branch, [good], 0.0)) == [3, 4]


def test_a_line_ends_where_the_engine_goes_on_with_padding() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    session.drafted(start.branch, [DraftStep(3, -0.5, 1.0)], 0.0)
    padded, after = DraftStep(VOCAB_SIZE, -0.5, 1.0), DraftStep(6, -0.5, 1.0)
    # What follows the unusable token must not be taken for what follows the token before it, and asking again would
    # give the same.
    assert session.drafted(start.branch, [padded, after], 0.0) == [StopBranch(start.branch)]
    assert session.drafted(start.branch, [after], 0.0) == []
    assert commit(session, len(PROMPT), [3]) == []
    assert session.state is DrafterState.RESTING
    assert only_start(commit(session, len(PROMPT) + 1, [5])).tokens == [*PROMPT, 3, 5]


def test_positive_log_probabilities_of_a_rounding_engine_are_cut() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    [nodes] = session.drafted(start.branch, [DraftStep(3, 1e-7, 0.0)], 0.0)
    assert nodes.nodes[0].logprob == 0.0  # type: ignore[union-attr]


def test_close_stops_the_engine() -> None:
    session = make_session()
    start = only_start(session.start(0.0))
    assert session.close(0.0) == [StopBranch(start.branch)]
    assert (session.running, session.state) == ([], DrafterState.ENDED)
