"""Let the C++ phases add the bias of the linear layer whose result they add to the stream.

``addmm`` on a CPU copies the bias into every row of its result before it multiplies, which is a pass
over memory of its own. The phase that reads the result adds a vector to its rows at no such cost,
and its backward pass, which writes the gradient of these rows, can sum them, too.

Contract: values are the same to rounding. Only where the stream is of the dtype that is computed in:
elsewhere ``addmm`` rounds once and the product without the bias would be rounded before it is added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnres_compile.kernels.cpp_library import operators
from attnres_compile.kernels.reference import arithmetic_dtype

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.reshape.default)


def absorb_biases(graph: fx.Graph) -> None:
    """Rewrites, in place, an ATen graph with the operators of ``cpp_library.py``."""
    phases = operators()
    for node in list(graph.nodes):
        if node.target is phases["complete"]:
            _absorb(graph, node, "second", "bias")
        elif node.target is phases["phase2"]:
            _absorb(graph, node, "branch", "branch_bias")
        elif node.target is phases["phase2_backward"]:
            _sum_gradient(graph, node)


def _absorb(graph: fx.Graph, node: fx.Node, branch: str, bias: str) -> None:
    result = node.args[_place(node, branch)]
    if not isinstance(result, fx.Node):
        return
    linear = result.args[0] if result.target in _VIEWS else result
    if not isinstance(linear, fx.Node) or not _has_a_bias(linear):
        return
    if any(len(each.users) > 1 for each in (result, linear)):
        return
    vector, rows, columns = linear.args
    with graph.inserting_before(linear):
        product = graph.call_function(_aten.mm.default, (rows, columns))
    product.meta = dict(linear.meta)
    linear.replace_all_uses_with(product)
    graph.erase_node(linear)
    node.update_arg(_place(node, bias), vector)


def _has_a_bias(node: fx.Node) -> bool:
    if node.target is not _aten.addmm.default or node.kwargs:
        return False
    vector, value = (each.meta["val"] for each in (node.args[0], node))
    return (
        vector.shape == value.shape[1:]
        and vector.is_contiguous()
        and vector.dtype == value.dtype == arithmetic_dtype(value.dtype)
    )


def _sum_gradient(graph: fx.Graph, node: fx.Node) -> None:
    """The sums over tokens of the last gradient are formed where it is."""
    grads, wanted, count, query = (
        node.args[_place(node, name)] for name in ("grads", "wanted", "count", "query")
    )
    if not grads or wanted[-1] != count - 1:
        return
    grad = grads[-1]
    flat = [user for user in grad.users if user.target in _VIEWS and user.meta["val"].dim() == 2]
    sums = [user for view in flat for user in view.users if _sums_tokens(user, grad)]
    if not sums:
        return
    with graph.inserting_before(node):
        total = graph.call_function(_aten.empty_like.default, (query,))
    total.meta["val"] = torch.empty_like(query.meta["val"])
    node.update_arg(_place(node, "grad_branch_bias"), total)
    for each in sums:
        with graph.inserting_before(each):
            shaped = graph.call_function(
                _aten.reshape.default, (total, list(each.meta["val"].shape))
            )
        shaped.meta["val"] = each.meta["val"]
        each.replace_all_uses_with(shaped)
        graph.erase_node(each)


def _sums_tokens(node: fx.Node, grad: fx.Node) -> bool:
    if node.target is not _aten.sum.dim_IntList or node.kwargs or list(node.args[1]) != [0]:
        return False
    width, dtype = grad.meta["val"].shape[-1], grad.meta["val"].dtype
    value = node.meta["val"]
    return value.numel() == width and value.dtype == dtype == arithmetic_dtype(dtype)


def _place(node: fx.Node, name: str) -> int:
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments].index(name)
