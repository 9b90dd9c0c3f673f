"""Let the C++ phases add the bias of the linear layer whose result they add to the stream.

``addmm`` on a CPU copies the bias into every row of its result before it multiplies, which is one
more pass over memory. The phase that reads the result adds a vector to its rows at no such cost,
and its backward pass, which writes the gradient of these rows, can sum them, too.

Contract: values are the same to rounding. Only where the stream is of the dtype that is computed
in: elsewhere ``addmm`` rounds once, and a product would be rounded before its bias is added.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

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
    result = _arguments(node)[branch]
    if result is None:
        return
    linear: Any = result.args[0] if result.target in _VIEWS else result
    if not _has_a_bias(linear) or any(len(each.users) > 1 for each in (result, linear)):
        return
    vector, rows, columns = linear.args
    with graph.inserting_before(linear):
        product = graph.call_function(_aten.mm.default, (rows, columns))
    product.meta = dict(linear.meta)
    linear.replace_all_uses_with(product)
    graph.erase_node(linear)
    _set(node, bias, vector)


def _has_a_bias(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not _aten.addmm.default or node.kwargs:
        return False
    vector, value = (_value(each) for each in (node.args[0], node))
    fits = vector.shape == value.shape[1:] and vector.is_contiguous()
    return fits and vector.dtype == value.dtype == arithmetic_dtype(value.dtype)


def _sum_gradient(graph: fx.Graph, node: fx.Node) -> None:
    """The sums over tokens of the last gradient are formed where it is."""
    arguments = _arguments(node)
    if not arguments["wanted"] or arguments["wanted"][-1] != arguments["count"] - 1:
        return
    grad, query = arguments["grads"][-1], arguments["query"]
    flat = [user for user in grad.users if user.target in _VIEWS and _value(user).dim() == 2]
    sums = [user for view in flat for user in view.users if _sums_tokens(user)]
    if not sums:
        return
    with graph.inserting_before(node):
        total = graph.call_function(_aten.empty_like.default, (query,))
    total.meta["val"] = torch.empty_like(_value(query))
    _set(node, "grad_branch_bias", total)
    for each in sums:
        shape = list(_value(each).shape)
        with graph.inserting_before(each):
            shaped = graph.call_function(_aten.reshape.default, (total, shape))
        shaped.meta["val"] = _value(each)
        each.replace_all_uses_with(shaped)
        graph.erase_node(each)


def _sums_tokens(node: fx.Node) -> bool:
    if node.target is not _aten.sum.dim_IntList or node.kwargs:
        return False
    grads, dims, *_ = cast("tuple[Any, ...]", node.args)
    dtype = _value(grads).dtype
    return list(dims) == [0] and _value(node).dtype == dtype == arithmetic_dtype(dtype)


def _arguments(node: fx.Node) -> dict[str, Any]:
    return dict(zip(_names(node), node.args, strict=True))


def _set(node: fx.Node, name: str, argument: fx.Node) -> None:
    node.update_arg(_names(node).index(name), argument)


def _names(node: fx.Node) -> list[str]:
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments]


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
