"""Who made the draft tokens that the target took: main line, side branch or prompt lookup."""

import pytest
from pair import Setup, World
from toys import limits, toy

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Counters, Shared
from vllm_wanspec.core.draft import NO_DRAFT, Draft
from vllm_wanspec.core.messages import Limits, Nodes
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.turnaround import Turnaround
from vllm_wanspec.sim import history
from vllm_wanspec.sim.pair import Pair

PROMPT = [10, 11, 12, 13]
SURE, UNSURE = -0.1, -2.0


class Play:
    """One session over a link whose drafter is played by hand."""

    def __init__(self, prompt: list[int] = PROMPT) -> None:
        self.shared = Shared()
        self.session = ControllerSession(prompt, self.shared)
        self.number = 0
        self.open()

    def open(self) -> None:
        self.number += 1
        self.session.open(self.number, limits(16, 64), 0.0, vocab_size=100, turnaround=Turnaround())

    def nodes(self, seen: int, *items: tuple[int, int, int, float]) -> None:
        """Nodes arrive: id, parent, token and logprob of each, drafted when ``seen`` tokens were committed."""
        records = tuple(NodeRecord(number, parent, token, q, 1.0) for number, parent, token, q in items)
        self.session.receive(Nodes(self.number, seen, records), 0.0)

    @property
    def best_bucket(self) -> int:
        """The range of probabilities of the most probable token that comes next."""
        tree = self.session.tree
        assert tree is not None
        return tree._buckets[tree.best_path(1)[0]]

    def draft(self, limit: int = 8) -> Draft:
        return self.session.draft(limit, 0.0, 0.0)

    def commit(self, *tokens: int, draft: Draft = NO_DRAFT) -> tuple[int, int, int]:
        self.session.commit(tokens, 0.0, draft)
        return counted(self.shared.counters)


def counted(counters: Counters) -> tuple[int, int, int]:
    return counters.accepted_main_line, counters.accepted_branch, counters.accepted_lookup


def with_a_side_branch() -> Play:
    """Text: prompt, 20. Main line: 30 31. Below the alternative 40 to 30: 41 42."""
    play = Play()
    assert play.commit(20) == (0, 0, 0)  # the prefill's token
    main_line = [(1, 0, 20, SURE), (2, 1, 30, SURE), (3, 1, 40, UNSURE), (4, 2, 31, SURE)]
    play.nodes(4, *main_line, (5, 3, 41, SURE), (6, 5, 42, SURE))
    return play


# The main line


@pytest.mark.parametrize(
    ("tokens", "accepted"),
    [
        ((30, 31, 50), 2),  # all of it
        ((30, 50), 1),
        ((50,), 0),
        ((40,), 0),  # an alternative that the target gave by itself
        ((30,), 0),  # withheld, though it was right
        ((30, 31), 1),  # the target was given the first token alone, and gave the second by itself
    ],
)
def test_what_the_target_takes_of_the_main_line(tokens: tuple[int, ...], accepted: int) -> None:
    play = with_a_side_branch()
    draft = play.draft()
    assert draft.tokens == [30, 31]
    assert play.commit(*tokens, draft=draft) == (accepted, 0, 0)


def test_tokens_that_no_draft_foresaw_are_nobody_s() -> None:
    play = with_a_side_branch()
    assert play.commit(30, 31, 32) == (0, 0, 0)
    play = with_a_side_branch()
    assert play.commit(30, 31, 32, 33, draft=play.draft(1)) == (1, 0, 0)


# A side branch


