"""Recognise a model that attends over its own depth already.

Hand-written Attention Residuals gather outputs of several depths in one tensor and attend over
them. In a graph: a ``cat`` or ``stack`` of equal shapes in which one operand depends on another
through the network, followed, with no projection or convolution between, by a softmax or fused
attention. (A U-Net's or DenseNet's concatenation goes into a projection first.)
"""

from __future__ import annotations

from functools import reduce
from operator import or_

from torch import fx

from attnres_compile.passes import operations as ops
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.graph_values import is_tensor, module_path, shape_of, source_line
from attnres_compile.passes.streams import Refusal

_ATTENTION = frozenset(
    "softmax _softmax scaled_dot_product_attention _scaled_dot_product_flash_attention"
    " _scaled_dot_product_efficient_attention".split()
)
_SCORES = frozenset("matmul bmm einsum mean sum linear mm baddbmm linalg_vector_norm".split())
_FARTHEST = 48  # nodes visited below a gathering; scores and their norm take fewer


def find_existing(view: Dataflow) -> tuple[Refusal, ...]:
    """One refusal for each place where a graph attends over its depth already."""
    gatherings = {node: None for node in view.order if _gathers(node)}
    operands = {o: None for node in gatherings for o in ops.tensor_arguments(node)}
    bit, _, mixing_path = view.dependency_masks(operands)
    refusals = []
    for node in view.order:
        own = str(node.target).startswith("attnres.mix")
        if own or (node in gatherings and _is_depth_attention(node, bit, mixing_path)):
            refusals.append(_refusal(node))
    return tuple(refusals)


def _gathers(node: fx.Node) -> bool:
    if ops.operation(node) not in ("cat", "stack") or not is_tensor(node):
        return False
    return len(ops.tensor_arguments(node)) > 1


def _is_depth_attention(
    node: fx.Node, bit: dict[fx.Node, int], mixing_path: dict[fx.Node, int]
) -> bool:
    operands = ops.tensor_arguments(node)
    earlier = reduce(or_, (bit[early] for early in operands))
    deeper = any(mixing_path[late] & earlier for late in operands)
    return deeper and _reaches_attention(node)


def _reaches_attention(start: fx.Node) -> bool:
    pending = [start]
    for node in pending:
        if ops.operation(node) in _ATTENTION:
            return True
        if len(pending) > _FARTHEST:
            return False
        pending += [user for user in node.users if user not in pending and _scores(user)]
    return False


def _scores(node: fx.Node) -> bool:
    """Whether a node may stand between gathered sources and the softmax over them."""
    name = ops.operation(node)
    if name == "linear":
        return is_tensor(node) and shape_of(node)[-1] == 1
    return name in _ATTENTION | _SCORES | ops.NORMS or ops.is_elementwise(node)


def _refusal(node: fx.Node) -> Refusal:
    return Refusal(
        "already-attnres",
        "the model has Attention Residuals already: it attends over outputs of its own depth",
        module_path(node),
        source_line(node),
    )
