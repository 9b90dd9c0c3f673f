"""The data-flow view of an FX graph that the analyses read: what depends on what, and how.

A networkx graph over the FX nodes. An edge means that values flow; reading a size is no edge,
writing in place is one (to every later reader of the same memory). Nothing here changes the graph.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest

import networkx as nx
from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.concatenations import concatenated_part
from attnres_compile.passes.graph_values import is_tensor


@dataclass(frozen=True)
class Dataflow:
    """Values, their order, and who writes into whose memory.

    Attributes:
        flow: directed graph over `fx.Node`; an edge u -> v says that v's value depends on u's.
        order: position of every node in the graph, a topological order of `flow`.
        memory: the node that first made the memory a tensor node lives in.
        writers: for each such node, the nodes that later overwrite (part of) that memory.
    """

    flow: nx.DiGraph[fx.Node]
    order: dict[fx.Node, int]
    memory: dict[fx.Node, fx.Node]
    writers: dict[fx.Node, list[fx.Node]]

    @staticmethod
    def of(graph: fx.Graph) -> Dataflow:
        """Builds the view of a graph in one sweep over its nodes."""
        view = Dataflow(nx.DiGraph(), {}, {}, {})
        for position, node in enumerate(graph.nodes):
            view._add(node, position)
        return view

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that take `node` as an argument, in graph order."""
        return sorted(node.users, key=self.order.__getitem__)

    def origin(self, node: fx.Node) -> fx.Node:
        """The node whose value `node` carries unchanged: up through copies, widening casts, views.

        Views count only where the element order is the origin's: reshapes do, transpositions do
        once they are undone. A slice that is a part of a concatenation carries that part's value.
        """
        return self.path_to_origin(node)[-1]

    @staticmethod
    def path_to_origin(node: fx.Node, turns: frozenset[fx.Node] = frozenset()) -> list[fx.Node]:
        """The nodes from `node` up to its origin, where these transpositions are seen through."""
        path = [node]
        length = 1  # of the path up to where every transposition is undone
        order: tuple[int, ...] | None = None  # pending permutation of the current node's dimensions
        while (step := _step_up(path[-1], order, turns)) is not None:
            passed, order = step
            path += passed
            if order is None or order == tuple(range(len(order))):
                length, order = len(path), None
        return path[:length]

    def carriers(self, node: fx.Node) -> list[fx.Node]:
        """`node` and every node that carries its value unchanged (those whose origin it shares)."""
        carried = [node]
        for current in carried:
            carried += [user for user in self.users(current) if self._carries(user, current)]
        return [current for current in carried if self.origin(current) is self.origin(node)]

    def writes_between(
        self, node: fx.Node, start: fx.Node, end: fx.Node | None = None
    ) -> list[fx.Node]:
        """The nodes between `start` and `end` that write into the memory of `node`."""
        writers = self.writers.get(self.memory.get(node, node), [])
        last = self.order[end] if end is not None else len(self.order)
        first = bisect_right(writers, self.order[start], key=self.order.__getitem__)
        return writers[first : bisect_left(writers, last, key=self.order.__getitem__)]

    def dependency_masks(
        self, roots: Iterable[fx.Node], mixes: Callable[[fx.Node], bool] = ops.mixes_elements
    ) -> tuple[dict[fx.Node, int], dict[fx.Node, int], dict[fx.Node, int]]:
        """Which of the `roots` each node depends on, as bit sets: `(bit, any_path, mixing_path)`.

        `any_path[n] & bit[r]`: n depends on r. `mixing_path[n] & bit[r]`: on some path from r to n
        stands an operation that `mixes`. One sweep; bit sets make it near linear.
        """
        bit = {root: 1 << index for index, root in enumerate(roots)}
        any_path: dict[fx.Node, int] = {}
        mixing_path: dict[fx.Node, int] = {}
        for node in self.order:
            reached = mixed = 0
            for source in self.flow.predecessors(node):
                reached |= any_path[source] | bit.get(source, 0)
                mixed |= mixing_path[source]
            any_path[node] = reached
            mixing_path[node] = mixed | reached if mixes(node) else mixed
        return bit, any_path, mixing_path

    def _add(self, node: fx.Node, position: int) -> None:
        self.order[node] = position
        self.flow.add_node(node)
        sources = ops.value_arguments(node)
        for source in sources:
            self.flow.add_edge(source, node)
            # The last writer depends on those before it.
            for writer in self.writers.get(self.memory.get(source, source), ())[-1:]:
                self.flow.add_edge(writer, node)
        self.memory[node] = self._memory_of(node, sources)
        for written in ops.overwritten(node):
            self.writers.setdefault(self.memory.get(written, written), []).append(node)

    def _memory_of(self, node: fx.Node, sources: list[fx.Node]) -> fx.Node:
        written = ops.writes_into(node)
        if written is not None:
            return self.memory.get(written, written)
        if ops.aliases_argument(node) and sources:
            return self.memory[sources[0]]
        return node

    def _carries(self, user: fx.Node, node: fx.Node) -> bool:
        arguments = ops.tensor_arguments(user)
        if not arguments or arguments[0] is not node:
            return False
        if ops.is_value_preserving(user) or ops.is_reshape(user):
            return True
        return ops.permutation(user) is not None


