"""Unpack a tensor in one operation again, for an executor that runs the graph node by node.

Where a model says ``q, k, v = qkv``, Python unbinds the tensor, and Dynamo writes three reads of
it. The gradient of each of these is a tensor as large as all of them, zeros but for its own part,
and autograd adds them up. In a transformer that may cost half as much as all its mixes. (Inductor
makes one loop of it.)

PyTorch forbids to write over what ``unbind`` returned, and a model may have read each part by
itself. So graphs that write in place stay as they are, and parts (or views of them) that are
returned or that an operation reads which is not known to make a new tensor of what it reads.

Contract: values are the same bit for bit, gradients to rounding.
"""

from __future__ import annotations

import itertools
import operator

import torch
from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.graph_values import is_tensor, value_of

_MAKE_NEW = (
    ops.ADDITIONS
    | ops.ACTIVATIONS
    | ops.SCALE_INVARIANT_NORMS
    | (ops.PROJECTIONS - {"einsum"})
    | {"mul", "div", "neg", "cat", "stack", "softmax"}
)


def restore_unbind(module: fx.GraphModule) -> None:
    """Replaces, in place, consecutive reads of all parts of a tensor's first dimension."""
    nodes = list(module.graph.nodes)
    if any(ops.writes_into(node) is not None for node in nodes):
        return
    for node in filter(is_tensor, nodes):
        parts = [user for user in node.users if user.target is operator.getitem]
        if _are_an_unpacking(node, parts) and _only_computed_with(parts):
            _unbind(node, parts)
    module.recompile()


def _are_an_unpacking(node: fx.Node, parts: list[fx.Node]) -> bool:
    """Whether these reads are what unpacking the tensor leaves in a graph, and nothing more."""
    indices = [part.args[1] for part in parts]
    if len(parts) < 2 or any(type(index) is not int for index in indices):
        return False
    size = value_of(node).shape[0]
    consecutive = all(one.next is other for one, other in itertools.pairwise(parts))
    return isinstance(size, int) and consecutive and indices == list(range(size))


def _only_computed_with(parts: list[fx.Node]) -> bool:
    """Whether nobody gets hold of the memory of the parts."""
    pending = [*parts]
    for value in pending:
        readers = [user for user in value.users if ops.operation(user) not in _MAKE_NEW]
        if not all(map(ops.aliases_argument, readers)):
            return False
        pending += readers
    return True


def _unbind(node: fx.Node, parts: list[fx.Node]) -> None:
    with node.graph.inserting_before(parts[0]):
        unbound = node.graph.call_function(torch.unbind, (node,))
    unbound.meta = {**parts[0].meta, "example_value": tuple(map(value_of, parts))}
    for part in parts:
        part.update_arg(0, unbound)
