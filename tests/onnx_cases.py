"""ONNX models for tests: written by hand, and exported from tiny PyTorch models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from attnres_compile.checkpoint.onnx import ORIGINAL

OPSET = 17
WIDTH = 8
TOKENS: list[int | str] = ["batch", "seq", WIDTH]


def chain(
    layers: int = 3,
    width: int = 8,
    *,
    opset: int = OPSET,
    element: int = TensorProto.FLOAT,
    data: bool = True,
) -> onnx.ModelProto:
    """``x = x + MatMul(LayerNorm(x), w)`` some times, and a norm; inputs [batch, seq, width].

    Its one stream has as many residual additions as layers, read at every depth; without `data`
    the weights have a shape only.
    """
    dtype = helper.tensor_dtype_to_np_dtype(element)
    generator = np.random.default_rng(1)
    nodes, weights, state = [], [], "x"
    for i in range(layers):
        norm, weight = f"/layers.{i}/norm", f"layers.{i}.weight"
        nodes += [
            helper.make_node(
                "LayerNormalization", [state, "scale"], [f"n{i}"], name=f"{norm}/LayerNormalization"
            ),
            helper.make_node("MatMul", [f"n{i}", weight], [f"b{i}"], name=f"/layers.{i}/MatMul"),
            helper.make_node("Add", [state, f"b{i}"], [f"x{i}"], name=f"/layers.{i}/Add"),
        ]
        state = f"x{i}"
        weights.append(TensorProto(name=weight, data_type=element, dims=[width, width]))
        if data:
            numbers = generator.standard_normal((width, width)) / width**0.5
            weights[-1] = numpy_helper.from_array(numbers.astype(dtype), weight)
    weights.append(numpy_helper.from_array(np.ones(width, dtype), "scale"))
    nodes.append(helper.make_node("LayerNormalization", [state, "scale"], ["y"], name="/norm/Norm"))
    shape = ["batch", "seq", width]
    return model_of(nodes, {"x": (element, shape)}, {"y": (element, shape)}, weights, opset)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int | str]]],
    outputs: dict[str, tuple[int, list[int | str]]],
    weights: list[onnx.TensorProto],
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A model of the given parts; inputs and outputs are element types and shapes."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, *each) for name, each in inputs.items()],
        [helper.make_tensor_value_info(name, *each) for name, each in outputs.items()],
        weights,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, producer_name="test"
    )


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def save_external(model: onnx.ModelProto, path: Path, file: str = "weights.data") -> Path:
    """The model with its matrices in a sparse file of zeros, which takes no room on the disk."""
    offset = 0
    for tensor in model.graph.initializer:
        if len(tensor.dims) < 2:
            continue
        size = int(np.prod(tensor.dims)) * 4
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        offset += size
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / file).parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / file).open("wb") as weights:
        weights.truncate(offset)
    return save(model, path)


class Program:
    """An ONNX graph, written operator by operator; its weights are made on the way."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.generator = np.random.default_rng(2)

    def __call__(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        output = f"v{len(self.nodes)}"
        name = f"/node/{output}"
        self.nodes.append(
            helper.make_node(kind, list(inputs), [output], name=name, domain=domain, **attributes)
        )
        return output

    def weight(self, *shape: int, dtype: Any = np.float32) -> str:
        name = f"w{len(self.weights)}"
        numbers = self.generator.standard_normal(shape).astype(dtype)
        self.weights.append(numpy_helper.from_array(np.asarray(numbers), name))
        return name

    def number(self, value: float, dtype: Any = np.float32) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        name = f"i{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def f(self, x: str, dtype: Any = np.float32) -> str:
        """A matrix product: something that is not element-wise."""
        return self("MatMul", x, self.weight(WIDTH, WIDTH, dtype=dtype))

    def norm(self, x: str) -> str:
        return self("LayerNormalization", x, self.weight(WIDTH))

    def model(
        self, output: str, shape: list[int | str] = TOKENS, element: int = TensorProto.FLOAT
    ) -> onnx.ModelProto:
        """A model of one input ``x`` and one output."""
        tensors = (element, shape)
        return model_of(self.nodes, {"x": tensors}, {output: tensors}, self.weights)


def remember_as_original(model: onnx.ModelProto, text: str) -> None:
    """Changes what a converted file holds as its original."""
    for each in model.metadata_props:
        each.value = text if each.key == ORIGINAL else each.value
