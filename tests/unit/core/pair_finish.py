"""How every history of the pair ends: at rest both sides agree, and after that drafts are of use again."""

from pair import PROMPTS, World, sessions_of
from pair_checks import flat_shape, shape

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.policy.expansion import LOOKAHEAD_SLACK
from vllm_wanspec.core.states import ControllerState, DrafterState
from vllm_wanspec.sim.history import Request

TRIES = 40
"""Steps with a draft at hand until one must have been accepted: the models agree in half of them or more."""


def finish(world: World) -> None:
    """Calm the network, wait until both sides agree, and see that drafts come and are accepted."""
    for request in world.requests:
        request.preempted = False
    if world.poisoned:
        world.disconnect()
    world.up.delay = world.down.delay = 1
    world.up.jitter = world.down.jitter = 0
    world.burst = 12
    check_quiet(world)
    before = [request.accepted for request in world.requests]
    for _ in range(TRIES):
        stuck = [r for r, count in zip(world.requests, before, strict=True) if r.accepted == count]
        if not any(has_room(world, request) for request in stuck):
            break
        world.step()
        world.settle()
    else:
        raise AssertionError("no draft is accepted any more")
    check_quiet(world)
    for request in world.requests:
        prompt = PROMPTS[request.index]
        count = len(request.context) - len(prompt)
        assert request.context == [*prompt, *world.language.continuation(prompt, count)]


def has_room(world: World, request: Request) -> bool:
    """Whether a drafter can still be of use to a request."""
    return not world.is_over(request) and len(request.context) < world.setup.max_context


def check_quiet(world: World) -> None:
    """After quiescence both trees are the same, and drafts are there, unless the context is over."""
    world.settle()
    world.check()
    for request in world.requests:
        if request.session.tree is None:
            assert world.is_over(request)
            continue
        _check_agreement(world, request, request.session)


def _check_agreement(world: World, request: Request, session: ControllerSession) -> None:
    assert request.number is not None
    drafter = sessions_of(world)[request.number]
    tree, own = session.tree, drafter.tree
    assert tree is not None
    room = min(world.setup.limits.lookahead, world.setup.max_context - len(request.context))
    if room <= 0 and tree.pending:  # nothing follows what left the tree, so nobody says that it is known
        tree.catch_up(drafter.length)
        assert session.draft(1, 0.0, world.now_s).tokens == []
    else:
        assert session.state is ControllerState.SERVED
    assert drafter.state in (DrafterState.RESTING, DrafterState.FULL)
    assert flat_shape(tree) == shape(own.cursor)
    assert tree.committed_length == own.committed_length == len(request.context)
    _check_best(world, request)
    limits = world.setup.limits
    draft = session.draft(limits.lookahead, 0.0, world.now_s).tokens
    assert draft == world.language.drafted(request.context, len(draft))
    assert len(draft) <= max(0, room)
    if room > 0:
        slack = min(LOOKAHEAD_SLACK, limits.lookahead // 2)
        assert draft
        assert drafter.state is DrafterState.FULL or len(draft) > min(room, limits.lookahead - slack) - 1


def _check_best(world: World, request: Request) -> None:
    """On the side branches as on the main line, the best child is what the draft model itself would say."""
    tree = request.session.tree
    assert tree is not None
    todo = [(tree.cursor, list(request.context))]
    while todo:
        node, context = todo.pop()
        for child, token, _, best in tree.below(node):
            assert not best or token == world.language.draft(context)
            todo.append((child, [*context, token]))
