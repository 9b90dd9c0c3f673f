"""Let C++ add the bias of the linear layer whose result it adds to the stream.

``addmm`` on a CPU copies the bias into every row of its result before it multiplies, which is one
more pass over memory. The site that reads the result adds a vector to its rows at no such cost,
and its backward pass, which writes the gradient of these rows, can sum them, too.

Contract: values are the same to rounding. Only where the stream is of the dtype that is computed
in: elsewhere ``addmm`` rounds once, and a product would be rounded before its bias is added.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnres_compile.kernels.reference import arithmetic_dtype
from attnres_compile.passes.cpp_calls import arguments_of, phase_of, set_argument
from attnres_compile.passes.graph_values import value_of
from attnres_compile.passes.sum_tokens import sums_tokens

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.reshape.default)


def absorb_biases(graph: fx.Graph) -> None:
    """Rewrites, in place, an ATen graph with the operators of ``cpp_library.py``."""
    for node in list(graph.nodes):
        if phase_of(node) in ("complete", "phase2"):
            _absorb(graph, node)
        elif phase_of(node) in ("complete_backward", "phase2_backward"):
            _sum_gradient(graph, node)


def _absorb(graph: fx.Graph, node: fx.Node) -> None:
    arguments = arguments_of(node)
    (*others, skip), branch = arguments["sources"], arguments["branch"]
    if branch is None:
        return
    if _linear(branch, node) is None:  # perhaps it was written as f(x) + x
        skip, branch = branch, skip
    linear = _linear(branch, node)
    if linear is None:
        return
    vector, rows, columns = linear.args
    with graph.inserting_before(linear):
        product = graph.call_function(_aten.mm.default, (rows, columns))
    product.meta = dict(linear.meta)
    branch = product if branch is linear else branch
    linear.replace_all_uses_with(product)
    graph.erase_node(linear)
    set_argument(node, "sources", [*others, skip])
    set_argument(node, "branch", branch)
    set_argument(node, "branch_bias", vector)


def _linear(result: fx.Node, reader: fx.Node) -> fx.Node | None:
    """The product with a bias that is read, as it is or in another shape, only here and once."""
    linear: Any = result.args[0] if result.target in _VIEWS else result
    if not isinstance(linear, fx.Node) or linear.target is not _aten.addmm.default:
        return None
    if linear.kwargs or any(len(each.users) > 1 for each in {result, linear}):
        return None
    if pytree.tree_leaves(reader.args).count(result) > 1:
        return None
    bias: Any = linear.args[0]
    vector, value = value_of(bias), value_of(result)
    fits = vector.shape == value.shape[-1:] and vector.is_contiguous()
    same = vector.dtype == value.dtype == arithmetic_dtype(value.dtype)
    return linear if fits and same else None


def _sum_gradient(graph: fx.Graph, node: fx.Node) -> None:
    """The sums over tokens of the last gradient are formed where it is."""
    grad = _grad_of_sum(arguments_of(node))
    if grad is None:
        return
    value = value_of(grad)
    row = value.new_empty(value.shape[-1])
    flat = [grad, *(user for user in grad.users if user.target in _VIEWS)]
    readers = [user for each in flat for user in each.users if sums_tokens(user)]
    sums = [user for user in readers if value_of(user).shape[-1:] == row.shape]
    if not sums:
        return
    with graph.inserting_before(node):
        total = graph.call_function(_aten.new_empty.default, (grad, list(row.shape)))
    total.meta["val"] = row
    set_argument(node, "grad_branch_bias", total)
    for each in sums:
        shape = list(value_of(each).shape)
        with graph.inserting_before(each):
            shaped = graph.call_function(_aten.reshape.default, (total, shape))
        shaped.meta["val"] = value_of(each)
        each.replace_all_uses_with(shaped)
        graph.erase_node(each)


def _grad_of_sum(arguments: dict[str, Any]) -> fx.Node | None:
    """Where a backward pass writes the gradient of what the branch was added to, and its own."""
    if "grads" not in arguments:
        return cast("fx.Node | None", arguments["grad"])
    last = arguments["wanted"][-1:] == [arguments["count"] - 1]
    return cast("fx.Node", arguments["grads"][-1]) if last else None
