"""Which nodes of a graph a gradient comes back to from its outputs.

None comes to what no output is made of, to what is detached or made into an integer on the way, and
to what the model runs under ``torch.no_grad``. A query at such a place could never be trained.
"""

from __future__ import annotations

import torch
from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.graph_values import dtype_of, is_tensor


def nodes_with_gradients(view: Dataflow) -> set[fx.Node]:
    """The nodes that some floating-point output depends on by floating-point values.

    Where there is no such output, the loss is taken by another call than this one: every node
    outside of ``no_grad`` counts.
    """
    silent = _without_gradients(view)
    outputs = [node for node in view.order if node.op == "output"]
    pending = [n for o in outputs for n in view.flow.predecessors(o) if _differentiable(n)]
    if not pending:
        return {node for node in view.order if node not in silent}
    found = {*outputs}
    for node in pending:
        if node not in found and node not in silent and ops.operation(node) != "detach":
            found.add(node)
            pending += [part for part in view.flow.predecessors(node) if _differentiable(part)]
    return found


def _without_gradients(view: Dataflow) -> set[fx.Node]:
    """The nodes that the model runs under ``torch.no_grad``."""
    found, enabled = set(), True
    for node in view.order:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled:
            found.add(node)
    return found


def _differentiable(node: fx.Node) -> bool:
    """A real or complex tensor, or several results of which one may be."""
    if not is_tensor(node):
        return True
    return dtype_of(node).is_floating_point or dtype_of(node).is_complex
