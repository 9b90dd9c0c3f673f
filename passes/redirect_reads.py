"""Have all who read a state of a stream name the node that made it, not the memory it went into.

After ``x.add_(b)`` a program may read the new state as ``x``, or through a view or copy of ``x``:
by a name that is older than the state, and that may be an earlier state itself. Afterwards every
such reader names the addition, so that replacing its uses reaches them all.

Contract: changes no value; only arguments of readers, and of copies and views on the way to them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from attnres_compile.passes.dataflow import Dataflow, Read
from attnres_compile.passes.graph_editor import Editor
from attnres_compile.passes.graph_values import shape_of
from attnres_compile.passes.streams import ResidualStream

aten = torch.ops.aten


def redirect_reads(graph: fx.Graph, streams: Iterable[ResidualStream]) -> None:
    """Redirects the readers of all streams of a graph, in place, before any of them is rewritten.

    Args:
        graph: the graph that `streams` were found in.
        streams: all of them, since a state of one may be the root of another.
    """
    for stream in streams:
        for state in stream.states[1:]:
            for read in state.reads:
                _redirect(graph, read, state.node)


def _redirect(graph: fx.Graph, read: Read, made: fx.Node) -> None:
    """Puts `made` where the way from a reader up to it leads to something older instead."""
    taker = read.user
    for taken in Dataflow.path_to_origin(read.operand):
        if taken is made:
            return
        if taken < made:
            break
        taker = taken
    else:
        return
    with graph.inserting_before(taker):
        same = shape_of(taken) == shape_of(made)
        named = made if same else Editor(graph, made).call(aten.reshape_as.default, made, taken)
    taker.replace_input_with(taken, named)