@dataclass(frozen=True)
class Read:
    """A use of a state by anything but the skip of the next state."""

    user: fx.Node
    operand: fx.Node


class Reads:
    """Who reads which value, with in-place writes taken into account.

    Attributes:
        turns: transpositions that carry a state on to another layout (see `layouts`).
    """

    def __init__(self, view: Dataflow, turns: frozenset[fx.Node] = frozenset()) -> None:
        self._view = view
        self.turns = turns
        self._paths: dict[fx.Node, list[fx.Node]] = {}
        self._by_value: dict[fx.Node, list[Read]] = defaultdict(list)
        for user in view.order:
            for operand in filter(is_tensor, ops.value_arguments(user)):
                self._by_value[self.value_read(operand, user)].append(Read(user, operand))

    def origin(self, node: fx.Node) -> fx.Node:
        return self._path(node)[-1]

    def value_read(self, operand: fx.Node, user: fx.Node) -> fx.Node:
        """The node whose value `user` sees in `operand`: its origin, or who overwrote it since."""
        path = self._path(operand)
        memory = self._view.memory
        for node, above in zip_longest(path, path[1:]):
            if above is not None and memory.get(node, node) is memory.get(above, above):
                continue  # a view
            # Where a copy or the origin was made: what is written later is not what was copied.
            written = self._view.writes_between(node, start=node, end=user)
            if written:
                return written[-1]
            user = node
        return path[-1]

    def turns_above(self, node: fx.Node) -> list[fx.Node]:
        """The turns between the origin of a node and itself."""
        return [each for each in reversed(self._path(node)) if each in self.turns]

    def _path(self, node: fx.Node) -> list[fx.Node]:
        if node not in self._paths:
            self._paths[node] = self._view.path_to_origin(node, self.turns)
        return self._paths[node]

    def of(self, value: fx.Node) -> list[Read]:
        """The reads of a value, not counting the copies, casts and views that only carry it on."""
        return [
            read
            for read in self._by_value[value]
            if read.user is not value and read.operand not in self._path(read.user)
        ]


def _step_up(
    node: fx.Node, order: tuple[int, ...] | None, turns: frozenset[fx.Node]
) -> tuple[list[fx.Node], tuple[int, ...] | None] | None:
    """One transparent step towards the origin; None where the value is made here."""
    arguments = ops.tensor_arguments(node)
    if not is_tensor(node) or ops.writes_into(node) is not None:
        return None
    part = concatenated_part(node)
    if part is not None:
        return (part, None) if order is None else None
    if not arguments:
        return None
    source = arguments[0]
    if ops.is_value_preserving(node):
        return [source], order
    if ops.is_reshape(node) or (node in turns and order is None):
        return ([source], None) if order is None else None
    moved = ops.permutation(node)
    if moved is None:
        return None
    return [source], moved if order is None else tuple(moved[position] for position in order)
