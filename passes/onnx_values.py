"""Types of every value of an ONNX graph, and the numbers in its small constants.

ONNX files leave most shapes to be computed: a ``Reshape`` to ``Concat(Shape(x)[0], 4, -1)`` says
nothing by itself. So each graph is swept once for one choice of sizes of its dynamic axes, the way
an interpreter would run it, but with types in the place of large tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import helper, numpy_helper

from attnres_compile.errors import CheckpointError, InputError, in_words
from attnres_compile.passes.onnx_graphs import main_opset, subgraphs

LARGEST_CONSTANT = 4096
"""Elements up to which a value is computed; shapes, axes, scales and eps are far smaller."""

_RANDOM = frozenset("RandomNormal RandomUniform RandomNormalLike RandomUniformLike".split()) | {
    "Bernoulli",
    "Multinomial",
}
_LIKE_FIRST = frozenset(
    "Gelu FastGelu QuickGelu BiasGelu SimplifiedLayerNormalization RotaryEmbedding Dropout"
    " MultiHeadAttention GroupQueryAttention PackedMultiHeadAttention GroupNorm SkipGroupNorm"
    " Attention DecoderMaskedMultiHeadAttention".split()
)
"""Operators of ONNX Runtime whose first output has the shape of their first input."""


@dataclass(frozen=True)
class TensorType:
    """Element type (ONNX's number for it) and sizes."""

    element: int
    shape: tuple[int, ...]


@dataclass
class OnnxValues:
    """What is known of the values of a graph, by name.

    Attributes:
        types: a value of unknown shape is missing.
        constants: numbers of small values that do not depend on the inputs' contents.
    """

    types: dict[str, TensorType] = field(default_factory=dict)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)


def infer_values(
    model: onnx.ModelProto, sizes: Mapping[str, tuple[int, ...]], small: Mapping[str, Any]
) -> OnnxValues:
    """Sweeps the main graph of a model.

    Args:
        model: a model without functions of its own.
        sizes: the shape of each input (`input_shapes`).
        small: initialisers of at most `LARGEST_CONSTANT` elements, by name.

    Raises:
        InputError: the sizes do not go together with the model.
    """
    return _Sweep(model, small).run(sizes)


