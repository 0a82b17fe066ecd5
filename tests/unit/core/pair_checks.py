"""What always holds for a controller's session, a drafter's session and a tree, whatever happened before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from toys import VOCAB_SIZE

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Counters
from vllm_wanspec.core.draft import Draft
from vllm_wanspec.core.drafter import DrafterSession, StartBranch
from vllm_wanspec.core.flat import FlatTree
from vllm_wanspec.core.messages import Nodes
from vllm_wanspec.core.states import CONTROLLER_TABLE, DRAFTER_TABLE, ControllerState, DrafterState
from vllm_wanspec.core.tree import DraftTree, Node, main_line_tip

CONTROLLER_CHANGES = {(before, after) for (before, _), after in CONTROLLER_TABLE.items()}
DRAFTER_CHANGES = {(before, after) for (before, _), after in DRAFTER_TABLE.items()}


@contextmanager
def controller_call(session: ControllerSession) -> Iterator[None]:
    """A call of a controller's session: its state changes as the table allows, and says what is the case."""
    before = session.state
    yield
    after = session.state
    assert after is before or (before, after) in CONTROLLER_CHANGES, (before, after)
    tree = session.tree
    served = ControllerState.BLIND if tree is not None and tree.pending else ControllerState.SERVED
    assert after is served if tree is not None else after not in (ControllerState.SERVED, ControllerState.BLIND)


def check_controller(session: ControllerSession, max_nodes: int, length: int) -> None:
    assert session.length == length
    tree = session.tree
    if tree is not None:
        assert tree.committed_length == length
        live = check_flat(tree)
        assert live <= max_nodes
        assert all(tree._tokens[node] < VOCAB_SIZE for node in tree._index.values())
        assert len(tree._walked) <= 2 * max_nodes + 1  # what lazy pruning may leave behind


def accepted(counters: Counters) -> int:
    """Draft tokens that the target took, whoever made them."""
    return counters.accepted_main_line + counters.accepted_branch + counters.accepted_lookup


def check_sources(session: ControllerSession, draft: Draft, aside: set[int]) -> None:
    """A draft's first tokens are a branch's as far as the drafter drafted them ``aside``, by their nodes' ids."""
    assert session.tree is not None
    tree = session.tree
    path = tree.best_path(len(draft.drafted))
    assert [tree._tokens[node] for node in path] == draft.drafted
    assert [tree._ids[node] in aside for node in path] == [index < draft.branch for index in range(len(path))]


class DrafterWatch:
    """Follows one drafter's session from call to call."""

    def __init__(self, session: DrafterSession) -> None:
        self._state = session.state
        self._last_id = 0
        self._seen = -1
        self._drafted = 0
        self._sides = 0

    def sent(self, session: DrafterSession, message: Nodes) -> None:
        """Nodes go out: ids rise, none is beyond the lookahead, and few are drafted between two commits."""
        assert message.nodes
        assert message.seen >= self._seen
        if message.seen > self._seen:
            self._seen, self._drafted = message.seen, 0
        farthest = session.tree.committed_length + session.limits.lookahead
        for record in message.nodes:
            assert record.id > self._last_id  # what commits made nodes of is not sent
            self._last_id = record.id
            self._drafted += 1
            node = session.tree._nodes.get(record.id)
            assert node is None or node.position <= farthest
        # All that is drafted between two commits is alive at once, so this bounds what one commit can set in flight.
        assert self._drafted <= session.limits.max_nodes

    def after(self, session: DrafterSession, branches: Sequence[int]) -> bool:
        """After a call: how many branches run, and the state; whether the session has just used up its budget."""
        running = session.running
        assert running == list(branches)
        limits, tree = session.limits, session.tree
        tip = main_line_tip(tree)
        sides = sum(branch.tip is not tip for branch in session._running.values())
        assert len(running) <= sides + 1
        # After its share has shrunk, a session may keep the side branches that ran, but start none.
        assert sides <= max(session.width - 1, self._sides)
        assert sides == 0 or limits.max_branches > 1
        self._sides = sides
        before, self._state = self._state, session.state
        assert self._state is before or (before, self._state) in DRAFTER_CHANGES
        assert tree.size <= limits.max_nodes
        assert self._state is _facts(session)
        return self._state is DrafterState.FULL and before is not DrafterState.FULL


