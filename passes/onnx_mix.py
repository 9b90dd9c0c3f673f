"""The mix as an ONNX function, and the node that calls it.

``attnres::Mix<n>`` takes n sources, the query and, where there is one, the key gain. Its body is
made of standard operators, so that every runtime executes it; a runtime that fuses recognises it by
its name and finds everything it needs in the attributes. The formula is that of
`kernels/reference.py`: float32 arithmetic (float64 for float64 sources), rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper

DOMAIN = "attnres"
DOMAIN_VERSION = 1
OLDEST_OPSET = 17
OLDEST_IR = 8  # the first with functions in a model

_TYPES = {
    "axis": AttributeProto.INT,
    "axes": AttributeProto.INTS,
    "eps": AttributeProto.FLOAT,
    "scale": AttributeProto.FLOAT,
    "to": AttributeProto.INT,
    "weight_shape": AttributeProto.INTS,
}


def mix_name(sources: int) -> str:
    """``Mix3`` for three sources."""
    return f"Mix{sources}"


def mix_attributes(
    sources: int, *, channel_dim: int, rank: int, double: bool, eps: float, sums: bool
) -> dict[str, Any]:
    """The attributes of a call over sources of `rank` dimensions; see `mix_function`."""
    trailing = 0 if channel_dim == -1 else rank - 1 - channel_dim
    return {
        "axis": channel_dim,
        "axes": [channel_dim],
        "eps": eps,
        "scale": float(sources if sums else 1),
        "to": int(TensorProto.DOUBLE if double else TensorProto.FLOAT),
        "weight_shape": [-1, *[1] * trailing],
    }


def mix_node(
    sources: Sequence[str], query: str, gain: str | None, output: str, settings: dict[str, Any]
) -> onnx.NodeProto:
    """The call of a mix; `settings` are its attributes."""
    return helper.make_node(
        mix_name(len(sources)),
        [*sources, query, *([gain] if gain is not None else [])],
        [output],
        domain=DOMAIN,
        **settings,
    )


def mix_function(sources: int, *, gain: bool, opset: int) -> onnx.FunctionProto:
    """What ``Mix<n>`` computes, in the standard operators of version `opset`.

    Attributes of the call: `axis` is the channel, and `axes` the same in a list; `scale` is n for
    ``aggregate="sum"`` and 1 for ``"mean"``; `to` is the type that is computed in; `weight_shape`
    is the shape in which the query broadcasts against a source.
    """
    inputs = [f"source_{i}" for i in range(sources)]
    body = [
        _node("Constant", [], "axes", value_ints="axes"),
        _node("Constant", [], "weight_shape", value_ints="weight_shape"),
        _node("Constant", [], "eps_float", value_float="eps"),
        _node("Constant", [], "scale_float", value_float="scale"),
        _node("Cast", ["eps_float"], "eps", to="to"),
        _node("Cast", ["scale_float"], "scale", to="to"),
        _node("Size", ["query"], "width_int"),
        _node("Cast", ["width_int"], "width", to="to"),
        *_weight(gain),
    ]
    for i, name in enumerate(inputs):
        body += [
            _node("Cast", [name], f"value_{i}", to="to"),
            _node("Mul", [f"value_{i}", f"value_{i}"], f"square_{i}"),
            _node("ReduceSum", [f"square_{i}", "axes"], f"squares_{i}"),
            _node("Mul", [f"value_{i}", "weight"], f"product_{i}"),
            _node("ReduceSum", [f"product_{i}", "axes"], f"projection_{i}"),
        ]
    every = range(sources)
    body += [
        _node("Concat", [f"squares_{i}" for i in every], "squares", axis="axis"),
        _node("Concat", [f"projection_{i}" for i in every], "projections", axis="axis"),
        _node("Div", ["squares", "width"], "mean_squares"),
        _node("Add", ["mean_squares", "eps"], "mean_squares_eps"),
        _node("Sqrt", ["mean_squares_eps"], "rms"),
        _node("Div", ["projections", "rms"], "logits"),
        _node("Softmax", ["logits"], "alpha", axis="axis"),
        _node("Mul", ["alpha", "scale"], "coefficients"),
        helper.make_node("Constant", [], ["ones"], value_ints=[1] * sources),
        _node("Split", ["coefficients", "ones"], *[f"coefficient_{i}" for i in every], axis="axis"),
        *[_node("Mul", [f"value_{i}", f"coefficient_{i}"], f"part_{i}") for i in every],
        *_sum([f"part_{i}" for i in every]),
        _node("CastLike", ["sum", inputs[0]], "mixed"),
    ]
    return helper.make_function(
        DOMAIN,
        mix_name(sources),
        [*inputs, "query", *(["gain"] if gain else [])],
        ["mixed"],
        body,
        [helper.make_opsetid("", opset)],
        attributes=list(_TYPES),
        doc_string="Block Attention Residual: mixes its sources by attention over depth.",
    )


def _weight(gain: bool) -> list[onnx.NodeProto]:
    """Only the product of query and gain matters."""
    cast = _node("Cast", ["query"], "query_cast", to="to")
    last = "query_cast"
    nodes = [cast]
    if gain:
        nodes.append(_node("Cast", ["gain"], "gain_cast", to="to"))
        nodes.append(_node("Mul", ["query_cast", "gain_cast"], "query_gain"))
        last = "query_gain"
    return [*nodes, _node("Reshape", [last, "weight_shape"], "weight")]


def _sum(parts: list[str]) -> list[onnx.NodeProto]:
    nodes, total = [], parts[0]
    for position, part in enumerate(parts[1:], start=1):
        output = "sum" if position == len(parts) - 1 else f"sum_{position}"
        nodes.append(_node("Add", [total, part], output))
        total = output
    return nodes


def _node(kind: str, inputs: list[str], *outputs: str, **references: str) -> onnx.NodeProto:
    """A node whose attributes are those of the function's call."""
    node = helper.make_node(kind, inputs, list(outputs))
    for name, attribute in references.items():
        node.attribute.append(_reference(name, attribute))
    return node


def _reference(name: str, attribute: str) -> Any:
    made = AttributeProto()
    made.name = name
    made.ref_attr_name = attribute
    made.type = _TYPES[attribute]
    return made
