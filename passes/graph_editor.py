"""Put new nodes into a graph, with example values and the provenance of the node they serve."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.gradient_modes import gradient_modes
from attnres_compile.passes.graph_values import MODULE_CALLS, dtype_of, value_of
from attnres_compile.passes.inline_checkpoints import REGION

aten = torch.ops.aten
_GIVEN = ("placeholder", "get_attr")
_PROVENANCE = (MODULE_CALLS, REGION, "nn_module_stack", "stack_trace", "source_fn_stack")


class Editor:
    """Inserts nodes before an anchor, with example values and the anchor's provenance."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node) -> None:
        self._graph = graph
        self._anchor = anchor
        self._key = _key(anchor)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self._graph.call_function(target, args, kwargs)
        node.meta.update({k: self._anchor.meta[k] for k in _PROVENANCE if k in self._anchor.meta})
        if self._key is not None:
            node.meta[self._key] = evaluate(node)
        return node

    def add(self, left: fx.Node, right: fx.Node) -> fx.Node:
        return self.call(aten.add.Tensor, self.cast(left, dtype_of(right)), right)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if dtype_of(node) == dtype else self.call(aten.to.dtype, node, dtype)


def refresh(node: fx.Node) -> None:
    """Computes the example value of a node anew, after its arguments changed."""
    key = _key(node)
    if key is not None:
        node.meta[key] = evaluate(node)


def _key(node: fx.Node) -> str | None:
    return next((key for key in ("val", "example_value") if key in node.meta), None)


def evaluate(node: fx.Node) -> Any:
    """The example value of a new node, computed on fake tensors."""
    args = fx.node.map_arg(node.args, value_of)
    kwargs = fx.node.map_arg(node.kwargs, value_of)
    assert callable(node.target)
    # The mode of the values themselves: the ambient one may be another's. Without gradients, or
    # the user's hooks on saved tensors would be called with fake ones.
    fakes = [leaf for leaf in tree_leaves(args) if isinstance(leaf, FakeTensor)]
    with torch.no_grad(), fakes[0].fake_mode if fakes else nullcontext():
        return node.target(*args, **kwargs)


def hoist(node: fx.Node, before: fx.Node, reader: fx.Node, view: Dataflow) -> bool:
    """Lets a node be read before another one instead of at its reader; False where it cannot be.

    What it is computed from moves with it, if that is parameters, buffers and inputs alone: views,
    casts and arithmetic on them, no write; and none to where gradients are recorded from where they
    are not, or the other way round. Nor may anything be written into what is then read earlier.

    Args:
        node: a parameter, or what is computed from some.
        before: where it is to be read.
        reader: where it is read so far, after `before`.
        view: of their graph, as it was before any hoist.
    """
    late = _late_inputs(node, before)
    if late is None or (late and not _same_mode([before, *late])):
        return False
    read = {node, *(argument for each in late for argument in each.all_input_nodes)}
    if any(view.writes_between(each, before, reader) for each in read):
        return False
    for each in late:
        before.prepend(each)
    return True


def _late_inputs(node: fx.Node, before: fx.Node) -> list[fx.Node] | None:
    """The nodes that would have to move, in order; None when one of them must not."""
    if node < before:
        return []
    if node is before or not _may_move(node):
        return None
    late: list[fx.Node] = []
    for argument in node.all_input_nodes:
        deeper = _late_inputs(argument, before)
        if deeper is None:
            return None
        late += [each for each in deeper if each not in late]
    return [*late, node]


def _same_mode(nodes: list[fx.Node]) -> bool:
    """Whether those of these nodes that compute something do so in one gradient mode."""
    modes = gradient_modes(nodes[0].graph.nodes, at_start=torch.is_grad_enabled())
    return len({modes[node] for node in nodes if node.op not in _GIVEN}) < 2


def _may_move(node: fx.Node) -> bool:
    if node.op in _GIVEN:
        return True
    if node.op not in ("call_function", "call_method") or ops.writes_into(node) is not None:
        return False
    return ops.is_elementwise(node) and ops.operation(node) not in (ops.DROPOUTS | ops.FACTORIES)
