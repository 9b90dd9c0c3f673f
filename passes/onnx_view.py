"""The data flow of an ONNX graph as an FX graph, so that one analysis serves both.

Every ONNX node becomes an FX node of the torch operator that means the same to the analysis, with
the type of its value; it is never run. All that differs between the two is in the tables below: an
operator that is in none of them mixes elements, carries nothing and tells no channel.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch import fx

from attnres_compile.passes.graph_values import MODULE_CALLS, SOURCE, ModuleCall
from attnres_compile.passes.onnx_graphs import attributes, captured
from attnres_compile.passes.onnx_values import OnnxValues, TensorType, label

SAME = {
    # element-wise
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "Sum": "add",
    "Pow": "pow",
    "Neg": "neg",
    "Abs": "abs",
    "Sqrt": "sqrt",
    "Reciprocal": "reciprocal",
    "Exp": "exp",
    "Log": "log",
    "Sin": "sin",
    "Cos": "cos",
    "Erf": "erf",
    "Sign": "sign",
    "Floor": "floor",
    "Ceil": "ceil",
    "Round": "round",
    "Min": "minimum",
    "Max": "maximum",
    "Where": "where",
    "Mod": "remainder",
    "IsNaN": "isnan",
    "Not": "logical_not",
    "And": "logical_and",
    "Relu": "relu",
    "Gelu": "gelu",
    "FastGelu": "gelu",
    "QuickGelu": "gelu",
    "Elu": "elu",
    "BiasGelu": "gelu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "HardSigmoid": "hardsigmoid",
    "HardSwish": "hardswish",
    "Mish": "mish",
    "LeakyRelu": "leaky_relu",
    "PRelu": "prelu",
    "Selu": "selu",
    "Celu": "celu",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "ThresholdedRelu": "threshold",
    "Swish": "silu",
    # the same value
    "Identity": "alias",
    "Dropout": "alias",  # dropout drops nothing in inference
    # norms
    "LayerNormalization": "layer_norm",
    "RMSNormalization": "rms_norm",
    "SimplifiedLayerNormalization": "rms_norm",
    "GroupNormalization": "group_norm",
    "GroupNorm": "group_norm",
    "InstanceNormalization": "instance_norm",
    "BatchNormalization": "batch_norm",
    "LpNormalization": "normalize",
    "LRN": "local_response_norm",
    # matrix products
    "FusedMatMul": "matmul",
    "MatMulInteger": "matmul",
    "MatMulNBits": "linear",
    "Einsum": "einsum",
    "Attention": "scaled_dot_product_attention",
    "MultiHeadAttention": "scaled_dot_product_attention",
    "GroupQueryAttention": "scaled_dot_product_attention",
    "Softmax": "softmax",
    # rearrangements and reductions
    "Split": "split",
    "Slice": "slice",
    "Expand": "expand",
    "Concat": "cat",
    "GlobalAveragePool": "adaptive_avg_pool2d",
    "AveragePool": "avg_pool2d",
    "QuantizeLinear": "quantize_per_tensor",
    "DequantizeLinear": "dequantize",
}
"""ONNX operator -> ATen's name of one with the same arguments, as far as the analysis looks."""

RESHAPES = frozenset("Reshape Flatten Squeeze Unsqueeze".split())
SHAPES = frozenset("Shape Size".split())
REDUCTIONS = {
    "ReduceMean": "mean",
    "ReduceSum": "sum",
    "ReduceMax": "amax",
    "ReduceL2": "linalg_vector_norm",
}
CASTS = frozenset("Cast CastLike".split())
CONVOLUTIONS = {"Conv": "conv", "ConvTranspose": "conv_transpose"}
FIRST_ONLY = frozenset("Slice Expand Split QuantizeLinear DequantizeLinear".split())
"""Operators whose further inputs are sizes, axes or scales, no values."""

DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}
_LARGEST = 1 << 60  # elements
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_CONTAINERS = "torch.nn.modules.container."
_TRACES = (_SCOPES, _CLASSES)
_OUTSIDE = "_empty_nn_module_stack_from_metadata_hook"  # made by the exporter, in no module
_QUOTED = re.compile(r"'([^']*)'")


