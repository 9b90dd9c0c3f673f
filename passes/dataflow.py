"""The data-flow view of an FX graph that the analyses read: what depends on what, and how.

A networkx graph over the FX nodes. An edge means that values flow; reading a size is no edge,
writing in place is one (to every later reader of the same memory). Nothing here changes the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
from torch import fx

from attnres_compile.passes import operations as ops
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
        once they are undone.
        """
        found = node
        order: tuple[int, ...] | None = None  # pending permutation of the current node's dimensions
        while True:
            step = _step_up(node, order)
            if step is None:
                return found
            node, order = step
            if order is None or order == tuple(range(len(order))):
                found, order = node, None

    def carriers(self, node: fx.Node) -> list[fx.Node]:
        """`node` and every node that carries its value unchanged (those whose origin it shares)."""
        carried = [node]
        for current in carried:
            carried += [user for user in self.users(current) if self._carries(user, current)]
        return [current for current in carried if self.origin(current) is self.origin(node)]

    def overwritten_between(self, node: fx.Node, end: fx.Node | None) -> fx.Node | None:
        """The first node between `node` and `end` that writes into the memory of `node`."""
        last = self.order[end] if end is not None else len(self.order)
        writers = self.writers.get(self.memory.get(node, node), [])
        inside = (w for w in writers if self.order[node] < self.order[w] < last)
        return next(inside, None)

    def dependency_masks(
        self, roots: Iterable[fx.Node]
    ) -> tuple[dict[fx.Node, int], dict[fx.Node, int], dict[fx.Node, int]]:
        """Which of the `roots` each node depends on, as bit sets: `(bit, any_path, mixing_path)`.

        `any_path[n] & bit[r]`: n depends on r. `mixing_path[n] & bit[r]`: on some path from r to n
        stands an operation that is not element-wise. One sweep; bit sets make it near linear.
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
            mixing_path[node] = mixed if ops.is_elementwise(node) else mixed | reached
        return bit, any_path, mixing_path

    def _add(self, node: fx.Node, position: int) -> None:
        self.order[node] = position
        self.flow.add_node(node)
        sources = ops.value_arguments(node)
        for source in sources:
            self.flow.add_edge(source, node)
            for writer in self.writers.get(self.memory.get(source, source), ()):
                self.flow.add_edge(writer, node)
        self.memory[node] = self._memory_of(node, sources)
        written = ops.writes_into(node)
        if written is not None:
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


def _step_up(
    node: fx.Node, order: tuple[int, ...] | None
) -> tuple[fx.Node, tuple[int, ...] | None] | None:
    """One transparent step towards the origin; None where the value is made here."""
    arguments = ops.tensor_arguments(node)
    if not arguments or not is_tensor(node) or ops.writes_into(node) is not None:
        return None
    source = arguments[0]
    if ops.is_value_preserving(node):
        return source, order
    if ops.is_reshape(node):
        return (source, None) if order is None else None
    moved = ops.permutation(node)
    if moved is None:
        return None
    return source, moved if order is None else tuple(moved[position] for position in order)
