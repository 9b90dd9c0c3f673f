"""Unpack a tensor in one operation again, for an executor that runs the graph node by node.

Where a model says ``q, k, v = qkv``, Python unbinds the tensor, and Dynamo writes three reads of
it. The gradient of each of these is a tensor as large as all of them, zeros but for its own part,
and autograd adds them up. In a transformer that may cost half as much as all its mixes. (Inductor
makes one loop of it.)

Contract: same values. A graph that writes in place, and a tensor of which a part is returned, stay
as they are: PyTorch forbids to write over what ``unbind`` returned.
"""

from __future__ import annotations

import itertools
import operator

import torch
from torch import fx

from attnres_compile.passes.graph_values import is_tensor, value_of
from attnres_compile.passes.operations import aliases_argument, writes_into


def restore_unbind(module: fx.GraphModule) -> None:
    """Replaces, in place, consecutive reads of all parts of a tensor's first dimension."""
    nodes = list(module.graph.nodes)
    if any(writes_into(node) is not None for node in nodes):
        return
    for node in filter(is_tensor, nodes):
        parts = [user for user in node.users if user.target is operator.getitem]
        if _unpack(node, parts) and not _is_returned(parts):
            _unbind(node, parts)
    module.recompile()


def _unpack(node: fx.Node, parts: list[fx.Node]) -> bool:
    """Whether these reads are what unpacking the tensor leaves in a graph, and nothing more."""
    indices = [part.args[1] for part in parts]
    if len(parts) < 2 or any(type(index) is not int for index in indices):
        return False
    size = value_of(node).shape[0]
    consecutive = all(one.next is other for one, other in itertools.pairwise(parts))
    return isinstance(size, int) and consecutive and indices == list(range(size))


def _is_returned(parts: list[fx.Node]) -> bool:
    pending = [*parts]
    for value in pending:
        if any(user.op == "output" for user in value.users):
            return True
        pending += [user for user in value.users if aliases_argument(user)]
    return False


def _unbind(node: fx.Node, parts: list[fx.Node]) -> None:
    with node.graph.inserting_before(parts[0]):
        unbound = node.graph.call_function(torch.unbind, (node,))
    unbound.meta = {**parts[0].meta, "example_value": tuple(map(value_of, parts))}
    for part in parts:
        part.update_arg(0, unbound)
