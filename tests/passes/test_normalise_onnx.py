"""The normal form computes what the model computes, and has one addition per node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnres_compile.passes.normalise_onnx import normalise_onnx
from onnx_cases import chain, model_of

FLOAT = TensorProto.FLOAT
SHAPE: list[int | str] = ["batch", "seq", 8]


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: onnx.ModelProto, *inputs: str) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    feeds = {n: generator.standard_normal((2, 3, 8)).astype(np.float32) for n in inputs}
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feeds))


def same(left: onnx.ModelProto, right: onnx.ModelProto, *inputs: str) -> bool:
    pairs = zip(run(left, *inputs), run(right, *inputs), strict=True)
    return all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def test_a_model_in_normal_form_stays_as_it_is() -> None:
    model = chain()
    assert normalise_onnx(model) == model


def test_sum_of_three_becomes_two_additions() -> None:
    nodes = [helper.make_node("Sum", ["a", "b", "c"], ["y"], name="sum")]
    tensors = dict.fromkeys("abc", (FLOAT, SHAPE))
    model = model_of(nodes, tensors, {"y": (FLOAT, SHAPE)}, [])
    normal = normalise_onnx(model)
    assert kinds(normal) == ["Add", "Add"]
    assert list(normal.graph.node[0].input) == ["a", "b"]
    assert normal.graph.node[1].output[0] == "y"
    assert same(model, normal, "a", "b", "c")
    assert kinds(model) == ["Sum"]  # the model given is not changed


def test_functions_are_inlined() -> None:
    body = [helper.make_node("Relu", ["v"], ["r"]), helper.make_node("Add", ["v", "r"], ["w"])]
    function = helper.make_function(
        "mine", "Block", ["v"], ["w"], body, [helper.make_opsetid("", 17)]
    )
    nodes = [helper.make_node("Block", ["x"], ["y"], domain="mine")]
    model = model_of(nodes, {"x": (FLOAT, SHAPE)}, {"y": (FLOAT, SHAPE)}, [])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    normal = normalise_onnx(model)
    assert kinds(normal) == ["Relu", "Add"]
    assert not normal.functions
    assert same(model, normal, "x")


def skip_norm(kind: str, bias: bool, outputs: list[str], epsilon: float = 1e-5) -> onnx.ModelProto:
    weights = {name: np.linspace(0.5, 1.5, 8, dtype=np.float32) for name in ("scale", "shift")}
    weights["bias"] = np.linspace(-1, 1, 8, dtype=np.float32)
    simplified = kind == "SkipSimplifiedLayerNormalization"
    inputs = ["a", "b", "scale", *([] if simplified else ["shift"]), *(["bias"] if bias else [])]
    node = helper.make_node(
        kind, inputs, outputs, domain="com.microsoft", epsilon=epsilon, name="norm"
    )
    model = model_of(
        [node],
        {"a": (FLOAT, SHAPE), "b": (FLOAT, SHAPE)},
        {name: (FLOAT, SHAPE) for name in outputs if name},
        [numpy_helper.from_array(value, name) for name, value in weights.items() if name in inputs],
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


@pytest.mark.parametrize("outputs", [["y"], ["y", "", "", "total"]])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_fused_norms_become_addition_and_norm(kind: str, bias: bool, outputs: list[str]) -> None:
    # an eps this large shows in the output
    model = skip_norm(kind, bias, outputs, epsilon=0.1)
    normal = normalise_onnx(model)
    assert kinds(normal) == [*["Add"] * (1 + bias), kind.removeprefix("Skip")]
    assert same(model, normal, "a", "b")


def test_a_fused_norm_with_statistics_is_left() -> None:
    model = skip_norm("SkipLayerNormalization", False, ["y", "mean"])
    assert kinds(normalise_onnx(model)) == ["SkipLayerNormalization"]


def test_bodies_are_brought_into_normal_form_too() -> None:
    branch = helper.make_graph(
        [helper.make_node("Sum", ["x", "x", "x"], ["b"])],
        "body",
        [],
        [helper.make_tensor_value_info("b", FLOAT, SHAPE)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    condition = numpy_helper.from_array(np.array(True), "c")
    model = model_of([node], {"x": (FLOAT, SHAPE)}, {"y": (FLOAT, SHAPE)}, [condition])
    normal = normalise_onnx(model)
    bodies = [attribute.g for attribute in normal.graph.node[0].attribute]
    assert [[n.op_type for n in body.node] for body in bodies] == [["Add", "Add"]] * 2
    assert same(model, normal, "x")
