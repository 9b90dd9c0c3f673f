"""Slices of a concatenation: which of them is one of the parts that were put together.

A dual path network carries its residual stream beside a dense one, in one tensor: it is cut out
where a branch is added, and put together for who reads both.
"""

from __future__ import annotations

from types import EllipsisType

import torch
from torch import Tensor, fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.graph_values import dtype_of, shape_of

_CUTS = frozenset("getitem slice narrow".split())


def concatenated_part(node: fx.Node) -> list[fx.Node] | None:
    """Of a slice that is one of the parts of a concatenation: the nodes from there up to the part.

    None for other nodes, and for slices of anything else, or of less or more than one part.
    """
    path = [node]
    while ops.operation(path[-1]) in _CUTS and len(path[-1].all_input_nodes) == 1:
        path.append(path[-1].all_input_nodes[0])
    joined = path[-1]
    # In the view of an ONNX file, where it is a method, it does not say what it joins along.
    if len(path) == 1 or ops.operation(joined) != "cat" or joined.op != "call_function":
        return None
    parts, shape = ops.argument(joined, 0, "tensors"), shape_of(joined)
    if not isinstance(parts, list | tuple) or any(size < 0 for size in shape):
        return None  # a node that returns all of them, or sizes that only the data tells
    dim = ops.argument(joined, 1, "dim", 0) % len(shape)
    # Where a view of a dense tensor starts tells which elements it has.
    whole = torch.empty(shape, device="meta")
    cut: Tensor | None = whole
    for each in reversed(path[:-1]):
        cut = None if cut is None else _cut(each, cut)
    if cut is None or cut.stride() != whole.stride():
        return None
    start = 0
    for part in parts:
        if len(shape_of(part)) != len(shape):
            continue  # torch.tensor([]), as empty caches start: it joins tensors of any rank
        same = cut.storage_offset() == start * whole.stride(dim) and cut.shape == shape_of(part)
        if same and dtype_of(part) == dtype_of(joined):
            return [*path[1:], part]
        start += shape_of(part)[dim]
    return None


def _cut(node: fx.Node, value: Tensor) -> Tensor | None:
    """What a slicing node makes of another value; None for an index that copies."""
    indices = ops.argument(node, 1, "index") if ops.operation(node) == "getitem" else ()
    for index in indices if isinstance(indices, tuple) else (indices,):
        if not isinstance(index, int | slice | EllipsisType):
            return None
    call = getattr(value, node.target) if isinstance(node.target, str) else node.target
    arguments = node.args[1:] if isinstance(node.target, str) else (value, *node.args[1:])
    assert callable(call)
    cut: Tensor = call(*arguments, **node.kwargs)
    return cut