def test_a_branch_s_tokens_until_the_drafter_knows_that_the_text_goes_on_there() -> None:
    play = with_a_side_branch()
    assert play.commit(40, draft=play.draft()) == (0, 0, 0)  # length 6
    draft = play.draft(1)
    assert (draft.tokens, draft.branch) == ([41], 1)
    assert play.commit(41, 42, draft=draft) == (0, 1, 0)  # length 8
    play.nodes(5, (7, 6, 43, SURE), (8, 7, 44, SURE), (9, 8, 45, SURE))  # in flight since before the 40
    draft = play.draft(1)
    assert (draft.tokens, draft.branch) == ([43], 1)
    assert play.commit(43, 44, draft=draft) == (0, 2, 0)  # length 10
    play.nodes(6, (10, 9, 46, SURE), (11, 10, 47, SURE))  # with the 40, without the 42
    draft = play.draft()
    assert (draft.tokens, draft.branch) == ([45, 46, 47], 1)
    assert play.commit(45, 46, 47, 48, draft=draft) == (2, 3, 0)
    play.nodes(6, (12, 11, 48, SURE), (13, 12, 49, SURE))
    draft = play.draft()
    assert (draft.tokens, draft.branch) == ([49], 0)
    assert play.commit(49, 50, draft=draft) == (3, 3, 0)


def test_a_branch_s_draft_of_which_the_target_takes_a_part() -> None:
    play = with_a_side_branch()
    play.commit(40, draft=play.draft())
    play.nodes(6, (7, 6, 43, SURE))
    draft = play.draft()
    assert (draft.tokens, draft.branch) == ([41, 42, 43], 2)
    assert play.commit(41, 60, draft=draft) == (0, 1, 0)


def test_a_second_branch_begins_before_the_drafter_knows_of_the_first() -> None:
    play = with_a_side_branch()
    play.commit(40, draft=play.draft())  # length 6
    play.nodes(5, (7, 6, 43, SURE), (8, 6, 53, UNSURE), (9, 8, 54, SURE))
    play.commit(41, 42, 53, draft=play.draft())  # length 9
    play.nodes(6, (10, 9, 55, SURE))  # with the 40, without the 53
    play.nodes(9, (11, 10, 56, SURE))
    draft = play.draft()
    assert (draft.tokens, draft.branch) == ([54, 55, 56], 2)
    assert play.commit(54, 55, 56, 57, draft=draft) == (1, 4, 0)


def test_a_branch_that_arrives_after_its_alternative_was_committed() -> None:
    play = Play()
    play.commit(20)
    play.nodes(4, (1, 0, 20, SURE))
    play.commit(40)  # the tree does not hold it yet; length 6
    play.nodes(5, (2, 1, 30, SURE), (3, 1, 40, UNSURE), (4, 3, 41, SURE))
    play.nodes(6, (5, 4, 42, SURE))
    draft = play.draft()
    assert (draft.tokens, draft.branch) == ([41, 42], 1)
    assert play.commit(41, 42, 43, draft=draft) == (1, 1, 0)


def test_a_main_line_that_arrives_late_is_the_main_line() -> None:
    play = Play()
    play.commit(20)
    play.nodes(4, (1, 0, 20, SURE))
    play.commit(30)
    play.nodes(5, (2, 1, 30, SURE), (3, 1, 40, UNSURE), (4, 2, 31, SURE))
    assert play.commit(31, 32, draft=play.draft()) == (1, 0, 0)


def test_a_token_outside_the_tree_begins_no_branch() -> None:
    play = with_a_side_branch()
    play.commit(30, 60, draft=play.draft())  # length 7
    play.session.receive(Nodes(1, 7, (NodeRecord(8, 7, 61, SURE, 1.0),)), 0.0)
    draft = play.draft()
    assert (draft.tokens, draft.branch) == ([61], 0)
    assert play.commit(61, 62, draft=draft) == (2, 0, 0)


def test_a_branch_ends_with_its_link_but_a_draft_of_it_stays_its_own() -> None:
    play = with_a_side_branch()
    play.commit(40, draft=play.draft())
    play.nodes(6, (7, 6, 43, SURE))  # nodes up to 6 are the branch's
    draft = play.draft()
    play.session.link_lost(0.0)
    play.open()
    play.nodes(6, (1, 0, 41, SURE), (2, 1, 42, SURE), (3, 2, 43, SURE), (4, 3, 44, SURE), (5, 4, 45, SURE))
    assert play.commit(41, 42, 43, draft=draft) == (0, 2, 0)
    assert play.commit(44, 45, 46, draft=play.draft()) == (2, 2, 0)