def _facts(session: DrafterSession) -> DrafterState:
    if session.state in (DrafterState.ENDED, DrafterState.NEW):
        assert not session.running
        return session.state
    if session.running:
        return DrafterState.DRAFTING
    return DrafterState.FULL if session.tree.size >= session.limits.max_nodes else DrafterState.RESTING


def check_start(session: DrafterSession, start: StartBranch, max_context: int) -> None:
    """An engine request is asked for where the tree says, and no longer than it can be of use."""
    assert start.max_tokens >= 1
    assert len(start.tokens) + start.max_tokens <= max_context
    known = len(session._context)
    assert list(start.tokens[:known]) == session._context
    node = session.tree._nodes[start.node]
    assert not node.children
    assert node.position == len(start.tokens)
    branch = session._running.get(start.branch)
    if branch is not None and node is not main_line_tip(session.tree):
        assert start.max_tokens <= session.limits.branch_depth
        assert node.position + start.max_tokens <= session.tree.committed_length + session.limits.lookahead


def check_drafter(session: DrafterSession) -> None:
    tree, limits = session.tree, session.limits
    assert check_tree(tree) == tree.size <= limits.max_nodes  # the drafter's own is pruned by every commit
    assert not tree.pending
    if session.length >= session._opened_length:  # else its context is still coming
        assert tree.committed_length == session.length
    assert len(session._candidates) <= 3 * limits.max_nodes
    assert all(branch.tip in tree for branch in session._running.values())
    # What the session keeps at hand is what a search would find.
    running = list(session._running.values())
    assert session._at_tip == {branch.tip: branch for branch in running}
    assert len(session._at_tip) == len(running)
    assert session._left == sum(branch.left for branch in running)
    assert session._tip() is main_line_tip(tree)


def check_flat(tree: FlatTree) -> int:
    """How many nodes the controller's copy has below its cursor, those not counted that wait to be pruned."""
    live = 0
    todo = [] if tree.pending else [tree.cursor]
    assert tree._index[tree.cursor_id] == tree.cursor
    while todo:
        node = todo.pop()
        family = tree._kids[node] or []
        live += len(family)
        for kid in family:
            assert tree._parents[kid] == node < kid
            assert tree._index[tree._ids[kid]] == kid
            assert tree._children[node << 32 | tree._tokens[kid]] == kid
        best = max(family, key=lambda kid: (tree._logprobs[kid], -kid), default=-1)
        assert tree._best[node] == best
        todo.extend(family)
    return live


def check_tree(tree: DraftTree) -> int:
    """The tree holds exactly what hangs together, and knows each node's place; the number of live nodes."""
    top = tree._walked[0][0] if tree._walked else tree.cursor
    assert top.parent is None
    found, todo, live = 0, [top], 0
    while todo:
        node = todo.pop()
        found += 1
        assert tree._nodes.get(node.id) is node
        children = node.children
        if not children:
            assert node.best is None
            continue
        best = max(children.values(), key=lambda child: child.logprob)
        assert node.best is not None
        assert node.best.logprob == best.logprob
        for token, child in children.items():
            assert child.parent is node
            assert child.token == token
            assert node.id < child.id <= tree.last_id
            assert child.position == node.position + 1
            todo.append(child)
    assert found == len(tree._nodes) == tree.size + 1
    todo = [tree.cursor]
    while todo:
        live += 1
        todo.extend(todo.pop().children.values())
    return live - 1


def shape(top: Node) -> list[tuple[int, int, int, int]]:
    """All nodes from one on: id, token, position, and the id of what each hangs below."""
    found, todo = [], [(top, -1)]
    while todo:
        node, parent = todo.pop()
        found.append((node.id, node.token, node.position, parent))
        todo.extend((child, node.id) for child in node.children.values())
    return sorted(found)


def flat_shape(tree: FlatTree) -> list[tuple[int, int, int, int]]:
    """The same of the controller's copy, from its cursor on."""
    found, todo = [], [(tree.cursor, tree._tokens[tree.cursor], tree.committed_length - len(tree.pending), -1)]
    while todo:
        node, token, position, parent = todo.pop()
        found.append((tree._ids[node], token, position, parent))
        todo.extend((kid, kid_token, position + 1, tree._ids[node]) for kid, kid_token, _, _ in tree.below(node))
    return sorted(found)
