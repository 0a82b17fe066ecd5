"""Where each node of a request's tree is drawn: columns are positions in the context, row 0 is what was committed."""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from vllm_wanspec.trace.target import TargetReplay
from vllm_wanspec.trace.tree import Fate, Node

UNDRAFTED = "undrafted"
"""Stands for a fate where a committed token never had a node."""

_RANKS = {Fate.REJECTED: 0, Fate.STALE: 2}


@dataclass(slots=True)
class Place:
    """A node, or a committed token without one, at its place.

    Attributes:
        column: Position in the context, counted from the request's own.
        row: 0 for the committed path, rising downwards.
        above: Index of the place that it hangs below; -1 for the request's context.
    """

    column: int
    row: int
    above: int
    token: int
    fate: str
    step: int | None
    node: Node | None


def lay_out(target: TargetReplay) -> list[Place]:
    """Places of the committed tokens in their order, then of all other nodes whose place in the tree is known."""
    first = target.context_length
    places: list[Place] = []
    index: dict[int, int] = {}
    for cell in target.path:
        fate = UNDRAFTED if cell.node is None else cell.node.fate.value
        if cell.node is not None:
            index[id(cell.node)] = len(places)
        places.append(Place(cell.position - first, 0, len(places) - 1, cell.token, fate, cell.step, cell.node))
    below: dict[int, list[Node]] = {}
    tops: list[tuple[int, Node]] = []
    for node in target.nodes:
        if id(node) in index or node.parent is None or not node.position:
            continue
        if id(node.parent) in index or node.parent.id == 0:
            tops.append((index.get(id(node.parent), node.position - first - 2), node))
        else:
            below.setdefault(id(node.parent), []).append(node)
    _hang(places, tops, below, first)
    return places


def _hang(places: list[Place], tops: list[tuple[int, Node]], below: dict[int, list[Node]], first: int) -> None:
    """Put what is off the path into rows, line by line, each as high as there is room: what mattered most comes first.

    A line follows the children that mattered most; the others begin lines of their own.
    """
    longest, rank = _measure(tops, below)

    def order(node: Node) -> tuple[int, int, int, int]:
        return rank[id(node)], node.position, -longest[id(node)], node.id

    taken: list[int] = [0]
    waiting = [(order(node), count, above, node) for count, (above, node) in enumerate(tops)]
    heapify(waiting)
    while waiting:
        _, _, above, top = heappop(waiting)
        line = [top]
        while children := sorted(below.get(id(line[-1]), ()), key=order):
            line.append(children[0])
        row = _room(taken, places[above].row + 1 if above >= 0 else 1, top.position - first, len(line))
        for node in line:
            places.append(Place(node.position - first, row, above, node.token, node.fate.value, node.step, node))
            above = len(places) - 1
            for child in sorted(below.get(id(node), ()), key=order)[1:]:
                heappush(waiting, (order(child), len(places) + len(waiting), above, child))


def _measure(tops: list[tuple[int, Node]], below: dict[int, list[Node]]) -> tuple[dict[int, int], dict[int, int]]:
    """For each node, over all that hangs below it: the nodes on the longest way down, and the least rank of fates."""
    order = [node for _, node in tops]
    for node in order:
        order.extend(below.get(id(node), ()))
    longest: dict[int, int] = {}
    rank: dict[int, int] = {}
    for node in reversed(order):
        children = below.get(id(node), ())
        longest[id(node)] = 1 + max((longest[id(child)] for child in children), default=0)
        rank[id(node)] = min([_RANKS.get(node.fate, 1), *(rank[id(child)] for child in children)])
    return longest, rank


def _room(taken: list[int], lowest: int, column: int, length: int) -> int:
    """The first row from ``lowest`` on that is free over ``length`` columns, and now is not; rows are bit sets."""
    mask = ((1 << length) - 1) << column
    row = lowest
    while row < len(taken) and taken[row] & mask:
        row += 1
    taken.extend([0] * (row + 1 - len(taken)))
    taken[row] |= mask
    return row
