"""Put mixes over delta sources into streams whose carrier is altered between additions.

With states ``y_0, y_1, ...`` of the chain, and blocks that end at ``y_i, y_j, ...``, the sources
of the site at ``y_k`` are ``y_0``, ``y_i - y_0``, ``y_j - y_i``, ..., and ``y_k`` less the last of
these ends. They sum to ``y_k``, whatever the chain does between two states. All readers of ``y_k``
read the mix; the skip of the next addition, and what alters it, goes on with ``y_k``.

Contract: needs streams of `deltas` found in this very graph, and a layout for each. The chain is
left as it is; only operands of readers change, and of carrying uses that shared a copy or view with
readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import fx

from attnres_compile.passes.dataflow import Dataflow, Read
from attnres_compile.passes.graph_editor import Editor
from attnres_compile.passes.graph_values import dtype_of, shape_of
from attnres_compile.passes.rewrite_residuals import (
    MixLayout,
    SiteParameters,
    ends_of,
    unread,
    write_mix,
)
from attnres_compile.passes.streams import ResidualStream, State

aten = torch.ops.aten
Item = TypeVar("Item")


def rewrite_deltas(
    graph: fx.Graph, stream: ResidualStream, layout: MixLayout, parameters: SiteParameters
) -> None:
    """Rewrites one stream of `deltas`, in place.

    Several streams of one graph are rewritten in the order of `deltas_first`.

    Args:
        graph: the graph that `stream` was found in, with its reads redirected (`redirect_reads`).
        stream: the states to read anew.
        layout: blocks and the form of the mix.
        parameters: graph nodes holding query [D] and gain [D] of every site with several sources.

    Raises:
        MismatchError: a mix has no reader, so the state it stands for was read in another way.
    """
    writer = _DeltaWriter(graph, stream, layout, parameters)
    for position, state in enumerate(stream.states[1:], start=1):
        writer.advance(position, state)


def deltas_first(streams: Iterable[Item], is_delta: Callable[[Item], bool]) -> list[Item]:
    """The order to rewrite the streams of one graph in: those of `deltas`, last ones first.

    A mix then takes the place of its state in the sources of streams that were rewritten before.
    """
    items = list(streams)
    deltas = [item for item in items if is_delta(item)]
    return [*reversed(deltas), *(item for item in items if not is_delta(item))]


class _DeltaWriter:
    """The sources of a stream at one of its states after the other."""

    def __init__(
        self,
        graph: fx.Graph,
        stream: ResidualStream,
        layout: MixLayout,
        parameters: SiteParameters,
    ) -> None:
        self._graph = graph
        self._layout = layout
        self._parameters = parameters
        self._root = stream.states[0].node
        self._start = self._root  # the state that the block in progress started from
        self._completed: list[fx.Node] = []
        self._seals = ends_of(layout.block_sublayers)
        self._sublayers = 0
        self._open_additions = 0

    def advance(self, position: int, state: State) -> None:
        """Has the readers of a state read its mix."""
        if state.addition is not None:
            self._open_additions += int(state.addition.is_residual)
        if not state.reads:
            return
        chosen, completes = position in self._parameters, self._completes_block()
        if not chosen and not completes:
            return  # left out: its readers go on reading the state
        end = state.node.next
        with self._graph.inserting_before(end):
            edit = Editor(self._graph, state.node)
            sources = [*self._completed, self._difference(edit, state.node)]
            if completes:
                self._completed, self._start = sources, state.node
            if not chosen:
                return
            mixed = write_mix(
                edit,
                [self._root, *sources],
                dtype_of(state.node),
                self._parameters[position],
                self._layout,
            )
            if shape_of(mixed) != shape_of(state.node):
                mixed = edit.call(aten.reshape_as.default, mixed, state.node)
        keeping = {*_nodes_between(state.node, end)}
        keeping |= {_carry_on(self._graph, state.node, read) for read in state.carries}
        state.node.replace_all_uses_with(mixed, lambda user: user not in keeping)
        if not mixed.users:
            raise unread(state)

    def _difference(self, edit: Editor, state: fx.Node) -> fx.Node:
        """What the block in progress changed so far, in the root's layout and the state's dtype."""
        start = edit.cast(self._start, dtype_of(state))
        if shape_of(start) != shape_of(state):
            start = edit.call(aten.reshape_as.default, start, state)
        difference = edit.call(aten.sub.Tensor, state, start)
        if shape_of(difference) != shape_of(self._root):
            difference = edit.call(aten.reshape_as.default, difference, self._root)
        return difference

    def _completes_block(self) -> bool:
        """Whether this read ends a sublayer that ends a block."""
        if self._open_additions == 0:
            return False
        self._open_additions = 0
        self._sublayers += 1
        return self._sublayers in self._seals


def _carry_on(graph: fx.Graph, state: fx.Node, read: Read) -> fx.Node:
    """Keeps a carrying use at the state itself; returns who takes the state for it.

    Copies and views on the way are made anew, since readers may share them.
    """
    path = Dataflow.path_to_origin(read.operand)
    if read.operand is state or state not in path:
        return read.user  # without any, or by an older name of the state's memory
    copies = {state: state}
    way = path[: path.index(state)]
    with graph.inserting_before(read.user):
        for node in reversed(way):
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    read.user.replace_input_with(read.operand, copies[read.operand])
    for node in way:
        if not node.users:
            graph.erase_node(node)
    return copies[way[-1]]


def _nodes_between(first: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    while first.next is not end:
        first = first.next
        yield first
