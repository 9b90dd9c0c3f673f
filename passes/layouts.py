"""Layouts of a carrier: a transposition between residual additions keeps every element.

In DaViT a state is an image [batch, channel, height, width] where the branch is a convolution, and
tokens [batch, position, channel] where it is attention. Such additions are one stream: its sources
stay in the layout of the root, a branch is brought there, and a mix to where it is read.

A *turn* is a transposition on the way from one addition to the skip operand of a later one that is
not undone before it. Turns are seen through where they join two chains of which one is too short to
be a stream of its own, if the channel is one and the same dimension on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.classify_readers import channel_dimension
from attnres_compile.passes.dataflow import Dataflow, Reads
from attnres_compile.passes.graph_values import shape_of
from attnres_compile.passes.streams import ResidualStream

Turns = tuple[fx.Node, ...]


def joining_turns(
    view: Dataflow, reads: Reads, streams: Sequence[ResidualStream]
) -> frozenset[fx.Node]:
    """The turns to see through, between the end of one of these chains and the root of another."""
    ends = {stream.states[-1].node: stream for stream in streams}
    found: set[fx.Node] = set()
    for stream in streams:
        turns, end = _turns_above(view, reads, stream)
        before = ends.get(end)
        if not turns or before is None or _is_written(view, end):
            continue
        short = min(len(before.sublayers), len(stream.sublayers)) < 2
        if short and _same_channel(before, stream, turns):
            found.update(turns)
            del ends[end]  # of several chains after one, the first goes on with it
    return frozenset(found)


def turns_after(turns: Turns, more: Iterable[fx.Node]) -> Turns:
    """Turns and those that follow them, without pairs of which one undoes the other."""
    kept = list(turns)
    for turn in more:
        if kept and _undoes(turn, kept[-1]):
            kept.pop()
        else:
            kept.append(turn)
    return tuple(kept)


def order_of(turn: fx.Node) -> tuple[int, ...]:
    """Which dimension of what is turned each dimension of the result is."""
    order = ops.permutation(turn)
    assert order is not None
    return order


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def turned(turn: fx.Node) -> fx.Node:
    """What a turn is applied to."""
    return ops.tensor_arguments(turn)[0]


def _undoes(turn: fx.Node, before: fx.Node) -> bool:
    same = shape_of(turned(turn)) == shape_of(before)
    return same and order_of(turn) == inverse(order_of(before))


def _turns_above(
    view: Dataflow, reads: Reads, stream: ResidualStream
) -> tuple[list[fx.Node], fx.Node]:
    """The transpositions above the root of a chain, upmost last, and the value that they turn."""
    addition = stream.states[1].addition
    assert addition is not None
    turns, node = [], addition.previous
    while ops.permutation(node) is not None and not _is_written(view, node):
        turns.append(node)
        node = reads.value_read(turned(node), node)
    return turns, node


def _is_written(view: Dataflow, node: fx.Node) -> bool:
    """Whether its memory is ever written into: then a reader may know it by an older name."""
    return bool(view.writers.get(view.memory.get(node, node)))


def _same_channel(before: ResidualStream, after: ResidualStream, turns: Sequence[fx.Node]) -> bool:
    """Whether the channel of one chain is still a dimension, and the channel, of the next."""
    end, root = before.states[-1].node, after.states[0].node
    channels = channel_dimension(before), channel_dimension(after)
    if None in channels or shape_of(end) != shape_of(before.states[0].node):
        return False
    dimension: int | None = range(len(shape_of(end)))[channels[0] or 0]
    way = Dataflow.path_to_origin(root, frozenset(turns))
    for node, above in zip(reversed(way[:-1]), reversed(way), strict=False):
        dimension = None if dimension is None else _followed(dimension, above, node)
    return way[-1] is end and dimension == range(len(shape_of(root)))[channels[1] or 0]


def _followed(dimension: int, above: fx.Node, node: fx.Node) -> int | None:
    """Where a dimension is after a view; None where it is split or merged."""
    order = ops.permutation(node)
    if order is not None:
        return order.index(dimension)
    before, after = shape_of(above), shape_of(node)
    if ops.is_value_preserving(node) or before == after:
        return dimension
    leading = math.prod(before[:dimension])
    fitting = [d for d, size in enumerate(after) if size == before[dimension]]
    found = [d for d in fitting if ops.is_reshape(node) and math.prod(after[:d]) == leading]
    return found[0] if found else None