@dataclass(frozen=True)
class OnnxView:
    """An ONNX graph for the analysis.

    Attributes:
        graph: its data flow; every node has a type in ``meta["val"]`` where that is known.
        names: the ONNX value that each node stands for.
    """

    graph: fx.Graph
    names: dict[fx.Node, str]


def view_onnx(graph: onnx.GraphProto, values: OnnxValues) -> OnnxView:
    """The view of a graph in normal form (`normalise_onnx`) whose values are known."""
    return _Builder(graph, values).build()


class _Builder:
    def __init__(self, graph: onnx.GraphProto, values: OnnxValues) -> None:
        self._onnx = graph
        self._values = values
        self._graph = fx.Graph()
        self._nodes: dict[str, fx.Node] = {}
        self._weights = {tensor.name for tensor in graph.initializer}

    def build(self) -> OnnxView:
        for value in self._onnx.input:
            if value.name not in self._weights:
                node = self._graph.create_node("placeholder", value.name, name="input")
                self._record(node, value.name)
        for each in self._onnx.node:
            self._add(each)
        self._graph.output(tuple(self._value(o.name) for o in self._onnx.output))
        names = {node: name for name, node in self._nodes.items()}
        return OnnxView(self._graph, names)

    def _add(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Constant":
            return
        name, args = self._call(node)
        made = self._graph.create_node("call_method", name, args, name=name.replace(".", "_"))
        _describe(made, node)
        if len(node.output) == 1:
            self._record(made, node.output[0])
            return
        made.meta["val"] = tuple(self._type(output) for output in node.output)
        for position, output in enumerate(node.output):
            part = self._graph.call_function(operator.getitem, (made, position))
            _describe(part, node)
            if output:
                self._record(part, output)

    def _call(self, node: onnx.NodeProto) -> tuple[str, tuple[Any, ...]]:
        """ATen's name of what a node does, and the arguments that matter."""
        kind = node.op_type
        inputs = [self._argument(name) for name in node.input if name]
        settings = attributes(node)
        if kind in RESHAPES:
            return "reshape", (self._value(node.input[0]),)
        if kind in CASTS:
            return "to", (self._value(node.input[0]),)
        if kind in SHAPES:
            return "size", (self._value(node.input[0]),)
        if kind == "Transpose":
            rank = len(self._shape(node.input[0]) or ())
            order = settings.get("perm") or tuple(reversed(range(rank)))
            return "permute", (self._value(node.input[0]), tuple(order))
        if kind in REDUCTIONS:
            axes, keep = self._axes(node, settings), bool(settings.get("keepdims", 1))
            return REDUCTIONS[kind], (self._value(node.input[0]), axes, keep)
        if kind in CONVOLUTIONS:
            spatial = len(self._shape(node.input[1]) or (0, 0, 0, 0)) - 2
            values = [self._value(name) for name in node.input if name]
            return f"{CONVOLUTIONS[kind]}{spatial}d", tuple(values)
        if kind == "MatMul":
            return self._matrix_product(node), tuple(self._value(name) for name in node.input)
        if kind == "Gemm":
            return self._gemm(node)
        if kind == "Clip":
            return "clamp", tuple(self._clip(node, settings))
        if kind == "Concat":
            return "cat", ([self._value(name) for name in node.input],)
        if kind in FIRST_ONLY:
            return SAME[kind], (self._value(node.input[0]),)
        if kind in SAME:
            return SAME[kind], tuple(inputs)
        outside = [self._value(name) for name in captured(node) if self._is_known(name)]
        return f"onnx.{kind}", (*inputs, *outside)

    def _matrix_product(self, node: onnx.NodeProto) -> str:
        """A product with a matrix of weights on the right is a linear layer."""
        right = node.input[1]
        constant = right in self._weights or not self._is_computed(right)
        return "linear" if constant and len(self._shape(right) or ()) == 2 else "matmul"

    def _gemm(self, node: onnx.NodeProto) -> tuple[str, tuple[Any, ...]]:
        values = [self._value(name) for name in node.input if name]
        added = node.input[2] if len(node.input) > 2 else ""
        if added and self._shape(added) == self._shape(node.output[0]):
            return "addmm", (values[2], values[0], values[1])
        return "linear", tuple(values)

    def _clip(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> list[Any]:
        bounds = [self._argument(name) if name else None for name in node.input[1:3]]
        bounds = bounds or [settings.get("min"), settings.get("max")]
        return [self._value(node.input[0]), *bounds]

    def _axes(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> list[int]:
        if "axes" in settings:
            return [int(axis) for axis in settings["axes"]]
        constant = self._values.constants.get(node.input[1]) if len(node.input) > 1 else None
        return [] if constant is None else [int(axis) for axis in constant.reshape(-1)]

    def _argument(self, name: str) -> Any:
        """A single number as Python has it, since the analysis looks at eps and exponents."""
        constant = self._values.constants.get(name)
        if constant is None or constant.size != 1 or constant.dtype.kind not in "fiu":
            return self._value(name)
        number = constant.reshape(-1)[0]
        return float(number) if constant.dtype.kind == "f" else int(number)

    def _value(self, name: str) -> fx.Node:
        """The node of a value; weights and constants get theirs when they are first used."""
        if name not in self._nodes:
            node = self._graph.create_node("get_attr", name, name="weight")
            self._record(node, name)
        return self._nodes[name]

    def _is_known(self, name: str) -> bool:
        return name in self._nodes or name in self._weights

    def _is_computed(self, name: str) -> bool:
        return name in self._nodes and self._nodes[name].op != "get_attr"

    def _record(self, node: fx.Node, name: str) -> None:
        self._nodes[name] = node
        node.meta["val"] = self._type(name)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self._values.types.get(name)
        return None if tensor is None else tensor.shape

    def _type(self, name: str) -> torch.Tensor | None:
        tensor = self._values.types.get(name)
        return None if tensor is None else _empty(tensor)


def _empty(tensor: TensorType) -> torch.Tensor | None:
    dtype = DTYPES.get(tensor.element)
    if dtype is None or math.prod(tensor.shape) > _LARGEST or min(tensor.shape, default=0) < 0:
        return None  # torch cannot count so far
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _describe(node: fx.Node, made_from: onnx.NodeProto) -> None:
    node.meta[SOURCE] = label(made_from)
    node.meta[MODULE_CALLS] = module_calls_of(made_from)


def module_calls_of(node: onnx.NodeProto) -> tuple[ModuleCall, ...]:
    """The modules of the PyTorch program around a node, as far as the exporter left a trace.

    torch's present exporter writes the paths into the node's metadata; its older one and others
    write them into the name, as ``/model/layers.0/mlp/MatMul``.
    """
    traces = {p.key: _QUOTED.findall(p.value) for p in node.metadata_props if p.key in _TRACES}
    if _SCOPES not in traces:
        paths = _paths(node.name.split("/")[:-1])
        return tuple(ModuleCall(path, path) for path in paths)
    classes = [*traces.get(_CLASSES, []), *[""] * len(traces[_SCOPES])]
    return tuple(
        ModuleCall(path, path)
        for path, kind in zip(traces[_SCOPES][:-1], classes, strict=False)
        if path and path != _OUTSIDE and not kind.startswith(_CONTAINERS)
    )


def module_path_of(node: onnx.NodeProto) -> str:
    """Path of the innermost module around a node."""
    calls = module_calls_of(node)
    return calls[-1].path if calls else ""


def _paths(parts: list[str]) -> list[str]:
    """Full paths; a part that repeats the one before, as ``conv`` and ``conv.0``, replaces it."""
    paths: list[str] = []
    prefix: list[str] = []
    for part in filter(None, parts):
        if prefix and part.startswith(f"{prefix[-1]}."):
            prefix.pop()
        prefix.append(part)
        paths.append(".".join(prefix))
    return paths
