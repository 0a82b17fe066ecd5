"""Draft trees by hand, and what must hold for every one."""

from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.tree import ROOT_ID, DraftTree, Node, NodeRecord

CONTEXT = 10


def make_tree(max_nodes: int = 1000, vocab_size: int = 100, calibration: Calibration | None = None) -> DraftTree:
    return DraftTree(CONTEXT, vocab_size=vocab_size, max_nodes=max_nodes, calibration=calibration)


def record(node: int, parent: int, token: int, logprob: float = -1.0, entropy: float = 1.0) -> NodeRecord:
    return NodeRecord(node, parent, token, logprob, entropy)


def chain(tree: DraftTree, tokens: list[int], parent: int = ROOT_ID, logprob: float = -1.0) -> list[int]:
    ids = []
    for token in tokens:
        parent_id = ids[-1] if ids else parent
        node = record(tree.last_id + 1, parent_id, token, logprob)
        tree.append([node])
        ids.append(node.id)
    return ids


def reachable(tree: DraftTree) -> dict[int, Node]:
    """Every node below the cursor, the cursor included, by walking."""
    found: dict[int, Node] = {}
    todo = [tree.cursor]
    while todo:
        node = todo.pop()
        assert node.id not in found
        found[node.id] = node
        todo.extend(node.children.values())
    return found


def check_consistent(tree: DraftTree) -> None:
    """What must hold at any time, whatever happened, once commits have been followed by a pruning."""
    tree.prune()
    live = reachable(tree)
    assert live == tree._nodes
    assert tree.size == len(live) - 1
    assert tree.committed_length == tree.cursor.position + len(tree.pending)
    for node in live.values():
        assert node in tree
        assert all(child.position == node.position + 1 and child.token == t for t, child in node.children.items())
        best = max(node.children.values(), key=lambda child: child.logprob, default=None)
        assert (node.best is None) == (best is None)
        assert best is None or (node.best is not None and node.best.logprob == best.logprob)
    if tree.pending:
        assert tree.size == 0
