"""Bring an ONNX model into the form that the analysis reads: one addition, one node.

Functions of the model are inlined, a ``Sum`` of several operands becomes a chain of ``Add``, and
ONNX Runtime's fused ``SkipLayerNormalization`` becomes the residual addition and the norm it is.

Contract: computes the same; nodes that need nothing of this are left as they are, in their order.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx.inliner
from onnx import helper

from attnres_compile.passes.onnx_graphs import attributes, subgraphs

FUSED_NORMS = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
}
MICROSOFT = "com.microsoft"


def normalise_onnx(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model in the form that `view_onnx` reads."""
    if model.functions:
        normal = onnx.inliner.inline_local_functions(model)
    else:
        normal = onnx.ModelProto()
        normal.CopyFrom(model)
    _expand(normal.graph)
    return normal


def _expand(graph: onnx.GraphProto) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for _, body in subgraphs(node):
            _expand(body)
        nodes += _EXPANSIONS.get((node.domain, node.op_type), _as_it_is)(node)
    if len(nodes) != len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)


def _as_it_is(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [node]


def _sum(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """``Sum(a, b, c)`` as ``Add(Add(a, b), c)``."""
    if len(node.input) < 3:
        return [node]
    return _additions(node, list(node.input), node.output[0])


def _skip_norm(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The addition of input, skip and bias, and the norm that reads it."""
    outputs = [*node.output, "", "", ""][:4]
    if any(outputs[1:3]):  # statistics for training, which the norm alone does not give
        return [node]
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    count = 3 if simplified else 4
    values = [*node.input, "", "", ""]
    weights, bias = [v for v in values[2:count] if v], values[count]
    total = outputs[3] or f"{outputs[0]}/residual"
    added = _additions(node, [v for v in (*values[:2], bias) if v], total)
    norm = helper.make_node(
        FUSED_NORMS[node.op_type],
        [total, *weights],
        outputs[:1],
        name=node.name,
        axis=-1,
        epsilon=attributes(node).get("epsilon", 1e-12),
    )
    norm.metadata_props.extend(node.metadata_props)
    return [*added, norm]


def _additions(node: onnx.NodeProto, operands: list[str], output: str) -> list[onnx.NodeProto]:
    added: list[onnx.NodeProto] = []
    total = operands[0]
    for position, operand in enumerate(operands[1:], start=1):
        made = output if position == len(operands) - 1 else f"{output}/sum_{position}"
        one = helper.make_node("Add", [total, operand], [made], name=f"{node.name}/add_{position}")
        one.metadata_props.extend(node.metadata_props)
        added.append(one)
        total = made
    return added


_EXPANSIONS: dict[tuple[str, str], Callable[[onnx.NodeProto], list[onnx.NodeProto]]] = {
    ("", "Sum"): _sum,
    **{(MICROSOFT, name): _skip_norm for name in FUSED_NORMS},
}