def input_shapes(
    model: onnx.ModelProto, given: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """A shape for each input: as given, or with small sizes for its dynamic axes.

    An axis of one name has one size; a name like ``past + seq`` is the sum of its parts.

    Raises:
        InputError: an input is unknown, or its rank is.
    """
    initialisers = {tensor.name for tensor in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in initialisers]
    names = [each.name for each in inputs]
    for name in given:
        if name not in names:
            raise InputError(f"the model has no input {name!r}; it has {', '.join(names)}.")
    named: dict[str, int] = {}
    for each in inputs:
        if each.name in given:
            named.update(_named_sizes(each, given[each.name]))
    return {each.name: given.get(each.name) or _shape(each, named) for each in inputs}


def _named_sizes(value: onnx.ValueInfoProto, shape: tuple[int, ...]) -> dict[str, int]:
    dims = value.type.tensor_type.shape.dim
    if value.type.tensor_type.HasField("shape") and len(dims) != len(shape):
        raise InputError(f"the input {value.name!r} has {len(dims)} dimensions, not {len(shape)}.")
    for dim, size in zip(dims, shape, strict=False):
        if dim.dim_value > 0 and dim.dim_value != size:
            raise InputError(
                f"the input {value.name!r} has the size {dim.dim_value} where {size} was given."
            )
    return {dim.dim_param: s for dim, s in zip(dims, shape, strict=False) if dim.dim_param}


def _shape(value: onnx.ValueInfoProto, named: dict[str, int]) -> tuple[int, ...]:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise InputError(
            f"the input {value.name!r} is no tensor of known rank; say its shape by --input-shape."
        )
    rank = len(tensor.shape.dim)
    shape = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.dim_value > 0:
            shape.append(dim.dim_value)
            continue
        size = _sum_of_names(dim.dim_param, named) or _small_size(axis, rank, tensor.elem_type)
        if dim.dim_param and dim.dim_param != "?":
            named.setdefault(dim.dim_param, size)
        shape.append(size)
    return tuple(shape)


def _sum_of_names(text: str, named: Mapping[str, int]) -> int | None:
    total = 0
    for part in text.replace(" ", "").split("+"):
        size = int(part) if part.isdecimal() else named.get(part)
        if size is None or part == "?":
            return None
        total += size
    return total


def _small_size(axis: int, rank: int, element: int) -> int:
    """Two examples; images of 64, 8 tokens, 512 samples of sound."""
    if axis == 0:
        return 2
    if rank == 4 and axis > 1:
        return 64
    if rank == 4:
        return 3
    floating = element in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return 512 if rank == 2 and floating else 8


class _Sweep:
    def __init__(self, model: onnx.ModelProto, small: Mapping[str, Any]) -> None:
        self._model = model
        self._opsets = {o.domain or "": o.version for o in model.opset_import}
        self._known = OnnxValues()
        self._small = small

    def run(self, sizes: Mapping[str, tuple[int, ...]]) -> OnnxValues:
        graph = self._model.graph
        for each in graph.input:
            if each.name in sizes:
                element = each.type.tensor_type.elem_type
                self._known.types[each.name] = TensorType(element, sizes[each.name])
        self._add_initialisers(graph)
        self._known.constants.update(self._small)
        declared = {v.name: v for v in (*graph.value_info, *graph.output)}
        self._visit(graph.node, declared)
        return self._known

    def _add_initialisers(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._known.types[tensor.name] = TensorType(tensor.data_type, tuple(tensor.dims))

    def _visit(
        self, nodes: Iterable[onnx.NodeProto], declared: Mapping[str, onnx.ValueInfoProto]
    ) -> None:
        for node in nodes:
            if node.op_type == "If":
                self._visit_if(node)
                continue
            self._infer(node)
            for name in node.output:
                if name and name not in self._known.types and name in declared:
                    self._declare(declared[name])
            self._fold(node)

    def _visit_if(self, node: onnx.NodeProto) -> None:
        """The branch that is taken for these sizes; where that depends on values, both."""
        bodies = dict(subgraphs(node))
        condition = self._known.constants.get(node.input[0])
        if condition is not None:
            taken = ["then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"]
        else:
            taken = ["then_branch", "else_branch"]
        types: list[list[TensorType | None]] = []
        for name in taken:
            body = bodies[name]
            self._add_initialisers(body)
            declared = {v.name: v for v in (*body.value_info, *body.output)}
            try:
                self._visit(body.node, declared)
            except InputError:
                # A branch for other sizes than these; which one is taken, its values decide.
                if condition is not None:
                    raise
            types.append([self._known.types.get(output.name) for output in body.output])
        for output, found in zip(node.output, zip(*types, strict=True), strict=False):
            if found[0] is not None and all(each == found[0] for each in found):
                self._known.types[output] = found[0]

    def _infer(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Constant" and self._add_constant(node):
            return None
        known = self._known
        inputs = {name: _proto(known.types[name]) for name in node.input if name in known.types}
        if any(name and name not in inputs for name in node.input):
            return self._like_first(node)
        schema = self._schema(node)
        if schema is None:
            return self._like_first(node)
        data = {
            name: numpy_helper.from_array(known.constants[name], name)
            for name in node.input
            if name in known.constants
        }
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, inputs, data, None, list(self._model.opset_import)
            )
        except onnx.shape_inference.InferenceError as error:
            raise _misfit(node, in_words(error)) from error
        for name, type_proto in found.items():
            tensor = _tensor_type(type_proto)
            if tensor is not None:
                known.types[name] = tensor
        self._check_reshape(node)
        self._like_first(node)
        return None

    def _check_reshape(self, node: onnx.NodeProto) -> None:
        """ONNX's inference believes a shape that is given as a whole."""
        if node.op_type != "Reshape" or node.output[0] not in self._known.types:
            return
        before, after = (self._known.types[n].shape for n in (node.input[0], node.output[0]))
        if math.prod(before) != math.prod(after):
            raise _misfit(node, f"{list(before)} cannot be reshaped to {list(after)}.")

    def _like_first(self, node: onnx.NodeProto) -> None:
        """What has no inference of its own, as functions and ONNX Runtime's operators have none."""
        first = self._known.types.get(node.input[0]) if node.input else None
        if node.op_type in _LIKE_FIRST and first is not None and node.output[0]:
            self._known.types.setdefault(node.output[0], first)

    def _schema(self, node: onnx.NodeProto) -> Any:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain not in self._opsets:
            return None
        try:
            return onnx.defs.get_schema(node.op_type, self._opsets[domain], domain)
        except onnx.defs.SchemaError:
            return None

    def _add_constant(self, node: onnx.NodeProto) -> bool:
        tensor = next((a.t for a in node.attribute if a.name == "value"), None)
        if tensor is None:
            return False
        name = node.output[0]
        self._known.types[name] = TensorType(tensor.data_type, tuple(tensor.dims))
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if math.prod(tensor.dims) <= LARGEST_CONSTANT and not external:
            self._known.constants[name] = array_of(tensor)
        return True

    def _declare(self, value: onnx.ValueInfoProto) -> None:
        tensor = _tensor_type(value.type)
        if tensor is not None:
            self._known.types[value.name] = tensor

    def _fold(self, node: onnx.NodeProto) -> None:
        """Computes what can be computed from constants and from shapes."""
        known = self._known
        if node.op_type == "Shape":
            tensor = known.types.get(node.input[0])
            if tensor is not None:
                start, end = (_attribute(node, a) for a in ("start", "end"))
                known.constants[node.output[0]] = np.array(tensor.shape[start:end], np.int64)
            return
        if node.op_type in _RANDOM or node.domain or any(o in known.constants for o in node.output):
            return
        types = [known.types.get(name) for name in node.output if name]
        if any(t is None or math.prod(t.shape) > LARGEST_CONSTANT for t in types):
            return
        values = {name: known.constants.get(name) for name in node.input if name}
        if any(value is None for value in values.values()) or list(subgraphs(node)):
            return
        known.constants.update(_evaluate(node, values, main_opset(self._model)))


def _evaluate(
    node: onnx.NodeProto, values: Mapping[str, Any], opset: int
) -> dict[str, np.ndarray[Any, Any]]:
    """One operator, by ONNX's own reference; nothing where that does not know it."""
    from onnx.reference import ReferenceEvaluator

    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in values.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset)],
    )
    try:
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(model).run(None, dict(values))
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError):
        return {}  # the value is not known then; its type still is
    names = [name for name in node.output if name]
    return {name: np.asarray(value) for name, value in zip(names, found, strict=True)}


def _misfit(node: onnx.NodeProto, why: str) -> InputError:
    return InputError(
        f"the sizes chosen for the inputs do not fit the model at {label(node)} ({node.op_type}): "
        f"say a shape that it takes by --input-shape NAME=SIZES ({why.rstrip('.')})."
    )


def array_of(tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    """The numbers of a tensor that lies in the model itself.

    Raises:
        CheckpointError: it does not hold as many as its shape says.
    """
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"the tensor {tensor.name!r} does not hold what its shape says ({in_words(error)})"
        ) from error


def label(node: onnx.NodeProto) -> str:
    """A node's name for messages; what it makes, if it has none."""
    return str(node.name or (node.output[0] if node.output else node.op_type))


def _attribute(node: onnx.NodeProto, name: str) -> int | None:
    return next((int(a.i) for a in node.attribute if a.name == name), None)


def _proto(tensor: TensorType) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(tensor.element, tensor.shape)


def _tensor_type(proto: onnx.TypeProto) -> TensorType | None:
    tensor = proto.tensor_type
    if not proto.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    if not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return TensorType(tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim))