# Prompt lookup


def test_a_lookup_behind_a_draft() -> None:
    play = Play([1, 2, 3, 4, 5, 6, 1, 2])
    play.nodes(8, (1, 0, 3, -0.01))
    for _ in range(400):
        play.shared.calibration.saw(play.best_bucket, True)
    draft = play.session.fall_back(play.draft(), 4, 0.0, 0.0)
    assert (draft.drafted, draft.guess) == ([3], (4, 5, 6))
    assert play.commit(3, 4, 5, 9, draft=draft) == (1, 0, 2)


def test_a_lookup_behind_a_branch() -> None:
    play = Play([1, 2, 3, 4, 41, 42, 43, 44])
    play.commit(20)
    play.nodes(8, (1, 0, 20, SURE), (2, 1, 30, SURE), (3, 1, 40, UNSURE), (4, 3, 41, -0.01), (5, 4, 42, -0.01))
    play.commit(40, draft=play.draft())
    for _ in range(400):
        play.shared.calibration.saw(play.best_bucket, True)
    draft = play.session.fall_back(play.draft(), 4, 0.0, 0.0)
    assert (draft.drafted, draft.branch, draft.guess) == ([41, 42], 2, (43, 44))
    assert play.commit(41, 42, 43, 44, 45, draft=draft) == (0, 2, 2)


@pytest.mark.parametrize(("tokens", "accepted"), [((4, 5, 6), 2), ((4, 9), 1), ((9,), 0), ((4,), 0), ((4, 5), 1)])
def test_a_lookup_alone(tokens: tuple[int, ...], accepted: int) -> None:
    shared = Shared()
    session = ControllerSession([1, 2, 3, 4, 5, 1, 2], shared)
    session.commit([3], 0.0)
    guess = session.fall_back(session.draft(2, 0.0, 0.0), 2, 0.0, 0.0)
    assert (guess.drafted, guess.guess) == ([], (4, 5))
    session.commit(tokens, 0.0, guess)
    assert counted(shared.counters) == (0, 0, accepted)


# Both sides


def test_over_a_network_all_that_is_accepted_is_somebody_s() -> None:
    """Twice the same text: what the drafter does not give in time, its first half tells of the second."""
    language = toy(seed=5, agreement=0.6)
    first = [7, 7, 42, *language.continuation([7, 7, 42], 400)]
    prompt = [*first, *first[:3]]
    assert language.continuation(prompt, 400) == first[3:]
    pair = Pair(language, history.Setup(Limits(24, 256, 4, 8, 4, 0.0, 0.0), delay=1, burst=2), [prompt])
    [request] = pair.requests
    accepted = 0
    while len(request.context) < len(prompt) + 400:
        pair.tick(5)
        made = request.session.fall_back(request.session.draft(3, 0.0, pair.now_s), 4, 0.2, pair.now_s)
        tokens = language.verify(request.context, made.tokens)
        accepted += len(tokens) - 1
        pair.commit(request, tokens, made)
        assert sum(counted(pair.shared.counters)) == accepted
    assert request.context[len(prompt) :][:400] == first[3:]
    assert min(counted(pair.shared.counters)) > 10


def test_what_a_session_calls_a_branch_s_is_what_the_drafter_drafted_beside_its_main_line() -> None:
    """`World` holds each draft against what the drafter's own session knew when it drafted it."""
    world = World(Setup(Limits(24, 256, 4, 8, 6, 0.0, 0.0), seed=6, agreement=0.6, delay=2, jitter=2, burst=2))
    for _ in range(400):
        world.tick(5)
        world.step(limit=4)
    counters = world.shared.counters
    assert counters.accepted_branch > 50
    assert counters.accepted_main_line > 50
    assert sum(counted(counters)) == world.seen["accepted"]
