"""Questions about ONNX graphs that several files ask: subgraphs, names in use, attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import helper


def main_opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators that a model uses; 1 where it says nothing."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)


def subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """The bodies of If, Loop, Scan and the like, by the attribute that holds them."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        for graph in attribute.graphs:
            yield attribute.name, graph


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of all bodies in it."""
    for node in graph.node:
        yield node
        for _, body in subgraphs(node):
            yield from all_nodes(body)


def captured(node: onnx.NodeProto) -> list[str]:
    """Values that the bodies of a node take from outside."""
    names: dict[str, None] = {}
    for _, body in subgraphs(node):
        own = {each.name for each in (*body.input, *body.initializer)}
        for inner in body.node:
            own.update(inner.output)
        read = [name for inner in body.node for name in (*inner.input, *captured(inner))]
        read += [output.name for output in body.output]
        names.update(dict.fromkeys(name for name in read if name and name not in own))
    return list(names)


def read_values(graph: onnx.GraphProto) -> set[str]:
    """The names that something in a graph reads, its outputs included."""
    names = {output.name for output in graph.output}
    for node in graph.node:
        names.update(node.input)
        names.update(captured(node))
    return names


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values, without bodies."""
    return {
        a.name: helper.get_attribute_value(a)
        for a in node.attribute
        if a.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
        and not a.ref_attr_name
    }
